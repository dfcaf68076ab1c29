"""What setup.py makes of the environment, without building anything."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

setuptools = pytest.importorskip("setuptools")
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def script(monkeypatch):
    """setup.py's functions by name."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    for name in ("ULTRA_CUDA_ARCHS", "ULTRA_SKIP_CUDA", "ULTRA_BUILD_DIR", "CUDA_HOME", "CXX", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A toolkit of CUDA 12.9 that CUDA_HOME names."""
    file = tmp_path / "bin" / "nvcc"
    file.parent.mkdir()
    file.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.1'\n")
    file.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return file


@pytest.mark.parametrize(
    ("asked", "archs"),
    [
        ("", ["sm_80", "sm_90a", "compute_90"]),
        ("86", ["sm_86"]),
        ("8.0;9.0a", ["sm_80", "sm_90a"]),
        ("sm_80, compute_80", ["sm_80", "compute_80"]),
        ("8.6+PTX 8.6", ["sm_86", "compute_86"]),
        ("10.0;120f;", ["sm_100", "sm_120f"]),
    ],
)
def test_architectures(asked, archs, script, monkeypatch):
    monkeypatch.setenv("ULTRA_CUDA_ARCHS", asked)
    assert script["cuda_archs"]() == archs


@pytest.mark.parametrize("asked", ["ampere", "80;x", "8", "sm_", "80+ptx"])
def test_what_is_no_architecture(asked, script, monkeypatch):
    monkeypatch.setenv("ULTRA_CUDA_ARCHS", asked)
    with pytest.raises(SystemExit, match=r"is no architecture; allowed are sm_80, 80 or 8\.0"):
        script["cuda_archs"]()


def test_the_default_serves_every_gpu_since_ampere(script):
    from ultra_kernels._cuda import serves

    for gpu in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]:
        assert any(serves(arch, gpu) for arch in script["cuda_archs"]()), gpu
    assert not any(serves(arch, (7, 5)) for arch in script["cuda_archs"]())


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_every_cuda_source_is_compiled_for_every_architecture(script, nvcc, monkeypatch, tmp_path):
    monkeypatch.setenv("ULTRA_CUDA_ARCHS", "sm_80;compute_90")
    described, rules = script["plan_cuda"](tmp_path / "libultra_cuda.so")
    assert described == {"nvcc": str(nvcc), "release": "12.9", "archs": ["sm_80", "compute_90"]}
    flags = [line for line in rules if line.startswith("build") and "compile_cuda" in line]
    assert len(flags) == len(list((ROOT / "csrc").glob("*/*_cuda.cu"))) >= 3
    for line in flags:
        assert "arch=compute_80,code=sm_80" in line and "arch=compute_90,code=compute_90" in line
        assert '-DULTRA_ARCHS="sm_80 compute_90"' in line
    assert any("-cudart static" in line and "--exclude-libs=ALL" in line for line in rules)


def test_a_named_compiler_is_also_that_of_nvcc(script, nvcc, monkeypatch, tmp_path):
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("CXX", compiler)
    assert f"cuda = {nvcc} -ccbin {compiler}" in script["plan_cuda"](tmp_path / "x.so")[1]


def test_no_cuda_for_a_reason(script, nvcc, monkeypatch, tmp_path):
    with pytest.raises(script["NotBuilt"]) as skipped:
        monkeypatch.setenv("ULTRA_SKIP_CUDA", "1")
        script["plan_cuda"](tmp_path / "x.so")
    assert skipped.value.info["state"] == "skipped"
    monkeypatch.delenv("ULTRA_SKIP_CUDA")
    nvcc.unlink()
    with pytest.raises(script["NotBuilt"]) as absent:
        script["plan_cuda"](tmp_path / "x.so")
    assert absent.value.info["state"] == "absent" and f"CUDA_HOME={tmp_path} has no bin/nvcc" in str(absent.value)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(script["NotBuilt"]) as failed:
        script["plan_cuda"](tmp_path / "x.so")
    assert failed.value.info["state"] == "failed" and "tried: /bin/false" in str(failed.value)


@pytest.mark.parametrize(
    ("message", "fix"),
    [
        ("fatal error: Python.h: No such file or directory", "apt-get install python3-dev"),
        ("#error -- unsupported GNU version! gcc versions later than 15", "CXX=g++-13 pip install"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_90a'", "ULTRA_CUDA_ARCHS=sm_80 pip install"),
        ("cannot find -lcudart_static: No such file", "the CUDA runtime's static library"),
        ("fatal error: cuda_runtime.h: No such file or directory", "the CUDA runtime's headers"),
        ("error: expected ';'", "mend what the compiler says above, then install again"),
    ],
)
def test_remedies(message, fix, script):
    assert fix in script["remedy"](message)


def test_kept_objects_of_kernels_do_not_depend_on_where_pip_puts_pybind11(script, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/bin/true")
    monkeypatch.setitem(sys.modules, "ninja", SimpleNamespace(BIN_DIR="/bin"))
    monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(get_include=lambda: "/somewhere/new"))
    _, lines = script["plan_cpp"](tmp_path / "library.so")
    of = [line for line in lines if "/somewhere/new" in line]
    assert len(of) == 1 and of[0].startswith("build bindings.o:")
