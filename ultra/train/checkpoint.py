"""Checkpoints: a folder of safetensors and JSON, whole or not there at all, and never pickled.

`<run>/checkpoints/step-00001000/` holds model.safetensors, optimizer.safetensors, state.json, config.yaml,
tokenizer.json and, written last, manifest.json with every file's size and sha256. The folder is written
under a temporary name on the same file system and renamed when all of it is on disk. The latest one is found
by checking manifests, not by a pointer that could move too early.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ultra.errors import UserError

log = logging.getLogger(__name__)

FORMAT = 2
TERNARY = "ternary-2"  # of a folder that `ultra export --format ternary` wrote (ultra/export)
WEIGHTS = "weights-1"  # with --format safetensors
_EXPORTED = {"model.safetensors", "config.yaml", "tokenizer.json"}
NEEDED: dict[int | str, set[str]] = {
    FORMAT: {"model.safetensors", "state.json", "config.yaml"},
    "ternary-1": _EXPORTED,
    TERNARY: _EXPORTED,
    WEIGHTS: _EXPORTED,
}
_STEP = re.compile(r"step-(\d{8,})")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # a manifest must not reach outside its own folder


class CheckpointError(UserError):
    """A checkpoint that is absent, damaged or made for another model."""


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def steps(run_dir: Path) -> list[int]:
    """Steps with a checkpoint folder, valid or not, in rising order."""
    root = run_dir / "checkpoints"
    found = [_STEP.fullmatch(entry.name) for entry in root.iterdir()] if root.is_dir() else []
    return sorted(int(match[1]) for match in found if match)


def save(
    run_dir: Path,
    step: int,
    *,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    config: str,
    tokenizer: str,
) -> Path:
    """Write one checkpoint atomically and return its folder. Raises OSError; the others stay as they are."""
    target = folder(run_dir, step)
    root = target.parent
    root.mkdir(parents=True, exist_ok=True)
    clean(run_dir)
    temporary = root / f".tmp-{target.name}"
    try:
        tensors = {"model.safetensors": model, "optimizer.safetensors": optimizer}
        texts = {"state.json": json.dumps(state, indent=1, allow_nan=False)}
        write(temporary, tensors, {**texts, "config.yaml": config, "tokenizer.json": tokenizer})
    except OSError:  # a full disk: give back what the attempt took
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if target.exists():  # a damaged folder, or a step reached again after going back
        target.rename(root / f".old-{target.name}")
    temporary.rename(target)
    _sync(root)
    clean(run_dir)
    return target


def write(path: Path, tensors: dict[str, dict[str, Tensor]], texts: dict[str, str], form: int | str = FORMAT) -> None:
    """A new folder of these files and, last, their manifest; all of it on disk on return. Raises OSError."""
    path.mkdir()
    for name, held in tensors.items():
        try:
            # in the file too, so that weights without their manifest are not taken for others
            metadata = {"metadata": {"format": form}} if isinstance(form, str) else {}
            save_file({key: t.detach().cpu().contiguous() for key, t in held.items()}, path / name, **metadata)
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(f"{path / name}: {error}") from error
    for name, text in texts.items():
        (path / name).write_text(text, encoding="utf-8")
    files = sorted(path.iterdir())
    for file in files:
        _sync(file)
    entries = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    manifest = path / "manifest.json"
    manifest.write_text(_manifest_text(entries, form), encoding="utf-8")
    for name in tensors:  # safetensors leaves its files to their owner alone
        (path / name).chmod(manifest.stat().st_mode)
    _sync(manifest)
    _sync(path)


def _manifest_text(entries: dict[str, Any], form: int | str) -> str:
    return json.dumps({"format": form, "files": entries}, indent=1)


def clean(run_dir: Path) -> None:
    """Remove what an interrupted save left behind."""
    root = run_dir / "checkpoints"
    for pattern in (".tmp-step-*", ".old-step-*"):
        for path in root.glob(pattern):
            shutil.rmtree(path)


def damage(path: Path) -> str | None:
    """Why the folder is not a whole checkpoint, or None. Reads every file: no changed byte stays unseen."""
    try:
        text = (path / "manifest.json").read_text(encoding="utf-8")
        manifest = json.loads(text)
        form = manifest["format"]
        if form not in NEEDED:
            return f"its format is {form}, this version reads {' and '.join(map(str, NEEDED))}"
        for name, entry in manifest["files"].items():
            if not _PLAIN.fullmatch(name) or (path / name).is_symlink():
                return f"its manifest names {name!r}, which is not a plain file of the folder"
            if (size := (path / name).stat().st_size) != entry["size"]:
                return f"{name} has {size} bytes, not {entry['size']}"
            if _sha256(path / name) != entry["sha256"]:
                return f"{name} does not match its checksum"
        if missing := NEEDED[form] - set(manifest["files"]):
            return f"its manifest lacks {', '.join(sorted(missing))}"
        if text != _manifest_text(manifest["files"], form):  # white space: JSON reads it alike
            return "manifest.json is not as it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest or a file of it cannot be read ({type(error).__name__}: {error})"
    return None


def verify(path: Path) -> dict[Path, str | None]:
    """Checkpoint folder -> its damage or None, for a checkpoint or for every one of a run folder.

    Raises CheckpointError when `path` holds no checkpoint at all.
    """
    if (path / "checkpoints").is_dir():
        found = [folder(path, step) for step in steps(path)]
        if not found:
            raise CheckpointError(f"{path}: no checkpoint in {path / 'checkpoints'} yet")
    elif (path / "manifest.json").exists() or (path / "state.json").exists():
        found = [path]
    elif (path / "model.safetensors").is_file():
        raise CheckpointError(f"{path}: weights without a manifest.json, so there is nothing to compare them with")
    else:
        what = "no such folder" if not path.exists() else "neither a run folder (checkpoints/) nor a checkpoint"
        raise CheckpointError(f"{path}: {what}; a token cache is checked by `ultra cache verify`")
    return {each: damage(each) for each in found}


def latest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None; damaged ones are passed over with a warning."""
    for step in reversed(steps(run_dir)):
        path = folder(run_dir, step)
        if (reason := damage(path)) is None:
            return path
        log.warning("checkpoint %s is damaged and passed over: %s", path, reason)
    return None


