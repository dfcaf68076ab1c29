"""What a run reports: metrics.jsonl, metrics.csv, train.log, the progress bar, and optional trackers."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from tqdm import tqdm

from ultra.config.training import GROUPS
from ultra.errors import UserError

log = logging.getLogger(__name__)

# The header of metrics.csv, the same for every run; metrics.jsonl may hold lists beside these.
COLUMNS = (
    ["step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "data_wait_ms"]
    + ["eval_loss", "eval_mask_loss", "eval_accuracy", "eval_tokens", "eval_seconds"]
    + ["aux_loss", "lr_factor", "skipped", "loss_scale", "max_memory_gib"]
    + [f"grad_norm_{group}" for group in GROUPS]
    + ["moe_entropy", "moe_load_min", "moe_load_max", "moe_dead_experts"]
)
PLAIN_SECONDS = 10.0  # between progress lines where there is no terminal


class Tracker(Protocol):
    def log(self, step: int, row: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class MetricsLog:
    """Writes rows to every sink. On opening, rows later than `upto` (the step resumed from) are dropped.

    Training rows may hold device tensors: `add` keeps them, `flush` reads them all, one wait for the device.
    """

    def __init__(self, run_dir: Path, *, upto: int, tokens: int, total_steps: int, trackers: list[Tracker]) -> None:
        self.jsonl, self.csv = run_dir / "metrics.jsonl", run_dir / "metrics.csv"
        self.total_steps, self.trackers = total_steps, trackers
        self.rows: list[dict[str, Any]] = []
        self.clock, self.tokens = time.perf_counter(), tokens  # of the last flush
        self.bar = tqdm(
            total=total_steps,
            initial=max(upto, 0),
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self.first_step, self.started, self.printed = max(upto, 0), time.monotonic(), -math.inf
        self.truncate(upto)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a training row; `moe_loads` `[layers, E]`, tokens per expert, becomes the moe columns."""
        self.rows.append(row)

    def flush(self) -> None:
        if not self.rows:
            return
        for row in self.rows:
            row |= {key: value.tolist() for key, value in row.items() if isinstance(value, Tensor)}
            row |= moe_columns(row.pop("moe_loads", []))
        last, now = self.rows[-1], time.perf_counter()
        rate = round((last["tokens"] - self.tokens) / max(now - self.clock, 1e-9), 1)
        self.write([{**row, "tokens_per_s": rate} for row in self.rows])
        self.progress(last["step"], last["loss"], rate)
        self.rows, self.tokens, self.clock = [], last["tokens"], now

    def skip_time(self, tokens: int) -> None:
        """Leave the time since the last flush out of tokens_per_s: evaluation, saving, going back."""
        self.tokens, self.clock = tokens, time.perf_counter()

    def truncate(self, upto: int) -> None:
        """Drop the rows of steps beyond `upto`, and a line that a kill cut short."""
        rows = [row for row in read_rows(self.jsonl) if row["step"] <= upto]
        _replace(self.jsonl, "".join(json.dumps(row) + "\n" for row in rows))
        with self.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        self.bar.n = max(upto, 0)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows; a number that is not finite becomes null, which JSON has."""
        rows = [{key: _finite(value) for key, value in row.items()} for row in rows]
        with self.jsonl.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        with self.csv.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS, extrasaction="ignore").writerows(rows)
        for row in rows:
            for tracker in self.trackers:
                tracker.log(row["step"], {key: v for key, v in row.items() if isinstance(v, int | float)})

    def progress(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Loss, tokens/s and time left: in the bar on a terminal, otherwise as a line now and then."""
        if not self.bar.disable:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
            self.bar.update(step - self.bar.n)
        elif time.monotonic() - self.printed >= PLAIN_SECONDS or step >= self.total_steps:
            self.printed = time.monotonic()
            per_step = (self.printed - self.started) / max(step - self.first_step, 1)
            left = tqdm.format_interval(per_step * (self.total_steps - step))
            print(
                f"step {step}/{self.total_steps}  loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s  {left} left",
                flush=True,
            )

    def close(self) -> None:
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()


class NoMetrics:
    """In the place of a MetricsLog where another process writes it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, *args: object) -> None: ...

    flush = write = skip_time = truncate = close = add


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a metrics.jsonl; the last line may be incomplete after a kill and is then left out. So are lines that are
    none of ours, with a warning: they cost the run nothing."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or cut short
        if not line:
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and "step" in row:
            yield row
        else:
            log.warning("%s:%d is no row of metrics and left out", path, number)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def moe_columns(counts: list[list[int]]) -> dict[str, Any]:
    """Router statistics of one step from the tokens per layer and expert, of all loops together.

    moe_load: share of the tokens, per layer and expert; moe_entropy: entropy of the load over that of equal loads, 1 is
    balanced, as one expert always is; moe_dead_experts: how many got no token. These two are the mean and the sum over
    the layers, moe_layer_… have one entry per layer.
    """
    if not counts:
        return {}
    loads = [[count / max(sum(layer), 1) for count in layer] for layer in counts]
    entropies = [
        -sum(p * math.log(p) for p in layer if p > 0) / math.log(len(layer)) if len(layer) > 1 else 1.0
        for layer in loads
    ]
    dead = [layer.count(0) for layer in counts]
    return {
        "moe_entropy": sum(entropies) / len(entropies),
        "moe_load_min": min(map(min, loads)),
        "moe_load_max": max(map(max, loads)),
        "moe_dead_experts": sum(dead),
        "moe_load": loads,
        "moe_layer_entropy": entropies,
        "moe_layer_dead_experts": dead,
    }


class _ConsoleHandler(logging.Handler):
    """Messages to stdout without breaking the bar; warnings say what they are."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        tqdm.write(prefix + record.getMessage(), file=sys.stdout)
        sys.stdout.flush()


@contextmanager
def log_to_folder(run_dir: Path) -> Iterator[None]:
    """Messages of both packages go to the console and, with time and level, to train.log."""
    file = logging.FileHandler(run_dir / "train.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [file, _ConsoleHandler()]
    loggers = [logging.getLogger(name) for name in ("ultra", "ultra_kernels")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        for handler in handlers:
            logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
            for handler in handlers:
                logger.removeHandler(handler)
        file.close()


class _TensorBoard:
    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"))
        self.writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```")

    def log(self, step: int, row: dict[str, Any]) -> None:
        for key, value in row.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandbLike:
    """wandb, and trackio, which has the same interface."""

    def __init__(self, module: str, run_dir: Path, config: dict[str, Any]) -> None:
        self.run = importlib.import_module(module).init(project="ultra", name=run_dir.name, config=config)

    def log(self, step: int, row: dict[str, Any]) -> None:
        self.run.log(row, step=step)

    def close(self) -> None:
        self.run.finish()


def open_trackers(names: tuple[str, ...], run_dir: Path, config: dict[str, Any]) -> list[Tracker]:
    """The trackers of training.log_to. Raises UserError when one is not installed."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"training.log_to: {', '.join(missing)} not installed; "
            "run pip install '.[track]' in the clone, or set log_to: []"
        )
    return [
        _TensorBoard(run_dir, config) if name == "tensorboard" else _WandbLike(name, run_dir, config) for name in names
    ]
