from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """main() of the script, imported as `python tests/check_quickstart.py` does."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return runpy.run_path(str(Path(__file__).with_name("check_quickstart.py")))["main"]


def test_a_run_that_learned_too_little(
    check: Callable[[list[str]], int], tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check([str(tiny_run)]) == 1
    out, err = capsys.readouterr()
    last = json.loads((tiny_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['eval_loss']:.4f}" in out
    assert err.count("FAILED:") == 2
    assert f"held-out loss {last['eval_loss']:.4f} is above 5.9" in err
    assert "at least 0.6" in err


def test_metrics_of_other_weights_are_noticed(
    check: Callable[[list[str]], int], tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    row = {**json.loads(lines[-1]), "eval_loss": 4.5}
    (run / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(row), ""]))
    assert check([str(run)]) == 1
    assert "metrics.jsonl says 4.5000" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["no run", "unfinished"])
def test_what_is_not_a_finished_run(
    check: Callable[[list[str]], int],
    end: str,
    tiny_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    if end == "unfinished":
        shutil.copytree(tiny_run, run)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        (run / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert check([str(run)]) == 1
    assert "finished" in capsys.readouterr().err


def test_it_asks_for_one_folder(check: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert check([]) == 2
    assert "RUN_DIR" in capsys.readouterr().err
