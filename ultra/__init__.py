"""Pre-training of hybrid masked-language-model encoders that one YAML file describes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Literal

    from ultra.inference import Pipeline

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(path: str | Path, which: Literal["latest", "best"] = "latest") -> Pipeline:
    """A trained model for `.fill_mask`, `.embed` and `.evaluate`.

    path: a run folder or one of its checkpoints. which: of a run folder, the newest whole checkpoint, or the one with
    the lowest held-out loss. Raises UserError where there is no whole checkpoint.
    """
    from ultra import inference  # torch is imported with it

    return inference.load(path, which)
