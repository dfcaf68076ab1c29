"""`ultra data build`: fill the caches of a config completely, and say how far it has come."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ultra.data.cache import Filler, Interrupted
from ultra.data.prepare import Opened, OpenedSource, open_caches, refuse_empty, start_fillers, stop_fillers

if TYPE_CHECKING:
    from ultra.config import RunConfig

LOOK_S = 0.1
LINE_S = 10.0  # between lines of progress where there is no terminal


def build(cfg: RunConfig, should_stop: Callable[[], bool] = lambda: False) -> str:
    """Fills, and returns what is there then. Raises UserError, and Interrupted when should_stop() comes true: what is
    filled stays, and the next call goes on from there."""
    with logging_redirect_tqdm():
        opened = open_caches(cfg, should_stop=should_stop, trust=cfg.training.prefer_local_cache)
        fillers = start_fillers(opened, cfg.training.num_workers)
        start = time.monotonic()
        progress = Progress(opened, fillers)
        try:
            while any(filler is not None and filler.is_alive() for filler in fillers):
                if should_stop():
                    raise Interrupted
                progress.show()
                time.sleep(LOOK_S)
        finally:
            progress.close()
            stop_fillers(fillers)
    for part, filler in zip(opened.sources, fillers, strict=True):
        if filler is not None and filler.error is not None:
            raise filler.error
        part.cache.refresh()
        refuse_empty(part)
    seconds = time.monotonic() - start
    lines = [summary(part) for part in opened.sources]
    added = sum(filler.new_tokens for filler in fillers if filler is not None)
    if any(fillers):
        lines.append(f"{added:,} new tokens in {seconds:.1f} s: {added / max(seconds, 1e-9):,.0f} tokens/s")
    else:
        lines.append("complete already: nothing to do")
    return "\n".join(lines)


def summary(part: OpenedSource) -> str:
    cache = part.cache
    documents, tokens = (sum(getattr(unit, name) for unit in cache.units) for name in ("documents", "tokens"))
    skipped = sum(cache.skipped.values())
    text = f"{part.source.name}: {documents:,} documents, {tokens:,} tokens in {len(cache.units)} units"
    text += f"; {skipped:,} rows skipped" if skipped else ""
    return f"{text}\n  {cache.folder}, {size(folder_bytes(cache.folder))}"


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def size(count: float) -> str:
    if count < 1000:
        return f"{count:.0f} bytes"
    power = min(4, int(math.log10(count)) // 3)
    return f"{count / 1000**power:.1f} {' KMGT'[power]}B"


class Progress:
    """A bar on a terminal, a line every LINE_S elsewhere."""

    def __init__(self, opened: Opened, fillers: list[Filler | None]) -> None:
        self._parts = list(zip(opened.sources, fillers, strict=True))
        self._known = self._share() is not None
        self._bar = tqdm(
            total=100 if self._known else None,
            disable=not sys.stderr.isatty() or not any(fillers),
            bar_format="{percentage:3.0f} %|{bar}| {desc} [{elapsed}<{remaining}]"
            if self._known
            else "{desc} [{elapsed}]",
            dynamic_ncols=True,
        )
        self._start = self._printed = self._looked = time.monotonic()

    def _documents(self, part: OpenedSource, filler: Filler | None) -> int:
        # units that another process fills are seen in the manifest only
        return max(filler.documents if filler else 0, sum(unit.documents for unit in part.cache.units))

    def _share(self) -> float | None:
        """Of the whole work, 0 to 1; None when a source has no known end."""
        shares = []
        for part, filler in self._parts:
            if filler is None:
                continue
            read = part.source.share_read(filler.cursor) if filler.cursor else 0.0
            if read is None:
                return None
            shares.append(min(1.0, max(read, self._documents(part, filler) / part.cache.max_documents)))
        return sum(shares) / len(shares) if shares else 1.0

    def show(self) -> None:
        now = time.monotonic()
        if now - self._looked < 1.0:
            return
        self._looked = now
        for part, _ in self._parts:
            part.cache.refresh()
        documents = sum(self._documents(part, filler) for part, filler in self._parts)
        added = sum(filler.new_tokens for _, filler in self._parts if filler)
        text = f"{documents:,} documents, {added:,} new tokens, {added / (now - self._start):,.0f} tokens/s"
        share = self._share()
        if not self._bar.disable:
            self._bar.set_description_str(text, refresh=False)
            if share is not None:
                self._bar.n = 100 * share
                if not self._bar.initial:  # what was there before does not count for the time left
                    self._bar.initial = self._bar.n
            self._bar.refresh()
        elif now - self._printed >= LINE_S:
            self._printed = now
            print(text if share is None else f"{share:4.0%}  {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()
