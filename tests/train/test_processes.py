"""Runs of several processes under torchrun, on the CPU: against one process with the same samples."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ultra.config.training import GROUPS
from ultra.errors import UserError
from ultra.train import checkpoint
from ultra.train.metrics import read_rows
from ultra.train.processes import Processes, started_by_torchrun

TIMES = {"tokens_per_s", "data_wait_ms", "eval_seconds"}


def settings(folder: Path, **training: object) -> Path:
    """A config of two layers with experts on 400 lines of text; the path of its file."""
    (folder / "text").mkdir(exist_ok=True)
    text = "".join(f"line {i}: the quick fox no {i * 37 % 101} jumps over {i % 7} lazy dogs\n\n" for i in range(400))
    (folder / "text" / "a.txt").write_text(text)
    model = {"vocab_size": 300, "hidden_size": 32, "num_layers": 2, "num_loops": 2, "num_heads": 2}
    model |= {"retention_heads": 2, "layer_pattern": ["retnet", "standard_attn"], "ffn_hidden_size": 32}
    model |= {"dropout": 0.0, "use_moe": True, "moe_balance": "bias", "moe_bias_rate": 0.01, "use_bitnet": False}
    fields = {
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_length": 32,
        "val_fraction": 0.2,
        "eval_samples": 6,
        "dataloader_workers": 0,
    }
    fields |= {"num_workers": 0, "cache_dir": str(folder / "cache"), "local_parquet_dir": str(folder / "text")}
    fields |= {"scheduler_total_steps": 6, "checkpoint_every_n_steps": 2, "val_interval": 3, "device": "cpu"}
    fields |= {"gradient_log_interval": 1, "nan_check_interval": 2, "use_amp": False, "use_galore": False}
    path = folder / f"{len(list(folder.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump({"model": model, "training": fields | training}))
    return path


def start(config: Path, run: Path, processes: int) -> subprocess.Popen[str]:
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    )
    command = [sys.executable, *launcher, "-m", "ultra", "train", str(config), "--run-dir", str(run)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out = process.communicate(timeout=240)[0]
    assert process.returncode == code, out
    return out


def rows(run: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(run / "metrics.jsonl")]


def assert_alike(one: Path, two: Path, rtol: float) -> None:
    """Equal metrics and weights up to the order of sums, and the same checkpoints."""
    assert checkpoint.steps(one) == checkpoint.steps(two)
    a, b = rows(one), rows(two)
    assert [sorted(row) for row in a] == [sorted(row) for row in b]
    for left, right in zip(a, b, strict=True):
        for key, value in left.items():
            got, want = (torch.tensor(v, dtype=torch.float64) for v in (right[key], value))
            torch.testing.assert_close(got, want, rtol=rtol, atol=0, equal_nan=True, msg=f"{left['step']} {key}")
    first, second = (load_file(checkpoint.latest(run) / "model.safetensors") for run in (one, two))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=rtol, atol=2e-5, msg=name)


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """The same six global batches of 4 windows: 2 processes × 2, or 2 micro-batches × 2. The expert loads and the
    evaluation, whose last batch only one process has, are those of all."""
    several = finish(start(settings(tmp_path), tmp_path / "two", 2))
    finish(start(settings(tmp_path, gradient_accumulation_steps=2), tmp_path / "one", 1))
    assert "2 processes" in several and several.count("resumed") == 0 and several.count("held-out loss") == 3
    assert_alike(tmp_path / "one", tmp_path / "two", rtol=1e-4)
    last = [row for row in rows(tmp_path / "two") if "moe_load" in row][-1]
    assert len(last["moe_load"]) == 2 and last["skipped"] == 0


def test_a_signal_to_one_process_stops_all_and_another_number_of_them_goes_on(tmp_path: Path) -> None:
    config = settings(tmp_path, scheduler_total_steps=400, val_interval=400, checkpoint_every_n_steps=400)
    process = start(config, tmp_path / "two", 2)
    deadline = time.monotonic() + 120
    while not rows(tmp_path / "two")[1:] and time.monotonic() < deadline:
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == 2, children
    os.kill(int(children[-1]), signal.SIGTERM)
    out = finish(process, 1)  # torchrun's own code where its processes end with another than 0
    assert "interrupted at step" in out and "exitcode  : 75" in out, out
    (step,) = checkpoint.steps(tmp_path / "two")
    assert checkpoint.read_state(checkpoint.latest(tmp_path / "two"))["world_size"] == 2
    total = step + 2
    shorter = settings(tmp_path, gradient_accumulation_steps=2, max_steps=total, scheduler_total_steps=400)
    out = finish(start(shorter, tmp_path / "two", 1))
    assert f"resumed at step {step}" in out
    finish(start(shorter, tmp_path / "one", 1))
    one, two = (load_file(checkpoint.latest(tmp_path / run) / "model.safetensors") for run in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_bad_steps_of_several_processes(tmp_path: Path) -> None:
    """Rates that blow the weights up: all processes skip, look for the cause, go back, and give up together."""
    rates = {f"lr_{group}": 1e30 for group in GROUPS}
    config = settings(tmp_path, scheduler_total_steps=40, max_nan_retries=1, **rates)
    out = finish(start(config, tmp_path / "run", 2), 1)
    assert out.count("skipped step 2 (bad window 1 in a row)") == 2 and "samples 4-7" in out and "samples 12-15" in out
    assert out.count("data or weights are at fault") == 2 and out.count("embedding (Embedding); embedding") == 2
    assert out.count("went back from step 2 to 0") == 1 and out.count("going back to step 0 did not help") == 1
    dumps = sorted(path.name for path in (tmp_path / "run").glob("dump*"))
    assert dumps == [f"dump-step-00000002-rank-{rank}" for rank in (0, 1)]


def test_what_several_processes_cannot_do_is_said(tmp_path: Path) -> None:
    out = finish(
        start(settings(tmp_path, use_galore=True, galore_rank=8, galore_per_layer=True), tmp_path / "run", 2), 1
    )
    assert "galore_per_layer" in out and "exitcode  : 2" in out and "Traceback" not in out.split("torch/distributed")[0]


@pytest.mark.parametrize("size", ["two", "", "-1"])
def test_a_world_size_that_is_none_is_said(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match="WORLD_SIZE"):
        started_by_torchrun()


def test_one_process_alone_gets_what_it_gives() -> None:
    alone = Processes()
    tensor = torch.ones(3)
    assert alone.sum(tensor) is tensor and alone.total(2, 3.5) == [2, 3.5] and alone.collect(["a"]) == ["a"]
    assert alone.any(True) and not alone.any(False) and alone.from_main(lambda: 7) == 7 and alone.alike([tensor])
    with pytest.raises(OSError, match="full"):
        alone.from_main(lambda: (_ for _ in ()).throw(OSError("full")))
