"""A trained model as it is, without what only training needs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ultra.errors import UserError
from ultra.train import checkpoint

if TYPE_CHECKING:
    from ultra.inference import Pipeline


def save_weights(pipeline: Pipeline, out: str | Path) -> str:
    """Write the model of a pipeline: weights in float32, config.yaml, tokenizer.json, checksums; says how much it is.

    out: a folder that is new or empty; it is there as a whole or not at all. `ultra.load` reads it, and a run may begin
    with it (training.init_from). Raises UserError for ternary weights, or where `out` cannot be written.
    """
    out = Path(out)
    if checkpoint.is_ternary(pipeline.folder):
        raise UserError(f"{pipeline.folder}: its weights are ternary; export the run that it came from")
    disk_bytes = write_folder(out, pipeline, checkpoint.model_tensors(pipeline.model), checkpoint.WEIGHTS)
    return f"{out}: {disk_bytes / 2**20:.1f} MiB on disk"


def write_folder(out: Path, pipeline: Pipeline, tensors: dict[str, Tensor], form: str) -> int:
    """The folder `out`, through a temporary one beside it; its bytes. Raises UserError."""
    texts = {"config.yaml": pipeline.cfg.to_yaml(), "tokenizer.json": pipeline.vocabulary.tokenizer.to_str()}
    temporary = out.parent / f".tmp-{out.name}"
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: already there; name a folder that is new or empty")
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        try:
            checkpoint.write(temporary, {"model.safetensors": tensors}, texts, form)
            if out.exists():
                out.rmdir()
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return sum(file.stat().st_size for file in out.iterdir())
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
