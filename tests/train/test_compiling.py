"""training.compile: the same run, resumable, and eager where the compiler fails."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from safetensors import safe_open

from ultra.config import load_config
from ultra.train import compiling, train


def run(folder: Path, compile: bool, *overrides: str) -> list[float]:
    sizes = (
        "vocab_size=512 hidden_size=16 num_layers=1 num_heads=2 retention_heads=2 ffn_hidden_size=16 num_loops=1 "
        "use_moe=false use_bitnet=false layer_pattern=[retnet]"
    )
    training = (
        "max_samples=300 max_length=24 batch_size=4 dataloader_workers=0 eval_samples=4 val_interval=5 device=cpu "
        f"scheduler_total_steps=5 checkpoint_every_n_steps=3 cache_dir={folder.parent / 'cache'} compile={compile}"
    )
    fields = [f"model.{f}" for f in sizes.split()]
    cfg = load_config("quickstart", [*fields, *(f"training.{f}" for f in training.split()), *overrides])
    torch._dynamo.reset()
    assert train(cfg, run_dir=folder) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def names(folder: Path) -> set[str]:
    with safe_open(folder / "checkpoints" / "step-00000005" / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_a_compiled_run_is_the_eager_run_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiling, "BACKEND", counter)
    caplog.set_level(logging.INFO)
    eager = run(tmp_path / "eager", False)
    assert not counter.frame_count
    compiled = run(tmp_path / "compiled", True)
    assert counter.frame_count == 1  # and none for the batches after the first
    assert any("compiled in" in m for m in caplog.messages)
    assert compiled == pytest.approx(eager, rel=1e-5)  # the same sums in float32, five updates long
    assert names(tmp_path / "compiled") == names(tmp_path / "eager")
    stopped = run(tmp_path / "stopped", True, "training.max_steps=3")
    resumed = run(tmp_path / "stopped", True, "training.max_steps=5")
    assert len(stopped) == 3 and resumed == compiled


def test_a_failing_compiler_is_named_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    losses = run(tmp_path / "run", True)
    assert len(losses) == 5
    (warning,) = [m for m in caplog.messages if "training.compile: the compiler failed" in m]
    assert "no-such-compiler" in warning or "C++ compiler" in warning
