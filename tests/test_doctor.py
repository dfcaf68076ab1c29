"""`ultra doctor` says what runs and why, and survives whatever is broken."""

from __future__ import annotations

import builtins
import importlib.metadata
import subprocess
import sys

import pytest

import ultra_kernels
from ultra import doctor
from ultra_kernels import _native
from ultra_kernels._dispatch import OPS


def test_every_op_and_backend_is_listed():
    text, code = doctor.report()
    for name, op in OPS.items():
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        assert all(backend in line for backend in op.names)
    assert f"version       {ultra_kernels.__version__}" in text
    assert (code == 0) == ("!" not in [line[:1] for line in text.splitlines()])


@pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))
def test_a_working_library_is_described():
    text, _ = doctor.report()
    module = _native.load()
    assert str(module.__file__) in text and f"{module.isa()} in use" in text


def test_a_missing_library_is_a_problem_with_its_reason_and_remedy(monkeypatch):
    monkeypatch.setattr(_native, "missing", lambda: "no working C++ compiler (tried: c++)")
    monkeypatch.setattr(_native, "build_info", lambda: {"cpp": "failed", "fix": "install g++"})
    text, code = doctor.report()
    assert code == 1
    assert "! C++ library   no working C++ compiler (tried: c++)\n  to mend       install g++" in text
    assert "1 problem: see the lines with !" in text


def test_a_broken_part_does_not_hide_the_others(monkeypatch):
    def broken(*args):
        raise OSError("disk on fire")

    monkeypatch.setattr(_native, "missing", broken)
    monkeypatch.setattr(ultra_kernels, "available", broken)
    text, code = doctor.report()
    assert code == 1 and text.count("OSError: disk on fire") == 2
    assert "Optional extras" in text and "2 problems" in text


def test_no_torch(monkeypatch):
    real = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch" or name.startswith("ultra_kernels"):
            raise ImportError("No module named 'torch'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    text, code = doctor.report()
    assert code == 1 and "! torch         No module named 'torch'\n  to mend       pip install torch" in text


def test_a_gpu_that_torch_does_not_see_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: ["NVIDIA X, 999.1"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    text, code = doctor.report()
    assert code == 1 and "NVIDIA X, 999.1" in text and "install a CUDA build of torch" in text


def test_which_copy_runs(monkeypatch, tmp_path):
    class Elsewhere:
        version = ultra_kernels.__version__

        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Elsewhere())
    assert f"source folder; {tmp_path.resolve() / 'ultra_kernels'} is installed too" in doctor.report()[0]
    Elsewhere.version = "0.0.0"
    text, code = doctor.report()
    assert code == 1 and "version 0.0.0 is installed" in text

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_installed)
    assert "source folder; nothing is installed" in doctor.report()[0]


def test_extras_are_read_from_the_metadata(monkeypatch):
    lines = [
        "torch>=2.10",
        "pytest>=8; extra == 'test'",
        'no-such-package>=1; extra == "hf"',
        "ultra[test]; extra == 'dev'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    text, _ = doctor.report()
    assert "[test]        complete" in text
    assert "[hf]          without no-such-package: pip install '.[hf]' in the clone" in text


def test_the_module_imports_nothing_heavy():
    code = "import sys, ultra.doctor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
