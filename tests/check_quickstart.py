"""Check a finished run of the quickstart: `python tests/check_quickstart.py RUN_DIR`.

Prints its numbers; exit code 1 with the reasons when it learned too little or took too long.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from quickstart_criterion import MAX_SECONDS, shortfalls

import ultra
from ultra.errors import UserError


def seconds(run: Path, rows: list[dict[str, Any]]) -> float:
    """Wall time of the run: first to last line of train.log: data, steps, evaluations, checkpoints.

    At least the time that metrics.jsonl accounts for, should the log have been cut.
    """
    stamps = []
    for line in (run / "train.log").read_text(encoding="utf-8").splitlines():
        try:
            stamps.append(datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f"))
        except ValueError:  # the further lines of a message
            continue
    accounted, tokens = 0.0, 0
    for row in rows:
        if "eval_seconds" in row:
            accounted += row["eval_seconds"]
        else:
            accounted += (row["tokens"] - tokens) / row["tokens_per_s"]
            tokens = row["tokens"]
    return max((stamps[-1] - stamps[0]).total_seconds(), accounted)


def check(run: Path) -> list[str]:
    """Prints the run's numbers and returns what is wrong with it."""
    if not (run / "metrics.jsonl").is_file():
        return [f"{run}: no metrics.jsonl; give the folder of a finished run"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = rows[-1]
    pipeline = ultra.load(run)
    steps = pipeline.cfg.training.steps
    if last["step"] != steps or "eval_loss" not in last:
        return [f"{run}: not finished; its last line is of step {last['step']} of {steps}"]
    found, took = pipeline.evaluate(), seconds(run, rows)
    print(f"steps                {steps} in {took:.0f} s")
    for key in ("eval_loss", "eval_mask_loss", "unigram_loss", "eval_accuracy", "perplexity", "windows"):
        print(f"{key:20} {found[key]:.4f}" if isinstance(found[key], float) else f"{key:20} {found[key]}")
    print(f"{'gain on [MASK]':20} {found['unigram_loss'] - found['eval_mask_loss']:.4f}")
    wrong = shortfalls(found["eval_loss"], found["eval_mask_loss"], found["unigram_loss"])
    if took >= MAX_SECONDS:
        wrong.append(f"the run took {took:.0f} s; it must end in under {MAX_SECONDS:.0f} s")
    # The same windows, masks and weights: only the order of float32 sums may differ between machines.
    if abs(found["eval_loss"] - last["eval_loss"]) > 1e-3:
        wrong.append(f"evaluated again: {found['eval_loss']:.4f}, metrics.jsonl says {last['eval_loss']:.4f}")
    return wrong


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print(f"{(__doc__ or '').strip()}\n\ngot {len(argv)} arguments", file=sys.stderr)
        return 2
    try:
        wrong = check(Path(argv[0]))
    except UserError as error:
        wrong = [str(error)]
    for reason in wrong:
        print(f"FAILED: {reason}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
