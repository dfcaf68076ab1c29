"""`python -m bench.sweep`: one short run per point of the grid, a line of JSON each, and a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from ultra.config.training import GROUPS

TINY = [
    "model.layer_pattern=[standard_attn]", "model.vocab_size=400", "model.hidden_size=16", "model.num_layers=1",
    "model.num_heads=2", "model.ffn_hidden_size=16", "training.max_samples=200", "training.max_length=32",
    "training.batch_size=2", "training.eval_samples=4", "training.scheduler_total_steps=2",
]  # fmt: skip


@pytest.fixture
def sweep(bench_module: Callable[[str], ModuleType]) -> ModuleType:
    return bench_module("sweep")


def test_every_point_of_the_grid_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], sweep: ModuleType) -> None:
    output = tmp_path / "results.jsonl"
    grid = ["--rates", "0.0,1e-2", "--vary", "training.grad_clip_max_norm=1,5"]
    assert sweep.main(["quickstart", *grid, *TINY, "--cache", str(tmp_path / "cache"), "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    points = [(row["rate"], row["training.grad_clip_max_norm"]) for row in rows]
    assert points == [("0.0", "1"), ("0.0", "5"), ("1e-2", "1"), ("1e-2", "5")]
    assert all(row["exit"] == 0 and row["steps"] == 2 and row["overrides"] == TINY for row in rows)
    still, moved = {row["held_out"] for row in rows[:2]}, {row["held_out"] for row in rows[2:]}
    assert len(still) == 1 and not still & moved  # nothing is learned at rate 0, whatever the clipping
    table = capsys.readouterr().out.strip().splitlines()[-6:]
    assert table[0].startswith("| rate | training.grad_clip_max_norm | train | held-out |") and len(table) == 6
    losses = [float(line.split("|")[4]) for line in table[2:]]
    assert losses == sorted(losses)


def test_an_interrupted_run_ends_the_sweep(monkeypatch: pytest.MonkeyPatch, sweep: ModuleType) -> None:
    seen: list[list[str]] = []
    row = {"exit": 75, "train": None, "held_out": 1.0, "on_mask": 1.0, "skipped": 0, "seconds": 0.0}
    monkeypatch.setattr(sweep, "one_run", lambda preset, overrides, cache: seen.append(overrides) or row)
    assert sweep.main(["mini", "--rates", "1e-3,2e-3"]) == 75
    assert seen == [[f"training.lr_{group}=1e-3" for group in GROUPS]]
