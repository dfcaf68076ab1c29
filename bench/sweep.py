"""Short training runs over a grid of fields: how the presets' rates were chosen (docs/LOG.md).

    python -m bench.sweep mini --rates 5e-4,1e-3,2e-3 training.max_steps=150 model.vocab_size=8192
    python -m bench.sweep quickstart --vary training.grad_clip_max_norm=1,5 --vary model.norm_type=derf,layer_norm

One line of JSON per run goes to --output as soon as it ends; the table follows, best held-out loss first. All runs
share one token cache, seed and evaluation set. Differences below 0.03 nats are noise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ultra.config import load_config
from ultra.config.training import GROUPS
from ultra.errors import UserError
from ultra.train import train
from ultra.train.signals import EXIT_INTERRUPTED

LAST = 20  # training steps averaged for the `train` column


def one_run(preset: str, overrides: list[str], cache: Path) -> dict[str, Any]:
    """Trains once; the figures of the run. A run that diverges has them up to there, with its exit code."""
    cfg = load_config(preset, [f"training.cache_dir={cache}", *overrides])
    with tempfile.TemporaryDirectory(prefix="ultra-sweep-") as folder:
        started = time.monotonic()
        code = train(cfg, run_dir=Path(folder) / "run")
        seconds = time.monotonic() - started
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps, evaluations = [r for r in rows if "loss" in r], [r for r in rows if "eval_loss" in r]
    losses = [r["loss"] for r in steps[-LAST:] if r["loss"] is not None]
    return {
        "exit": code,
        "steps": len(steps),
        "train": statistics.fmean(losses) if losses else None,
        "held_out": evaluations[-1]["eval_loss"],
        "on_mask": evaluations[-1]["eval_mask_loss"],
        "skipped": sum(r["skipped"] for r in steps),
        "median_grad_norm": statistics.median(r["grad_norm"] or 0.0 for r in steps),
        "seconds": round(seconds, 1),
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    top = argparse.ArgumentParser(prog="python -m bench.sweep", description=(__doc__ or "").split("\n")[0])
    top.add_argument("words", nargs="+", metavar="CONFIG key=value", help="preset or file; overrides of every run")
    top.add_argument("--rates", metavar="v1,v2", help="values of all seven lr_<group>")
    top.add_argument("--vary", action="append", default=[], metavar="key=v1,v2", help="one more axis of the grid")
    top.add_argument("--output", type=Path, help="append one JSON line per run")
    top.add_argument("--cache", type=Path, default=Path("temp_data/sweep"), help="token cache; default: %(default)s")
    args = top.parse_intermixed_args(argv)
    args.config, *args.overrides = args.words
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    axes: list[list[dict[str, str]]] = []
    if args.rates:
        axes.append(
            [{f"training.lr_{group}": rate for group in GROUPS} | {"rate": rate} for rate in args.rates.split(",")]
        )
    for axis in args.vary:
        key, _, values = axis.partition("=")
        axes.append([{key: value} for value in values.split(",")])
    results = []
    for point in itertools.product(*axes):
        fields = {key: value for part in point for key, value in part.items()}
        shown = {k: v for k, v in fields.items() if not k.startswith("training.lr_") or "rate" not in fields}
        overrides = [*args.overrides, *(f"{k}={v}" for k, v in fields.items() if k != "rate")]
        row = {"config": args.config, **shown, **one_run(args.config, overrides, args.cache)}
        if row["exit"] == EXIT_INTERRUPTED:
            return EXIT_INTERRUPTED
        results.append((shown, row))
        if args.output is not None:
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "overrides": args.overrides}) + "\n")
    print("\n| " + " | ".join(results[0][0]) + " | train | held-out | on [MASK] | skipped | s |")
    print("|---" * (len(results[0][0]) + 5) + "|")
    for shown, row in sorted(results, key=lambda r: r[1]["held_out"] or float("inf")):
        figures = [f"{row[k]:.2f}" if row[k] is not None else "-" for k in ("train", "held_out", "on_mask")]
        print("| " + " | ".join([*shown.values(), *figures, str(row["skipped"]), str(row["seconds"])]) + " |")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
