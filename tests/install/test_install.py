"""The sdist installed by pip where there is a compiler and nvcc, a compiler, neither, and an nvcc that fails.

In each setting the install succeeds, `ultra doctor` names what is missing and what mends it, and op tests pass on what
was installed. Needs the package index for build tools; torch and the rest come from the environment that runs this.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CPP, CUDA = f"ultra_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}", "ultra_kernels/libultra_cuda.so"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "runs", "temp_data", "__pycache__", "*.so", "*.egg-info",
                                  "_build_info.json")  # fmt: skip
OP_TESTS = ["tests/ops/test_dispatch.py", "tests/ops/test_derf.py", "tests/ops/test_simd.py"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the settings are made with the tools of Linux"),
]

# A compiler that keeps its objects: the settings differ in what setup.py finds, not in what g++ makes of the C++.
CACHING_COMPILER = f"""#!{sys.executable}
import pathlib, shutil, subprocess, sys

arguments = sys.argv[1:]
run = lambda: subprocess.run([{shutil.which("c++")!r}, *arguments]).returncode
if "-c" not in arguments:
    sys.exit(run())
out = arguments[arguments.index("-o") + 1]  # named after source and instruction set
kept = pathlib.Path(__file__).parent / "objects" / out
if not kept.exists():
    if code := run():
        sys.exit(code)
    shutil.copy(out, kept)
else:
    shutil.copy(kept, out)
    pathlib.Path(out + ".d").write_text(out + ":")
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Environment:
    """A virtual environment whose only package is ours, one install after the other."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "env", with_pip=True)
        self.bin = folder / "env" / "bin"
        self.python = self.bin / "python"
        site = self.run("-c", "import sysconfig; print(sysconfig.get_paths()['platlib'])").stdout.strip()
        self.site = Path(site)
        (self.site / "borrowed.pth").write_text(f"{sysconfig.get_paths()['platlib']}\n")
        self.tools = executable(folder / "tools" / "c++", CACHING_COMPILER).parent
        objects = self.tools / "objects"
        objects.mkdir()
        # .ci/run has just compiled this source; that an sdist holds all of it is a test below
        for path in Path(os.environ.get("ULTRA_BUILD_DIR", "/none")).glob("*_cpu.*.o"):
            shutil.copy(path, objects)
        self.path = f"{self.tools}:{self.bin}:{os.environ['PATH']}"
        self.tests = folder / "tests-alone"  # without the packages beside them, so that the installed ones are tested
        shutil.copytree(ROOT / "tests", self.tests / "tests", ignore=LEFT_OUT)
        shutil.copy(ROOT / "pyproject.toml", self.tests)

    def run(self, *arguments: str, cwd: Path | str = "/", **environment: str) -> subprocess.CompletedProcess[str]:
        left_out = ("PYTHONPATH", "ULTRA_BACKEND", "ULTRA_BUILD_DIR", "CXX", "CUDA_HOME")
        env = {k: v for k, v in os.environ.items() if k not in left_out} | environment
        return subprocess.run([str(self.python), *arguments], env=env, cwd=cwd, capture_output=True, text=True)

    def install(self, what: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.run("-m", "pip", "uninstall", "-y", "ultra")
        environment = {"PATH": self.path, "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environment
        return self.run("-m", "pip", "install", "--no-deps", *options, str(what), **environment)

    def files(self) -> set[str]:
        """What the installed wheel brought, without metadata and byte code."""
        record = next(self.site.glob("ultra-*.dist-info/RECORD"))
        names = {line.split(",")[0] for line in record.read_text().splitlines()}
        return {n for n in names if n.startswith(("ultra/", "ultra_kernels/")) and not n.endswith(".pyc")}

    def build_info(self) -> dict[str, dict[str, str]]:
        info: dict[str, dict[str, str]] = json.loads((self.site / "ultra_kernels" / "_build_info.json").read_text())
        return info

    def doctor(self) -> tuple[int, str]:
        code = "from ultra.doctor import report; text, code = report(); print(text); raise SystemExit(code)"
        done = self.run("-c", code)
        return done.returncode, done.stdout + done.stderr

    def op_tests(self) -> None:
        done = self.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *OP_TESTS, cwd=self.tests, OMP_NUM_THREADS="1")
        assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("install"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the source, with the leftovers of an older build planted into it."""
    tree = tmp_path_factory.mktemp("source") / "source"
    shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
    for stale in ("build/lib/ultra_kernels/stale.py", f"build/lib.linux-x86_64-cpython-311/{CPP}",
                  "build/lib/ultra/stale.py", "build/obj/stale.o"):  # fmt: skip
        (tree / stale).parent.mkdir(parents=True, exist_ok=True)
        (tree / stale).write_text("raise SystemExit('stale')\n")
    return tree


