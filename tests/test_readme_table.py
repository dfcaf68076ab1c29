"""The op × backend table of README.md is the one that the code gives."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("bench_table", ROOT / "bench" / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_is_up_to_date(tool):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tool.updated(text) == text, "run: python -m bench.table"


def test_every_op_and_its_backends_are_in_the_table(tool):
    from ultra_kernels._dispatch import OPS

    lines = tool.table().splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == sorted(OPS)
    row = next(line for line in lines if "`dyt`" in line)
    columns = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    has = dict(zip(columns, (cell.strip() for cell in row.split("|")[1:-1]), strict=True))
    assert has["C++ (CPU)"] == has["Triton (NVIDIA)"] == "✓"


def test_text_around_the_markers_is_kept_and_markers_are_needed(tool):
    text = f"# a\n{tool.BEGIN}\nold\n{tool.END}\nz"
    assert tool.updated(text) == f"# a\n{tool.BEGIN}\n{tool.table()}\n{tool.END}\nz"
    with pytest.raises(ValueError, match="ops:begin"):
        tool.updated("# nothing")