def prune(run_dir: Path, keep: set[int]) -> None:
    """Delete every checkpoint of the run whose step is not in `keep`."""
    for step in steps(run_dir):
        if step not in keep:
            # Renamed first: a deletion that is cut short must not leave a half-empty checkpoint.
            doomed = folder(run_dir, step).rename(run_dir / "checkpoints" / f".old-step-{step:08d}")
            shutil.rmtree(doomed)


def set_aside_after(run_dir: Path, step: int) -> None:
    """Rename checkpoints later than `step`: the run that goes on from there must not resume from them."""
    for later in steps(run_dir):
        if later > step:
            path = folder(run_dir, later)
            aside = path.with_name(f"superseded-{path.name}")
            if aside.exists():
                shutil.rmtree(aside)
            path.rename(aside)
            log.info("set aside %s: the run goes on from step %d", aside, step)


def resolve(path: Path, *, ternary: bool = False) -> Path:
    """The folder with weights that a path means: a checkpoint, a run's latest one, or an exported model.

    ternary: whether an export with ternary weights will do, which nothing can train. Raises CheckpointError when there
    is none, or when a checkpoint is damaged.
    """
    if (path / "checkpoints").is_dir():
        found = latest(path)
        if found is None:
            raise CheckpointError(f"{path}: no whole checkpoint in {path / 'checkpoints'}")
        return found
    if not (path / "model.safetensors").is_file():
        raise CheckpointError(
            f"{path}: neither a run folder (checkpoints/) nor a checkpoint or exported model (model.safetensors)"
        )
    # A folder of weights alone has neither of these two; a checkpoint that lost its manifest is damaged.
    is_checkpoint = (path / "manifest.json").exists() or (path / "state.json").exists()
    packed = is_ternary(path)
    if (is_checkpoint or packed) and (reason := damage(path)):
        raise CheckpointError(f"{path}: {reason}")
    if packed and not ternary:
        raise CheckpointError(
            f"{path}: exported with ternary weights, which cannot be trained; give the run it was exported from"
        )
    return path


def is_ternary(path: Path) -> bool:
    """Whether the weights of a folder are an export with ternary weights, of whatever version."""
    try:
        with safe_open(path / "model.safetensors", framework="pt") as file:
            return str((file.metadata() or {}).get("format")).startswith("ternary-")
    except (OSError, SafetensorError):
        return False


def read_state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return state


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Tensors of one safetensors file of a folder, on the host."""
    try:
        return load_file(path / name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / name}: {error}") from error


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, a tied tensor once under its first name."""
    unique: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        unique.setdefault(id(tensor), name)
    return {name: state[name] for name in unique.values()}


def load_model_weights(path: Path, model: nn.Module) -> None:
    """Copy the weights that `path` means (see resolve) into the model.

    Raises CheckpointError with every name that is missing, unknown or of another shape.
    """
    found = resolve(path)
    copy_into(model, read_tensors(found, "model.safetensors"), found)


def copy_into(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    own = model_tensors(model)
    # moe_balance=bias on weights that were trained without: as at the start, no expert is preferred
    biases = {n: torch.zeros_like(t) for n, t in own.items() if n.endswith(".select_bias") and n not in tensors}
    copy_tensors(own, tensors | biases, source)


def copy_tensors(own: dict[str, Tensor], tensors: dict[str, Tensor], source: Path) -> None:
    wrong = [
        f"{name} is {list(tensors[name].shape)}, the model's is {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    wrong += [f"{name} is unknown" for name in tensors if name not in own]
    wrong += [f"{name} is missing" for name in own if name not in tensors]
    if wrong:
        shown = "; ".join(wrong[:12]) + (f"; and {len(wrong) - 12} more" if len(wrong) > 12 else "")
        config = source / "config.yaml"
        cure = f". The model section that fits is in {config}" if config.is_file() else ""
        raise CheckpointError(f"{source} holds another model: {shown}{cure}")
    for name, tensor in own.items():
        tensor.detach().copy_(tensors[name])


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    if os.name == "nt":  # Windows syncs neither folders nor files opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
