"""`ultra doctor` says what runs and why, and survives whatever is broken."""

from __future__ import annotations

import builtins
import importlib.metadata
import subprocess
import sys

import pytest

import ultra_kernels
from ultra import doctor
from ultra_kernels import _cuda, _native
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
    monkeypatch.setattr(_native, "build_info", lambda library: {"state": "failed", "fix": "install g++"})
    monkeypatch.setitem(doctor.SECTIONS, "CUDA library", lambda section: None)
    text, code = doctor.report()
    assert code == 1
    assert "! C++ library   no working C++ compiler (tried: c++)\n  to mend       install g++" in text
    assert "1 problem: see the lines with !" in text


GPU = ["NVIDIA X, 999.1"]


@pytest.mark.parametrize(
    ("gpus", "info", "problems"),
    [
        ([], {"state": "absent", "reason": "no nvcc", "fix": "get nvcc"}, 0),
        ([], {"state": "skipped", "reason": "skipped", "fix": "unset it"}, 0),
        (GPU, {"state": "skipped", "reason": "skipped", "fix": "unset it"}, 0),
        (GPU, {"state": "absent", "reason": "no nvcc", "fix": "get nvcc"}, 1),
        ([], {"state": "failed", "reason": "line 1\nline 2", "fix": "get g++"}, 1),
        (GPU, {}, 1),
    ],
)
def test_a_missing_cuda_library_is_a_problem_where_it_would_have_run_or_been_built(gpus, info, problems, monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: gpus)
    monkeypatch.setattr(_native, "build_info", lambda library: info)
    monkeypatch.setattr(_cuda, "missing", lambda: info.get("reason", "not built"))
    section = doctor.Section()
    doctor.cuda_library(section)
    text = "\n".join(section.lines)
    assert section.problems == problems
    assert info.get("reason", "not built").splitlines()[-1] in text
    assert info.get("fix", "pip install . with CUDA's nvcc on the PATH") in text


@pytest.mark.parametrize(
    ("obstacle", "line"),
    [
        (None, "  GPU 0         NVIDIA X, sm_75: a test kernel ran"),
        (("wrong arch", "mend it"), "! GPU 0         NVIDIA X, sm_75: wrong arch\n  to mend       mend it"),
    ],
)
def test_a_cuda_library_is_described_with_what_each_gpu_says_of_it(obstacle, line, monkeypatch):
    class Library:
        _name = "/somewhere/libultra_cuda.so"
        ultra_cuda_runtime, ultra_cuda_driver = staticmethod(lambda: 13000), staticmethod(lambda: 12080)

    monkeypatch.setattr(_cuda, "missing", lambda: None)
    monkeypatch.setattr(_cuda, "load", Library)
    monkeypatch.setattr(_cuda, "archs", lambda: ["sm_80", "compute_90"])
    monkeypatch.setattr(_cuda, "obstacle", lambda index: obstacle)
    for name, value in {"is_available": True, "device_count": 1, "get_device_name": "NVIDIA X"}.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *a, _value=value: _value)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (7, 5))
    section = doctor.Section()
    doctor.cuda_library(section)
    text = "\n".join(section.lines)
    assert line in text and section.problems == (obstacle is not None)
    assert "sm_80, compute_90" in text and "CUDA 13.0" in text and "for CUDA 12.8" in text


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
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: GPU)
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
