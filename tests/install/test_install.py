"""`pip install .` in fresh virtual environments: with a compiler, without one, from the sdist. Needs the package index.

The environments have no packages but ours; torch and the rest come from the environment that runs the tests.
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
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
EXTENSION = f"ultra_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "runs", "temp_data", "__pycache__", "*.so", "*.egg-info",
                                  "_build_info.json")  # fmt: skip
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="the C++ is not built on Windows")]


def source(folder: Path) -> Path:
    """A clean copy of the source, with the leftovers of an older build planted into it."""
    tree = folder / "source"
    shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
    for stale in ("build/lib/ultra_kernels/stale.py", f"build/lib.linux-x86_64-cpython-311/{EXTENSION}",
                  "build/lib/ultra/stale.py", "build/obj/stale.o"):  # fmt: skip
        (tree / stale).parent.mkdir(parents=True, exist_ok=True)
        (tree / stale).write_text("raise SystemExit('stale')\n")
    return tree


class Environment:
    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=True)
        self.python = folder / "bin" / "python"
        self.bin = folder / "bin"
        site = self.run("-c", "import sysconfig; print(sysconfig.get_paths()['platlib'])").stdout.strip()
        self.site = Path(site)
        (self.site / "borrowed.pth").write_text(f"{sysconfig.get_paths()['platlib']}\n")

    def run(self, *arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
        for name in ("PYTHONPATH", "ULTRA_BACKEND"):
            env.pop(name, None)
        return subprocess.run([str(self.python), *arguments], env=env, cwd="/", capture_output=True, text=True)

    def install(self, what: Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "pip", "install", "--no-deps", "--no-cache-dir", str(what), **environment)

    def files(self) -> set[str]:
        """What the installed wheel brought, without metadata and byte code."""
        record = next(self.site.glob("ultra-*.dist-info/RECORD"))
        names = {line.split(",")[0] for line in record.read_text().splitlines()}
        return {n for n in names if n.startswith(("ultra/", "ultra_kernels/")) and not n.endswith(".pyc")}

    def build_info(self) -> dict[str, object]:
        info: dict[str, object] = json.loads((self.site / "ultra_kernels" / "_build_info.json").read_text())
        return info

    def doctor(self) -> tuple[int, str]:
        done = self.run(
            "-c", "from ultra.doctor import report; text, code = report(); print(text); raise SystemExit(code)"
        )
        return done.returncode, done.stdout + done.stderr


def expected_files() -> set[str]:
    """What a wheel without the C++ library holds."""
    tops = [ROOT / "ultra", ROOT / "ultra_kernels"]
    found = [p for top in tops for pattern in ("*.py", "py.typed") for p in top.rglob(pattern)]
    presets = {f"ultra/presets/{p.name}" for p in (ROOT / "configs").glob("*.yaml")}
    return {str(p.relative_to(ROOT)) for p in found} | presets | {"ultra_kernels/_build_info.json"}


def test_with_a_compiler(tmp_path):
    environment = Environment(tmp_path / "env")
    done = environment.install(source(tmp_path), ULTRA_REQUIRE_EXT="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert environment.files() == expected_files() | {EXTENSION}
    assert environment.build_info()["cpp"]["state"] == "built"
    code, text = environment.doctor()
    assert code == 0 and str(environment.site / EXTENSION) in text and "which copy    installed" in text, text
    ran = environment.run("-c", "import torch, ultra_kernels as u; x = torch.ones(2, 3);"
                          "print(u.derf(x, *torch.ones(2, 1), *torch.ones(2, 3), backend='native'))")  # fmt: skip
    assert ran.returncode == 0, ran.stderr


def test_without_a_compiler(tmp_path):
    environment = Environment(tmp_path / "env")
    done = environment.install(source(tmp_path), CXX="/bin/false", PATH=str(environment.bin))
    assert done.returncode == 0, done.stdout + done.stderr
    assert environment.files() == expected_files()
    info = environment.build_info()
    assert info["cpp"] == "failed" and info["reason"] == "no working C++ compiler (tried: /bin/false)"
    code, text = environment.doctor()
    assert code == 1 and str(info["reason"]) in text and "install g++ or clang++" in text, text
    ran = environment.run("-c", "import torch, ultra_kernels as u; x = torch.ones(2, 3);"
                          "print(u.derf(x, *torch.ones(2, 1), *torch.ones(2, 3)))")  # fmt: skip
    assert ran.returncode == 0, ran.stderr


def test_a_required_extension_that_does_not_build_is_an_error(tmp_path):
    environment = Environment(tmp_path / "env")
    done = environment.install(source(tmp_path), CXX=None, PATH=str(environment.bin), ULTRA_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert "ULTRA_REQUIRE_EXT=1 and the C++ build failed" in done.stdout + done.stderr
    assert "tried: c++, g++, clang++" in done.stdout + done.stderr
    assert not (environment.site / "ultra_kernels").exists()


def test_the_sdist_has_all_that_a_wheel_needs(tmp_path):
    environment, tree = Environment(tmp_path / "env"), source(tmp_path)
    build = f"import setuptools.build_meta as b, os; os.chdir(r'{tree}'); print(b.build_sdist(r'{tmp_path}'))"
    tools = environment.run("-m", "pip", "install", "--quiet", "setuptools>=77", "pybind11>=2.13", "ninja>=1.11")
    assert tools.returncode == 0, tools.stderr
    done = environment.run("-c", build)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    assert {"setup.py", "pyproject.toml", "csrc/bindings.cpp", "csrc/common/simd.h", "configs/mini.yaml"} <= names
    assert not any("stale" in name for name in names)
    wheels = tmp_path / "wheels"
    made = environment.run("-m", "pip", "wheel", "--no-deps", "--no-cache-dir", "-w", str(wheels), str(archive),
                           ULTRA_REQUIRE_EXT="1")  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = wheels.glob("*.whl")
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith(("ultra/", "ultra_kernels/"))}
    assert inside == expected_files() | {EXTENSION}
