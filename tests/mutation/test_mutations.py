"""The list of mutations fits the code (fast); every mutation turns its tests red (slow)."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from mutations import MUTATIONS  # noqa: E402
from run import ROOT, main, stale  # noqa: E402


def test_every_entry_fits_the_code() -> None:
    assert not (problems := stale(MUTATIONS)), "\n".join(problems)
    assert len(set(MUTATIONS)) == len(MUTATIONS)
    for tests in {m.tests for m in MUTATIONS}:
        files = [word for word in shlex.split(tests) if word.startswith("tests/")]
        assert files and all((ROOT / file).is_file() for file in files), tests


def test_a_stale_entry_is_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("run.MUTATIONS", [MUTATIONS[0]._replace(old="no such text")])
    assert main([]) == 1
    assert "'no such text' occurs 0 times" in capsys.readouterr().err


@pytest.mark.slow
def test_every_kernel_is_mutated() -> None:
    """Definitions and kernels alike; which backends exist is read from the tree."""
    kernels = [
        *ROOT.glob("ultra_kernels/*/reference.py"),
        *ROOT.glob("csrc/*/*_cpu.cpp"),
        *ROOT.glob("csrc/*/*_cuda.cu"),
    ]
    kernels += [p for p in ROOT.glob("ultra_kernels/**/*triton*.py") if "@triton.jit" in p.read_text(encoding="utf-8")]
    mutated = {m.file for m in MUTATIONS}
    missing = [str(p.relative_to(ROOT)) for p in kernels if str(p.relative_to(ROOT)) not in mutated]
    assert [p for p in missing if not re.search(r"csrc/common/", p)] == []


@pytest.mark.slow
def test_every_mutation_is_noticed() -> None:
    done = subprocess.run([sys.executable, str(HERE / "run.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
