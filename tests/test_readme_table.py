"""The op × backend table of README.md is the one that the code gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tool(bench_module):
    return bench_module("table")


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
    assert tool.updated(text) == f"# a\n{tool.BEGIN}\n{tool.table()}\n\n{tool.speed()}\n{tool.END}\nz"
    with pytest.raises(ValueError, match="ops:begin"):
        tool.updated("# nothing")


def test_speed_without_results(tool, tmp_path):
    assert tool.speed(tmp_path) == "No op has been timed on a GPU yet; `bench/gpu_check.sh` does it."


def test_speed_of_a_card(tool, tmp_path):
    """The least time of training chooses the backend; a mode or an op that nobody measured says so."""
    about = {"machine": "NVIDIA X", "gpu": True, "torch": "2.11.0", "triton": "3.6.0", "commit": "abc"}
    size = {"bytes": 1e6, "flops": 1e6, "limit": "copy", "limit_ms": 0.5, "device": "cuda"}

    def cell(op, backend, dtype, mode, ms):
        return about | size | {"op": op, "case": "T8", "backend": backend, "dtype": dtype, "mode": mode, "ms": ms}

    cells = [
        cell("dyt", "triton", "bfloat16", "forward", 2.0),
        cell("dyt", "triton", "bfloat16", "training", 4.0),
        cell("dyt", "reference", "bfloat16", "forward", 1.0),
        cell("dyt", "reference", "bfloat16", "training", 10.0),
        cell("dyt", "torch.compile", "bfloat16", "training", 0.1),  # not a backend of ours
        cell("dyt", "triton", "float32", "training", 0.1),
        cell("rotary", "reference", "float32", "forward", 1.0),
    ]
    (tmp_path / "nvidia-x.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cells))
    lines = tool.speed(tmp_path).splitlines()
    assert lines[0].startswith("On NVIDIA X with torch 2.11.0 and Triton 3.6.0, commit abc")
    assert "| `dyt` | T8 | triton | 2.000 | 25% | 0.5 |  | 4.000 | 12% | 2.5 |  |" in lines
    assert "| `rotary` | T8 | reference | 1.000 | 50% |  |  | not measured |  |  |  |" in lines
    assert any(line.startswith("| `moe_ffn` | not measured |") for line in lines)
    assert {line.count("|") for line in lines[2:]} == {12}


def test_speed_of_a_processor_and_its_peers(tool, tmp_path):
    """float32, the threads, and the fastest peer; the sentence that no GPU was timed stays."""
    about = {"machine": "CPU X", "gpu": False, "threads": 2, "torch": "2.13.0", "triton": None, "commit": "abc"}
    size = {"bytes": 1e6, "flops": 1e6, "limit": "exp", "limit_ms": 0.5, "device": "cpu", "dtype": "float32"}
    times = {"native": 1.0, "reference": 9.0, "loop": 4.0, "mamba-ssm": 3.0}
    cells = [
        about | size | {"op": "selective_scan", "case": "T8", "backend": b, "mode": "forward", "ms": ms}
        for b, ms in times.items()
    ]
    (tmp_path / "cpu-x.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cells))
    text = tool.speed(tmp_path)
    assert text.startswith("No op has been timed on a GPU yet") and "On CPU X, 2 threads with" in text
    row = "| `selective_scan` | T8 | native | 1.000 | 50% | 9.0 | 3.0 mamba-ssm | not measured |  |  |  |"
    assert row in text.splitlines()
