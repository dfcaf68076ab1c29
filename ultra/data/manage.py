"""`ultra cache ls | verify | rm`: what lies in a cache_dir, whether it is as it was written, and its end."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ultra.data.build import folder_bytes, size
from ultra.data.cache import Unit, seal, unseal
from ultra.data.prepare import checksum_file
from ultra.data.tokenizer import load_tokenizer
from ultra.errors import UserError

SHORT = 12  # characters of a key that are shown; any beginning that fits one key names it


@dataclass
class Cached:
    """One folder of tokens; `damage` of its manifest, without which the rest is unknown."""

    folder: Path
    units: list[Unit] = field(default_factory=list)
    content: dict[str, Any] = field(default_factory=dict)
    damage: str | None = None

    @property
    def key(self) -> str:
        return self.folder.name


def caches(cache_dir: Path) -> list[Cached]:
    """Every cache in the folder, by key. Raises UserError when the folder is not there or cannot be read."""
    try:
        names = {entry.name: entry for entry in os.scandir(cache_dir)}
        folders = [Path(entry) for entry in os.scandir(names["tokens"])] if "tokens" in names else []
    except FileNotFoundError:
        raise UserError(f"{cache_dir}: no such folder; give a cache_dir, or --config CONFIG") from None
    except OSError as error:
        raise UserError(f"{cache_dir}: {error.strerror}; give a cache_dir, or --config CONFIG") from error
    # a link leads out of the folder, and what has another name is not ours
    own = sorted(f for f in folders if f.is_dir() and not f.is_symlink() and _is_key(f.name))
    return [_read(folder) for folder in own]


def _is_key(name: str) -> bool:
    return len(name) == 32 and set(name) <= set("0123456789abcdef")


def _read(folder: Path) -> Cached:
    try:
        data = (folder / "manifest.json").read_bytes()
    except FileNotFoundError:
        return Cached(folder, damage="missing")
    except OSError as error:
        return Cached(folder, damage=f"unreadable: {error.strerror}")
    try:
        content = unseal(data)
        _as_written(data, content, lambda key: key in {"format", "units", "exhausted", "skipped", "source"})
        return Cached(folder, [Unit.read(entry) for entry in content["units"]], content)
    except (ValueError, KeyError, TypeError) as error:
        return Cached(folder, damage=f"{type(error).__name__}: {error}")


def _as_written(data: bytes, content: dict[str, Any], is_key: Callable[[str], bool]) -> None:
    """Raises ValueError for what `unseal` passes over: other white space, or a damaged name of the checksum."""
    if _sealed(data):
        if seal(content) != data:
            raise ValueError("its bytes are not as they were written")
    elif unknown := [key for key in content if not is_key(key)]:
        raise ValueError(f"unknown key {unknown[0]!r}")


def _sealed(data: bytes) -> bool:
    """Whether this JSON has a checksum of itself."""
    return "sha256" in json.loads(data)


def _tokenizers(cache_dir: Path) -> list[Path]:
    """Trained tokenizers, also one of which only the checksum is left."""
    folder = cache_dir / "tokenizers"
    names = {path.name.removesuffix(".sha256") for path in folder.glob("*.json*") if not path.name.startswith(".")}
    return [folder / name for name in sorted(names)]


# ---------------------------------------------------------------- ls


def listing(cache_dir: Path) -> str:
    found = caches(cache_dir)
    rows = [("KEY", "DOCUMENTS", "TOKENS", "SIZE", "STATE", "CHANGED", "SOURCE")]
    total = 0
    for cached in found:
        count = folder_bytes(cached.folder)
        total += count
        documents, tokens = (sum(getattr(unit, name) for unit in cached.units) for name in ("documents", "tokens"))
        if cached.damage:
            state = "damaged"
        elif _held(cached.folder / "fill.lock"):
            state = "filling"
        else:
            state = "whole" if cached.content.get("exhausted") else "partial"  # partial: the source has more
        manifest = cached.folder / "manifest.json"
        changed = (
            time.strftime("%Y-%m-%d %H:%M", time.localtime(manifest.stat().st_mtime)) if not cached.damage else "-"
        )
        source = str(cached.content.get("source", "not recorded"))
        rows.append((cached.key[:SHORT], f"{documents:,}", f"{tokens:,}", size(count), state, changed, source))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = {1, 2, 3}
    lines = [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    tokenizers = [path for path in _tokenizers(cache_dir) if path.is_file()]
    total += sum(path.stat().st_size for path in tokenizers)
    lines.append(f"{len(found)} caches, {len(tokenizers)} trained tokenizers, {size(total)} in {cache_dir}")
    return "\n".join(line.rstrip() for line in lines)


def _held(path: Path) -> bool:
    """Whether another process holds this lock."""
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


# ---------------------------------------------------------------- verify


@dataclass
class Verdict:
    """damage: 'file: what is wrong'; unchecked: files without a recorded checksum."""

    files: int = 0
    damage: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def verify(cache_dir: Path, watch: Callable[[str], None] = lambda text: None) -> Verdict:
    """Compares every byte of every unit, tokenizer, manifest and of the index with its checksum; `watch` is told what
    is being read. Raises UserError when there is nothing to verify."""
    found, tokenizers, index = caches(cache_dir), _tokenizers(cache_dir), cache_dir / "index.json"
    if not found and not tokenizers and not index.exists():
        raise UserError(f"{cache_dir}: holds no token cache, so there is nothing to verify")
    verdict = Verdict()
    if index.exists():
        watch("index.json")
        _verify_index(index, verdict)
    elif found:
        verdict.damage.append("index.json: missing")
    for path in tokenizers:
        watch(path.name)
        _verify_tokenizer(path, verdict)
    for cached in found:
        where = f"tokens/{cached.key}"
        verdict.files += 1
        if cached.damage:
            verdict.damage.append(f"{where}/manifest.json: {cached.damage}")
            continue
        if not _sealed((cached.folder / "manifest.json").read_bytes()):
            verdict.unchecked.append(f"{where}/manifest.json")
        for unit in cached.units:
            watch(f"{cached.key[:SHORT]} {unit.name}")
            for name, checksum in zip(unit.files, unit.sha256 or ("", ""), strict=True):
                verdict.files += 1
                problem = _compare(cached.folder / name, checksum)
                if not checksum and problem is None:
                    verdict.unchecked.append(f"{where}/{name}")
                    problem = _shape(cached.folder / name, unit)
                if problem:
                    verdict.damage.append(f"{where}/{name}: {problem}")
    return verdict


def _verify_index(path: Path, verdict: Verdict) -> None:
    verdict.files += 1
    try:
        data = path.read_bytes()
        _as_written(data, unseal(data), _is_key)
        if not _sealed(data):
            verdict.unchecked.append("index.json")
    except (OSError, ValueError) as error:
        verdict.damage.append(f"index.json: {error}")


def _verify_tokenizer(path: Path, verdict: Verdict) -> None:
    verdict.files += 1
    name, checksum = f"tokenizers/{path.name}", checksum_file(path)
    try:
        recorded = checksum.read_text(encoding="ascii") if checksum.exists() else ""
        if checksum.exists() and len(recorded) != 64:
            raise ValueError("not a sha256")
    except (OSError, ValueError) as error:
        verdict.damage.append(f"{name}.sha256: {error}")
        return
    problem = _compare(path, recorded)
    if problem is None and not recorded:
        verdict.unchecked.append(name)
        try:
            load_tokenizer(path)
        except UserError as error:
            problem = str(error)
    if problem:
        verdict.damage.append(f"{name}: {problem}")


def _compare(path: Path, checksum: str) -> str | None:
    """What is wrong; an empty checksum only asks for the file to be there and readable."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while checksum and (block := file.read(1 << 20)):
                digest.update(block)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return "its bytes are not as they were written" if checksum and digest.hexdigest() != checksum else None


