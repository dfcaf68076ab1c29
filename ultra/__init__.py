"""Pre-training of hybrid masked-language-model encoders that one YAML file describes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Literal

    from ultra.inference import Pipeline

__version__ = "0.1.0"
__all__ = ["__version__", "load", "load_ternary"]


def load(path: str | Path, which: Literal["latest", "best"] = "latest") -> Pipeline:
    """A trained model for `.fill_mask`, `.embed` and `.evaluate`.

    path: a run folder, one of its checkpoints, or an export. which: of a run folder, the newest whole checkpoint, or
    the one with the lowest held-out loss. Raises UserError where there is no whole checkpoint.
    """
    from ultra import inference  # torch is imported with it

    return inference.load(path, which)


def load_ternary(path: str | Path, device: Literal["auto", "cpu", "cuda", "mps"] = "auto") -> Pipeline:
    """A model exported with ternary weights, for `.fill_mask`, `.embed` and `.evaluate`.

    path: a folder that `ultra export --format ternary` or `ultra.export.save_ternary` wrote. The matrices of BitNet
    stay at 2 bits a weight and are multiplied in integers; all else is float32 on every `device`, also after training
    in half precision. Raises UserError for a damaged folder or one of another kind; `ultra.load` takes any.
    """
    from ultra import inference

    return inference.load_ternary(path, device)
