"""`ultra verify` finds any changed byte of a checkpoint, and says what it cannot check."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ultra.cli import main
from ultra.train import checkpoint

FILES = ["config.yaml", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A checkpoint of a few hundred bytes a file: every one of them can be tried."""
    return checkpoint.save(
        tmp_path / "run", 3, model={"w": torch.arange(6.0)}, optimizer={"w.exp_avg": torch.ones(2)},
        state={"step": 3}, config="model_class: mini\n", tokenizer='{"version": "1.0"}',
    )  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_found(small: Path, name: str) -> None:
    assert checkpoint.damage(small) is None
    content = (small / name).read_bytes()
    for at in range(len(content)):
        bits = 0x2A if content[at] == ord(" ") else 1 << at % 8  # 0x2A: a line feed for a space, the same JSON
        (small / name).write_bytes(content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :])
        assert checkpoint.damage(small) is not None, (name, at)
    (small / name).write_bytes(content)
    assert checkpoint.damage(small) is None


def test_a_run_is_verified_checkpoint_by_checkpoint(tiny_run: Path, tmp_path: Path, capsys) -> None:
    assert main(["verify", str(tiny_run)]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["whole", "whole"]
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    weights = run / "checkpoints" / "step-00000003" / "optimizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main(["verify", str(run)]) == 1
    first, second, verdict = capsys.readouterr().out.splitlines()
    assert "step-00000003  DAMAGED: optimizer.safetensors has" in first and second.endswith("step-00000006  whole")
    assert verdict.startswith("1 of 2 checkpoints damaged")
    assert main(["verify", str(weights.parent.parent / "step-00000006")]) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such folder"),
        (lambda p: p.mkdir(), "neither a run folder"),
        (lambda p: (p / "checkpoints").mkdir(parents=True), "no checkpoint in"),
        (lambda p: (p.mkdir(), (p / "model.safetensors").touch()), "without a manifest.json"),
    ],
    ids=["missing", "empty", "no checkpoint", "weights alone"],
)
def test_what_cannot_be_verified(make, message: str, tmp_path: Path, capsys) -> None:
    make(tmp_path / "x")
    assert main(["verify", str(tmp_path / "x")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err


def test_a_missing_manifest_is_damage(small: Path, capsys) -> None:
    (small / "manifest.json").unlink()
    assert main(["verify", str(small)]) == 1
    assert "DAMAGED" in capsys.readouterr().out
