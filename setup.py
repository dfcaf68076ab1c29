"""Builds csrc/: C++ into ultra_kernels/_C, CUDA C++ into ultra_kernels/libultra_cuda.so. Never imports torch.

The C++ is compiled for several instruction sets, chosen at run time; the CUDA C++ when nvcc is found, into a library of
its own, so that nvcc never costs the CPU kernels. Without a working compiler the install still succeeds: state, reason
and remedy of each library go into `_build_info.json`, which `ultra doctor` prints. Environment:

ULTRA_REQUIRE_EXT=1  a library that cannot be built is an error; the CUDA one counts where nvcc is found and not skipped
ULTRA_SKIP_CUDA=1    build no CUDA library
ULTRA_CUDA_ARCHS     what to compile for, such as "sm_86" or "80;90a;compute_90"; sm_ is machine code, compute_ PTX
CUDA_HOME            the toolkit to use; without it the one on the PATH, then /usr/local/cuda
CXX                  the C++ compiler, also for nvcc's host code
MAX_JOBS             compilers at a time; default all cores
ULTRA_BUILD_DIR      where objects are kept, so that the next install compiles only what changed; default a new folder
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
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
NVCCFLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
DEFAULT_ARCHS = ["sm_80", "sm_90a", "compute_90"]


class FreshBuild(build):
    """Builds in a temporary folder, so that nothing of an older build can get into a wheel."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_base = tempfile.mkdtemp(prefix="ultra-build-")


