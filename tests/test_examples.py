from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_call_one_op(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "call_one_op.py"))
    out = capsys.readouterr().out
    assert "y (1, 8, 12), gradient of u (1, 8, 12)" in out
    # float32 sums of at most 7 steps: 1e-5 is a hundred roundings of numbers of order 1
    assert float(out.split("alone: ")[1].split()[0]) < 1e-5
    assert "reference  runs" in out


def test_train_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "train_from_python.py"))["main"]
    assert main(2, tmp_path) == 0
    out = capsys.readouterr().out
    assert "embeddings (2, 192)" in out
    assert "'eval_mask_loss'" in out
    assert (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").is_file()
