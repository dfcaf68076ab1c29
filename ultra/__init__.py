"""Pre-training of hybrid masked-language-model encoders that one YAML file describes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from ultra.inference import Pipeline

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(path: str | Path) -> Pipeline:
    """A trained model for `.fill_mask`, `.embed` and `.evaluate`: a run folder or one of its checkpoints."""
    from ultra import inference  # torch is imported with it

    return inference.load(path)