class NativeBuild(build_ext):
    def run(self) -> None:
        target = ROOT / "ultra_kernels" if self.inplace else Path(self.build_lib) / "ultra_kernels"
        target.mkdir(parents=True, exist_ok=True)
        libraries = {
            "cpp": (plan_cpp, target / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"),
            "cuda": (plan_cuda, target / "libultra_cuda.so"),
        }
        kept = os.environ.get("ULTRA_BUILD_DIR") or (ROOT / "build" / "obj" if self.inplace else None)
        work = Path(kept or tempfile.mkdtemp(prefix="ultra-obj-"))
        work.mkdir(parents=True, exist_ok=True)
        info: dict[str, dict[str, object]] = {}
        rules: list[str] = []
        for name, (plan, library) in libraries.items():
            library.unlink(missing_ok=True)
            try:
                described, lines = plan(library)
                info[name] = {"state": "built", **described}
                rules += lines
            except NotBuilt as error:
                info[name] = error.info
        (work / "build.ninja").write_text("\n".join(rules) + "\n")
        planned = [name for name, part in info.items() if part["state"] == "built"]
        if planned:
            ninja(work, "-k", "0")  # both libraries side by side, each as far as it goes
        for name in planned:  # what failed is asked for again, to tell whose message is whose
            done = ninja(work, str(libraries[name][1].resolve()))
            if done.returncode != 0:
                reason = "\n".join(done.stdout.splitlines()[-20:])
                info[name] |= NotBuilt("failed", reason, remedy(reason)).info
        if not kept:
            shutil.rmtree(work)
        failed = {name: part for name, part in info.items() if part["state"] == "failed"}
        if failed and os.environ.get("ULTRA_REQUIRE_EXT") == "1":
            reasons = "".join(f"\n{name}: {part['reason']}\nto mend: {part['fix']}" for name, part in failed.items())
            raise SystemExit(f"ULTRA_REQUIRE_EXT=1 and a library was not built{reasons}")
        (target / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


class NotBuilt(Exception):
    """Why a library is not built; state "failed", "skipped" (as asked) or "absent" (nothing to build it with)."""

    def __init__(self, state: str, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.info = {"state": state, "reason": reason, "fix": fix}


AGAIN = "then install again: pip install --no-deps ."
REMEDIES = {  # what a compiler says -> what helps
    "Python.h: No such file": f"install Python's headers (Debian/Ubuntu: apt-get install python3-dev), {AGAIN}",
    "unsupported GNU version": "install an older g++ and name it, as in: CXX=g++-13 pip install --no-deps .",
    "unsupported clang version": "install g++ and name it, as in: CXX=g++ pip install --no-deps .",
    "Unsupported gpu architecture": "name what this nvcc knows (nvcc --list-gpu-code), as in: "
    "ULTRA_CUDA_ARCHS=sm_80 pip install --no-deps .",
    "cannot find -lcudart": f"install the CUDA runtime's static library beside nvcc, {AGAIN}",
    "cuda_runtime.h: No such file": f"install the CUDA runtime's headers beside nvcc, {AGAIN}",
}


def remedy(message: str) -> str:
    found = next((fix for text, fix in REMEDIES.items() if text in message), None)
    return found or f"mend what the compiler says above, {AGAIN}"


def find_compiler() -> list[str]:
    """The C++ compiler as a command, proven by compiling an empty program; raises NotBuilt with the remedy."""
    if platform.system() == "Windows":
        reason = "the kernels are not built on Windows; every op runs its PyTorch reference"
        raise NotBuilt("absent", reason, "use WSL")
    asked = os.environ.get("CXX")
    for candidate in [asked] if asked else ["c++", "g++", "clang++"]:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]) and accepts(command, ["-std=c++17"], "int main() { return 0; }"):
            return command
    fix = "install g++ or clang++ (Debian/Ubuntu: apt-get install g++; macOS: xcode-select --install)"
    tried = asked or "c++, g++, clang++"
    raise NotBuilt("failed", f"no working C++ compiler (tried: {tried})", f"{fix}, {AGAIN}")


def accepts(compiler: list[str], flags: list[str], program: str) -> bool:
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next(filter(None, map(shutil.which, places)), None)
    if found is None:
        where = f"CUDA_HOME={home} has no bin/nvcc" if home else "no nvcc on the PATH or in /usr/local/cuda"
        fix = "install the CUDA toolkit (https://developer.nvidia.com/cuda-downloads), or set CUDA_HOME to where it is"
        raise NotBuilt("absent", f"{where}: the CUDA kernels were not built", f"{fix}, {AGAIN}")
    return found


def find_ninja() -> str:
    try:
        from ninja import BIN_DIR

        return str(Path(BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
    if found is None:
        raise NotBuilt("failed", "ninja is missing", "pip install ninja, or install without --no-build-isolation")
    return found


def ninja(work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    command = [find_ninja(), "-j", jobs, *arguments]
    return subprocess.run(command, cwd=work, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def version_define() -> str:
    version = (ROOT / "ultra_kernels" / "_version.py").read_text().split('"')[-2]
    return f'-DULTRA_VERSION="{version}"'


def plan_cpp(library: Path) -> tuple[dict[str, object], list[str]]:
    """Ninja's rules: every csrc/<op>/<op>_cpu.cpp once per instruction set, bindings.cpp once, one library."""
    compiler = find_compiler()
    find_ninja()
    try:
        import pybind11
    except ImportError:
        fix = "pip install pybind11, or install without --no-build-isolation"
        raise NotBuilt("failed", "pybind11 is missing", fix) from None
    openmp = platform.system() == "Linux" and accepts(compiler, ["-fopenmp"], "#include <omp.h>\nint main() {}")
    flags = CXXFLAGS + (["-fopenmp"] if openmp else [])
    flags.append(f"-I{CSRC}")
    # An isolated build has pybind11 in another folder each time: kept objects of kernels must not depend on it.
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    # OpenMP symbols stay undefined on purpose: they resolve to the runtime that torch has loaded, so that both share
    # one pool of threads. Two runtimes spin against each other on the same cores.
    link = ["-shared"] + (["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else [])
    rules = compile_and_link("cpp", shlex.join(compiler), shlex.join(link))
    objects = {"bindings.o": (CSRC / "bindings.cpp", flags + includes + [version_define()])}
    for source in sorted(CSRC.glob("*/*_cpu.cpp")):
        for isa, isa_flags in ISAS.items():
            extra = [f"-DULTRA_ISA={isa}", f"-DULTRA_ISA_{isa.upper()}", *isa_flags]
            objects[f"{source.stem}.{isa}.o"] = (source, flags + extra)
    described = {"compiler": shlex.join(compiler), "flags": CXXFLAGS, "isas": list(ISAS), "openmp": openmp,
                 "python": platform.python_version(), "machine": platform.machine()}  # fmt: skip
    return described, rules + builds("cpp", objects, library)


def plan_cuda(library: Path) -> tuple[dict[str, object], list[str]]:
    """Ninja's rules: every csrc/<op>/<op>_cuda.cu once, for all architectures; one library that knows no Python."""
    if os.environ.get("ULTRA_SKIP_CUDA") == "1":
        raise NotBuilt("skipped", "ULTRA_SKIP_CUDA=1 when this was installed", f"unset ULTRA_SKIP_CUDA, {AGAIN}")
    nvcc, archs = find_nvcc(), cuda_archs()
    compiler = find_compiler()  # nvcc compiles the host's part with it
    find_ninja()
    host = ["-ccbin", compiler[0]] if os.environ.get("CXX") and len(compiler) == 1 else []
    code = [f"arch={arch.replace('sm_', 'compute_')},code={arch}" for arch in archs]
    flags = [*NVCCFLAGS, *(word for pair in code for word in ("-gencode", pair)), f"-I{CSRC}", version_define(),
             f'-DULTRA_ARCHS="{" ".join(archs)}"']  # fmt: skip
    # The runtime is linked in and hidden: torch loads one of its own, perhaps another version, under the same names.
    link = ["-shared", "-cudart", "static", "-Xlinker", "--exclude-libs=ALL"]
    rules = compile_and_link("cuda", shlex.join([nvcc, *host]), shlex.join(link))
    objects = {f"{source.stem}.o": (source, flags) for source in sorted(CSRC.glob("*/*_cuda.cu"))}
    version = subprocess.run([nvcc, "--version"], text=True, capture_output=True).stdout
    release = next((line.split("release ")[1].split(",")[0] for line in version.splitlines() if "release " in line), "")
    return {"nvcc": nvcc, "release": release, "archs": archs}, rules + builds("cuda", objects, library)


def cuda_archs() -> list[str]:
    """ULTRA_CUDA_ARCHS in nvcc's names: 80, 8.0 and sm_80 are machine code, compute_80 is PTX, 8.0+PTX is both.

    The default serves every GPU from Ampere on: sm_80 all 8.x, sm_90a Hopper, and PTX what came after it. The PTX is
    compute_90's because that of compute_90a runs on nothing newer.
    """
    archs: list[str] = []
    asked = os.environ.get("ULTRA_CUDA_ARCHS", "").strip(" ;,")
    for item in re.split(r"[;,\s]+", asked) if asked else DEFAULT_ARCHS:
        found = re.fullmatch(r"(sm_|compute_)?(\d+)\.?(\d)([af]?)(\+PTX)?", item)
        if found is None:
            raise SystemExit(
                f"ULTRA_CUDA_ARCHS: {item!r} is no architecture; allowed are sm_80, 80 or 8.0 (machine code), "
                f"compute_90 (PTX) and 8.0+PTX (both), with ; between. Without it: {';'.join(DEFAULT_ARCHS)}"
            )
        kind, major, minor, suffix, ptx = found.groups()
        archs.append(f"{kind or 'sm_'}{major}{minor}{suffix}")
        archs += [f"compute_{major}{minor}"] if ptx else []
    return list(dict.fromkeys(archs))


def compile_and_link(name: str, compiler: str, link: str) -> list[str]:
    return [
        f"{name} = {compiler}",
        f"rule compile_{name}",
        f"  command = ${name} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        f"rule link_{name}",
        f"  command = ${name} {link} $in -o $out",
    ]


def builds(name: str, objects: dict[str, tuple[Path, list[str]]], library: Path) -> list[str]:
    lines = [
        f"build {out}: compile_{name} {ninja_path(source)}\n  flags = {shlex.join(flags)}"
        for out, (source, flags) in objects.items()
    ]
    return [*lines, f"build {ninja_path(library.resolve())}: link_{name} {' '.join(objects)}"]


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