def _shape(path: Path, unit: Unit) -> str | None:
    """What can be told without a checksum."""
    if path.suffix == ".bin":
        count = path.stat().st_size
        return None if count in (2 * unit.tokens, 4 * unit.tokens) else f"{count} bytes for {unit.tokens} tokens"
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        return f"not an array: {error}"
    return None if table.shape == (unit.documents, 2) else f"shape {table.shape} for {unit.documents} documents"


# ---------------------------------------------------------------- rm


def remove(cache_dir: Path, keys: list[str], *, everything: bool, confirm: Callable[[str], bool]) -> str:
    """Removes the caches whose keys begin so, or all and the tokenizers. `confirm` is asked with what would go.

    Nothing is removed when a key fits none or several, when a process fills one of them, or without the confirmation.
    Only files that a cache is made of are touched.
    """
    found = caches(cache_dir)
    chosen = found if everything else [_by_key(cache_dir, found, key) for key in dict.fromkeys(keys)]
    if everything and not found and not _tokenizers(cache_dir):
        raise UserError(f"{cache_dir}: holds no token cache, so there is nothing to remove")
    total = size(sum(folder_bytes(cached.folder) for cached in chosen))
    what = f"{len(chosen)} cache{'' if len(chosen) == 1 else 's'}, {total}" + (", all tokenizers" if everything else "")
    if not confirm(f"remove {what} from {cache_dir}? A run that reads them fails"):
        return "nothing removed"
    try:
        with ExitStack() as locks:
            for path in [cache_dir / "prepare.lock", *(cached.folder / "fill.lock" for cached in chosen)]:
                lock = FileLock(path)
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    raise UserError(
                        f"{path} is held: a process prepares or fills this cache; nothing removed"
                    ) from None
                locks.callback(lock.release)
            left = [name for cached in chosen for name in _remove_cache(cached.folder)]
            if everything:
                for path in _tokenizers(cache_dir):
                    path.unlink(missing_ok=True)
                    checksum_file(path).unlink(missing_ok=True)
                (cache_dir / "index.json").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove {error.filename}: {error.strerror}") from error
    return f"removed {what}" + "".join(f"\nleft {path}, which is not of a cache" for path in left)


def _by_key(cache_dir: Path, found: list[Cached], key: str) -> Cached:
    fits = [cached for cached in found if key and cached.key.startswith(key)]
    if len(fits) != 1:
        known = ", ".join(cached.key[:SHORT] for cached in found) or "none"
        raise UserError(
            f"{cache_dir}: {'several caches begin' if fits else 'no cache begins'} with {key!r}; nothing removed. "
            f"Its caches: {known}"
        )
    return fits[0]


def _remove_cache(folder: Path) -> Iterator[Path]:
    """Yields what is left because it is not ours. The manifest goes first: without it nothing else counts."""
    (folder / "manifest.json").unlink(missing_ok=True)
    for path in sorted(folder.iterdir()):
        name = path.name.removeprefix(".")
        if path.is_dir() or not (name.startswith(("unit-", "manifest.json.")) or name == "fill.lock"):
            yield path
        elif name != "fill.lock":
            path.unlink()
    (folder / "fill.lock").unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
