"""Builds csrc/ into ultra_kernels/_C: C++ for several instruction sets, chosen at run time. Never imports torch.

Without a working compiler the install still succeeds: the reason goes into `_build_info.json`, which `ultra doctor`
prints. `ULTRA_REQUIRE_EXT=1` makes a failed build an error; `MAX_JOBS` limits parallel compilers (default: all cores).
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# One object file per source and instruction set; the namespace name is the one that csrc/common/isa.h declares.
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = {"baseline": []}
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx512bf16",
                      "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"]  # fmt: skip
# -fno-math-errno and friends are safe; -ffast-math is not used: it would break NaN and infinity.
CXXFLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]


class FreshBuild(build):
    """Builds in a temporary folder, so that nothing of an older build can get into a wheel."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_base = tempfile.mkdtemp(prefix="ultra-build-")


class NativeBuild(build_ext):
    def run(self) -> None:
        target = ROOT / "ultra_kernels" if self.inplace else Path(self.build_lib) / "ultra_kernels"
        target.mkdir(parents=True, exist_ok=True)
        library = target / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        library.unlink(missing_ok=True)
        info: dict[str, object] = {"python": sys.version.split()[0], "machine": platform.machine()}
        try:
            info |= {"cpp": "built", **self.compile(library)}
        except BuildFailed as failure:
            if os.environ.get("ULTRA_REQUIRE_EXT") == "1":
                raise SystemExit(f"ULTRA_REQUIRE_EXT=1 and the C++ build failed: {failure}") from failure
            info |= {"cpp": "failed", "reason": str(failure), "fix": failure.fix}
        (target / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def compile(self, library: Path) -> dict[str, object]:
        compiler = find_compiler()
        work = Path(tempfile.mkdtemp(prefix="ultra-obj-")) if not self.inplace else ROOT / "build" / "obj"
        work.mkdir(parents=True, exist_ok=True)
        ninja_file, openmp = write_ninja(work, library, compiler)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        done = subprocess.run([find_ninja(), "-f", str(ninja_file), "-j", jobs], cwd=work, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        if done.returncode != 0:
            raise BuildFailed("\n".join(done.stdout.splitlines()[-20:]), "read the compiler's message above")
        if not self.inplace:
            shutil.rmtree(work)
        return {"compiler": shlex.join(compiler), "flags": CXXFLAGS, "isas": list(ISAS), "openmp": openmp}


class BuildFailed(Exception):
    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.fix = fix


def find_compiler() -> list[str]:
    """The C++ compiler as a command, proven by compiling an empty program; raises BuildFailed with the remedy."""
    fix = (
        "install g++ or clang++ (Debian/Ubuntu: apt-get install g++; macOS: xcode-select --install), then install again"
    )
    if platform.system() == "Windows":
        raise BuildFailed("the C++ kernels are not built on Windows; every op runs its PyTorch reference", "use WSL")
    asked = os.environ.get("CXX")
    for candidate in [asked] if asked else ["c++", "g++", "clang++"]:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]) and accepts(command, ["-std=c++17"], "int main() { return 0; }"):
            return command
    tried = asked or "c++, g++, clang++"
    raise BuildFailed(f"no working C++ compiler (tried: {tried})", fix)


def find_ninja() -> str:
    try:
        from ninja import BIN_DIR

        return str(Path(BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
    if found is None:
        raise BuildFailed("ninja is missing", "pip install ninja, or install without --no-build-isolation")
    return found


def accepts(compiler: list[str], flags: list[str], program: str) -> bool:
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0


def write_ninja(work: Path, library: Path, compiler: list[str]) -> tuple[Path, bool]:
    """Writes build.ninja: every csrc/<op>/<op>_cpu.cpp once per instruction set, bindings.cpp once, one library."""
    import pybind11

    openmp = platform.system() == "Linux" and accepts(compiler, ["-fopenmp"], "#include <omp.h>\nint main() {}")
    flags = CXXFLAGS + (["-fopenmp"] if openmp else [])
    includes = [f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    version = (ROOT / "ultra_kernels" / "_version.py").read_text().split('"')[-2]
    # OpenMP symbols stay undefined on purpose: they resolve to the runtime that torch has loaded, so that both share
    # one pool of threads. Two runtimes spin against each other on the same cores.
    link = ["-shared"] + (["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else [])
    lines = [
        f"cxx = {shlex.join(compiler)}",
        "rule cc",
        "  command = $cxx $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {shlex.join(link)} $in -o $out",
    ]
    objects = []

    def add(source: Path, name: str, extra: list[str]) -> None:
        objects.append(f"{name}.o")
        lines.append(f"build {name}.o: cc {ninja_path(source)}\n  flags = {shlex.join(flags + includes + extra)}")

    for source in sorted(CSRC.glob("*/*_cpu.cpp")):
        for isa, isa_flags in ISAS.items():
            add(source, f"{source.stem}.{isa}", [f"-DULTRA_ISA={isa}", f"-DULTRA_ISA_{isa.upper()}", *isa_flags])
    add(CSRC / "bindings.cpp", "bindings", [f'-DULTRA_VERSION="{version}"'])
    lines.append(f"build {ninja_path(library.resolve())}: link {' '.join(objects)}")
    path = work / "build.ninja"
    path.write_text("\n".join(lines) + "\n")
    return path, openmp


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    cmdclass={"build": FreshBuild, "build_ext": NativeBuild},
    ext_modules=[Extension("ultra_kernels._C", sources=[])],  # makes the wheel platform-specific; NativeBuild builds it
    packages=[
        *sorted(
            ".".join(p.parent.relative_to(ROOT).parts)
            for top in ("ultra", "ultra_kernels")
            for p in (ROOT / top).rglob("__init__.py")
        ),
        "ultra.presets",
    ],
    package_dir={"ultra.presets": "configs"},
)
