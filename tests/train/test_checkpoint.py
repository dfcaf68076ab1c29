from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from ultra.train import checkpoint
from ultra.train.checkpoint import CheckpointError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.table.weight
        self.register_buffer("count", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def save(run: Path, step: int, value: float = 0.0) -> Path:
    return checkpoint.save(
        run,
        step,
        model={"w": torch.full((64,), value), "strided": torch.randn(4, 6).T},
        optimizer={"w.exp_avg": torch.zeros(64)},
        state={"step": step, "bad_windows": 0},
        config="model: {}\n",
        tokenizer="{}",
    )


def test_folder_holds_what_is_documented(tmp_path: Path) -> None:
    path = save(tmp_path, 1000)
    assert path == tmp_path / "checkpoints" / "step-00001000"
    names = {"model.safetensors", "optimizer.safetensors", "state.json", "config.yaml", "tokenizer.json"}
    assert {p.name for p in path.iterdir()} == names | {"manifest.json"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == names
    assert manifest["files"]["config.yaml"]["size"] == len("model: {}\n")
    assert checkpoint.damage(path) is None
    assert checkpoint.read_state(path) == {"step": 1000, "bad_windows": 0}


@pytest.mark.parametrize("killed_at", range(40))
def test_kill_at_any_point_leaves_the_previous_or_the_new_one_whole(
    tmp_path: Path, monkeypatch, killed_at: int
) -> None:
    """Every file operation of a save is in turn the last one, as after a SIGKILL."""

    class Killed(BaseException):
        pass

    left = killed_at

    def lethal(original):
        def call(*args, **kwargs):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return original(*args, **kwargs)

        return call

    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        for owner, name in (
            (os, "fsync"),
            (checkpoint, "save_file"),
            (checkpoint, "_sha256"),
            (checkpoint.shutil, "rmtree"),
            (Path, "write_text"),
            (Path, "rename"),
            (Path, "mkdir"),
        ):
            patch.setattr(owner, name, lethal(getattr(owner, name)))
        try:
            save(tmp_path, 2)
            checkpoint.prune(tmp_path, {2})
            finished = True
        except Killed:
            finished = False
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.name in ("step-00000001", "step-00000002")
    assert checkpoint.steps(tmp_path) in ([1], [1, 2], [2])
    assert finished == (left > 0) or left == 0
    save(tmp_path, 3)  # and the leftovers are no obstacle
    assert checkpoint.latest(tmp_path).name == "step-00000003"
    assert not [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]


def test_kill_points_cover_the_whole_save(tmp_path: Path, monkeypatch) -> None:
    calls = 0

    def counted(original):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            return original(*args, **kwargs)

        return call

    save(tmp_path, 1)
    for owner, name in ((os, "fsync"), (checkpoint, "save_file"), (checkpoint, "_sha256"), (Path, "rename")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    for name in ("write_text", "mkdir"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    save(tmp_path, 2)
    assert calls < 35  # the parametrisation above goes to 40, pruning included


def test_full_disk_is_an_oserror_and_gives_the_space_back(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, 1)

    def full(*args) -> None:
        raise checkpoint.SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_damage_falls_back_to_the_previous_one_and_says_so(tmp_path: Path, caplog, name: str, how: str) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    data = bytearray((bad / name).read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    elif how == "truncate":
        del data[-1]
    (bad / name).write_bytes(data)
    if how == "delete":
        (bad / name).unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path) == good
    assert "step-00000002" in caplog.text
    with pytest.raises(CheckpointError):
        checkpoint.resolve(bad)


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "sub/file", ".hidden", ""])
def test_manifest_may_name_plain_files_only(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"size": 0, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert "not a plain file" in checkpoint.damage(path)


def test_symlink_is_damage(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "config.yaml").rename(tmp_path / "elsewhere")
    (path / "config.yaml").symlink_to(tmp_path / "elsewhere")
    assert "not a plain file" in checkpoint.damage(path)


def test_prune_keeps_what_it_is_told(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, {2, 4})
    assert checkpoint.steps(tmp_path) == [2, 4]


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    source, target = Tied(), Tied()
    tensors = checkpoint.model_tensors(source)
    assert set(tensors) == {"table.weight", "head.bias", "count"}
    checkpoint.copy_into(target, {k: v.detach().clone() for k, v in tensors.items()}, tmp_path)
    assert target.head.weight is target.table.weight
    assert torch.equal(target.head.weight, source.table.weight)


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    tensors = {k: v.detach().clone() for k, v in checkpoint.model_tensors(Tied()).items()}
    tensors["table.weight"] = torch.zeros(6, 3)
    tensors["new"] = tensors.pop("count")
    target = Tied()
    before = target.head.bias.clone()
    with pytest.raises(CheckpointError) as error:
        checkpoint.copy_into(target, tensors, tmp_path)
    for part in ("count is missing", "new is unknown", "table.weight is [6, 3], the model's is [5, 3]"):
        assert part in str(error.value)
    assert torch.equal(target.head.bias, before)


def test_load_model_weights_takes_run_checkpoint_and_exported_folders(tmp_path: Path) -> None:
    run, exported, source = tmp_path / "run", tmp_path / "exported", Tied()
    path = checkpoint.save(
        run, 3, model=checkpoint.model_tensors(source), optimizer={}, state={}, config="", tokenizer=""
    )
    exported.mkdir()
    (exported / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    for place in (run, path, exported):
        target = Tied()
        checkpoint.load_model_weights(place, target)
        assert torch.equal(target.table.weight, source.table.weight)
    with pytest.raises(CheckpointError, match="neither a run folder"):
        checkpoint.load_model_weights(tmp_path, target)
    with pytest.raises(CheckpointError, match="neither a run folder"):
        checkpoint.load_model_weights(tmp_path / "absent", target)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for file in path.iterdir():
        assert not file.read_bytes().startswith((b"\x80", b"PK"))  # a pickle, and torch.save's zip
    source = Path(checkpoint.__file__).parent
    for file in source.glob("*.py"):
        text = file.read_text()
        assert "torch.load" not in text
        assert "import pickle" not in text