@pytest.fixture(scope="module")
def sdist(environment: Environment, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    tools = environment.run("-m", "pip", "install", "--quiet", "setuptools>=77", "pybind11>=2.13", "ninja>=1.11")
    assert tools.returncode == 0, tools.stderr
    build = f"import setuptools.build_meta as b, os; os.chdir(r'{tree}'); print(b.build_sdist(r'{folder}'))"
    done = environment.run("-c", build)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = folder.glob("*.tar.gz")
    return archive


def expected_files() -> set[str]:
    """What a wheel without compiled libraries holds."""
    tops = [ROOT / "ultra", ROOT / "ultra_kernels"]
    found = [p for top in tops for pattern in ("*.py", "py.typed") for p in top.rglob(pattern)]
    presets = {f"ultra/presets/{p.name}" for p in (ROOT / "configs").glob("*.yaml")}
    return {str(p.relative_to(ROOT)) for p in found} | presets | {"ultra_kernels/_build_info.json"}


@dataclass(frozen=True)
class Setting:
    """compiled: the libraries in the wheel; doctor: its exit code, and what it says."""

    name: str
    compiled: set[str]
    doctor: int
    says: tuple[str, ...]
    isolated: bool = True
    nvcc: str = ""  # a script in place of nvcc
    without_compiler: bool = False
    without_cuda: bool = False
    needs_nvcc: bool = False

    def variables(self, environment: Environment, folder: Path) -> dict[str, str]:
        if self.without_compiler:
            return {"PATH": str(environment.bin), "CUDA_HOME": str(folder)}
        if self.without_cuda:
            return {"CUDA_HOME": str(folder)}
        if self.nvcc:
            return {"PATH": f"{executable(folder / 'nvcc', self.nvcc).parent}:{environment.path}"}
        return {}


TOO_NEW = "unsupported GNU version! gcc versions later than 15 are not supported!"
SETTINGS = [
    Setting("compiler and nvcc", {CPP, CUDA}, 0, ("sm_80, sm_90a, compute_90", "no NVIDIA driver"), needs_nvcc=True),
    Setting("compiler", {CPP}, 0, ("has no bin/nvcc", "install the CUDA toolkit"), isolated=False, without_cuda=True),
    Setting(
        "nothing",
        set(),
        1,
        ("no working C++ compiler (tried: c++, g++, clang++)", "apt-get install g++", "has no bin/nvcc"),
        without_compiler=True,
    ),
    Setting(
        "nvcc fails",
        {CPP},
        1,
        (TOO_NEW, "install an older g++ and name it, as in: CXX=g++-13 pip install"),
        nvcc=f"#!/bin/sh\necho '{TOO_NEW}'\nexit 1\n",
    ),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name.replace(" ", "-"))
def test_setting(setting: Setting, environment: Environment, sdist: Path, tmp_path: Path) -> None:
    if setting.needs_nvcc and NVCC is None:
        pytest.skip("nvcc is not installed")
    variables = setting.variables(environment, tmp_path)
    if setting.compiled == {CPP, CUDA}:
        variables["ULTRA_REQUIRE_EXT"] = "1"
    done = environment.install(sdist, *([] if setting.isolated else ["--no-build-isolation"]), **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert environment.files() == expected_files() | setting.compiled
    states = {name: part["state"] for name, part in environment.build_info().items()}
    assert states["cpp"] == ("built" if CPP in setting.compiled else "failed")
    assert states["cuda"] == ("built" if CUDA in setting.compiled else "failed" if setting.nvcc else "absent")
    code, text = environment.doctor()
    assert code == setting.doctor and "which copy    installed" in text, text
    for library in setting.compiled:
        assert str(environment.site / library) in text
    for words in setting.says:
        assert words in text, text
    environment.op_tests()


@pytest.mark.parametrize("setting", SETTINGS[2:], ids=lambda setting: setting.name.replace(" ", "-"))
def test_a_required_library_that_does_not_build_is_an_error(setting, environment, sdist, tmp_path):
    variables = setting.variables(environment, tmp_path)
    done = environment.install(sdist, "--no-build-isolation", ULTRA_REQUIRE_EXT="1", **variables)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "ULTRA_REQUIRE_EXT=1 and a library was not built" in said
    assert ("unsupported GNU version" if setting.nvcc else "tried: c++, g++, clang++") in said
    assert not (environment.site / "ultra_kernels").exists()


def test_a_bad_architecture_is_an_error_with_what_is_allowed(environment, sdist, tmp_path):
    nvcc = executable(tmp_path / "bin" / "nvcc", "#!/bin/sh\nexit 1\n")
    variables = {"ULTRA_CUDA_ARCHS": "sm_80;ampere", "CUDA_HOME": str(nvcc.parent.parent)}
    done = environment.install(sdist, "--no-build-isolation", **variables)
    assert done.returncode != 0
    assert "ULTRA_CUDA_ARCHS: 'ampere' is no architecture; allowed are sm_80, 80" in done.stdout + done.stderr


def test_the_sdist_has_all_that_a_wheel_and_the_tests_need(sdist):
    with tarfile.open(sdist) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    tests = [p for p in (ROOT / "tests").rglob("*") if p.suffix in (".py", ".yaml", ".json", ".h")]
    files = {str(p.relative_to(ROOT)) for p in [*sources, *tests]}
    assert files | {"setup.py", "pyproject.toml", "configs/mini.yaml"} <= names
    assert not any("stale" in name for name in names)


def test_in_place_and_skipped_cuda_and_kept_objects(environment, sdist, tree, tmp_path):
    def build() -> dict[str, int]:
        variables = {"PATH": environment.path, "ULTRA_SKIP_CUDA": "1", "ULTRA_BUILD_DIR": str(tmp_path)}
        done = environment.run("setup.py", "build_ext", "--inplace", cwd=tree, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.o")}

    first = build()
    os.utime(tree / "csrc" / "dyt" / "dyt_cpu.cpp")
    second = build()
    again = {name for name in second if second[name] != first[name]}
    assert again and all(name.startswith("dyt_cpu.") for name in again), again
    assert (tree / CPP).is_file() and not (tree / CUDA).exists()
    info = json.loads((tree / "ultra_kernels" / "_build_info.json").read_text())
    assert info["cuda"] == {"state": "skipped", "reason": "ULTRA_SKIP_CUDA=1 when this was installed",
                            "fix": "unset ULTRA_SKIP_CUDA, then install again: pip install --no-deps ."}  # fmt: skip
