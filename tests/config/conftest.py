from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The sample file of the documented format, its alternatives (a|b) left in.
SAMPLE = (Path(__file__).parent / "sample.yaml").read_text(encoding="utf-8")


@pytest.fixture
def sample() -> str:
    """The documented sample with the first alternative picked everywhere."""
    return re.sub(r"(\w+)(\|\w+)+", r"\1", SAMPLE)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """Write the text to a file named cfg.yaml; returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "cfg.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write
