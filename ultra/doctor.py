"""`ultra doctor`: what is installed, which backends run here, and what would mend the rest."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


class Section:
    """The lines of one part of the report, and how many of them are problems that the user can mend."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.problems = 0

    def add(self, name: str, value: object) -> None:
        self.lines.append(f"  {name:<13} {value}")

    def problem(self, name: str, what: object, fix: str) -> None:
        self.problems += 1
        self.lines += [f"! {name:<13} {indented(what)}", f"  {'to mend':<13} {indented(fix)}"]


def indented(text: object) -> str:
    return str(text).strip().replace("\n", "\n" + 16 * " ")


def report() -> tuple[str, int]:
    """The report, and 0 when all is well or 1 when a line starts with "!". Never raises."""
    parts: list[str] = []
    problems = 0
    for title, write in SECTIONS.items():
        section = Section()
        try:
            write(section)
        except Exception as error:  # a broken install is what this command is for: the rest must still be printed
            section.problem("cannot tell", f"{type(error).__name__}: {error}", "install again; if it stays, report it")
        parts += [title, *section.lines, ""]
        problems += section.problems
    verdict = "all is well" if not problems else f"{problems} problem{'s' * (problems > 1)}: see the lines with !"
    return "\n".join([*parts, verdict]), 1 if problems else 0


def system(section: Section) -> None:
    section.add("python", f"{platform.python_version()} ({sys.executable})")
    section.add("system", f"{platform.system()} {platform.release()} {platform.machine()}")
    try:
        import torch
    except ImportError as error:
        section.problem("torch", error, "pip install torch")
        return
    section.add("torch", torch.__version__)
    section.add("torch CUDA", torch.version.cuda or "not built with CUDA")
    gpus = nvidia_gpus()
    section.add("GPU, driver", indented("\n".join(gpus)) or "no NVIDIA GPU found")
    if gpus and not torch.cuda.is_available():
        section.problem(
            "torch", "sees no GPU although nvidia-smi lists one", "install a CUDA build of torch that fits the driver"
        )
    if platform.system() == "Linux":
        try:
            section.add("triton", importlib.metadata.version("triton"))
        except importlib.metadata.PackageNotFoundError:
            section.problem("triton", "not installed", "pip install triton")


def nvidia_gpus() -> list[str]:
    """One "name, driver version" line per GPU that the driver lists."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def packages(section: Section) -> None:
    import ultra
    import ultra_kernels

    running = Path(str(ultra_kernels.__file__)).resolve().parent
    section.add("version", ultra_kernels.__version__)
    section.add("ultra", Path(str(ultra.__file__)).resolve().parent)
    section.add("ultra_kernels", running)
    try:
        distribution = importlib.metadata.distribution("ultra")
    except importlib.metadata.PackageNotFoundError:
        section.add("which copy", "source folder; nothing is installed")
        return
    installed = Path(str(distribution.locate_file("ultra_kernels"))).resolve()
    section.add("which copy", "installed" if running == installed else f"source folder; {installed} is installed too")
    if distribution.version != ultra_kernels.__version__:
        what = f"version {distribution.version} is installed, version {ultra_kernels.__version__} runs"
        section.problem("version", what, "pip install . in the source folder")


def library(section: Section) -> None:
    from ultra_kernels import _native

    info = _native.build_info("cpp")
    if (reason := _native.missing()) is not None:
        section.problem("C++ library", reason, info.get("fix") or "pip install . with a C++ compiler on the PATH")
        section.add("until then", "every op runs its PyTorch reference on the CPU")
        return
    module = _native.load()
    section.add("file", module.__file__)
    section.add("instructions", f"{module.isa()} in use; this CPU and build have {', '.join(module.isas())}")
    section.add("OpenMP", "yes" if info.get("openmp") else "no: the C++ kernels use one thread")
    section.add("compiler", f"{info.get('compiler', 'unknown')}, for Python {info.get('python', 'unknown')}")


def cuda_library(section: Section) -> None:
    """Its absence is a problem where it would have run, on a GPU, and where nvcc was there and did not build it."""
    from ultra_kernels import _cuda, _native

    info, gpus = _native.build_info("cuda"), nvidia_gpus()
    if (reason := _cuda.missing()) is not None:
        fix = info.get("fix") or "pip install . with CUDA's nvcc on the PATH"
        if info.get("state") == "failed" or (gpus and info.get("state") != "skipped"):
            section.problem("CUDA library", reason, fix)
        else:
            section.add("CUDA library", indented(reason))
            section.add("no harm", "this is for NVIDIA GPUs" + ("" if gpus else "; none was found here"))
            section.add("to have it", indented(fix))
        return
    library = _cuda.load()
    section.add("file", library._name)
    section.add("holds", f"{', '.join(_cuda.archs())} (sm_ is machine code, compute_ is PTX for newer GPUs)")
    section.add("built with", f"CUDA {_cuda.version_text(library.ultra_cuda_runtime())} ({info.get('nvcc', 'nvcc')})")
    driver = library.ultra_cuda_driver()
    section.add("driver", f"for CUDA {_cuda.version_text(driver)}" if driver else "no NVIDIA driver here")
    import torch

    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name = f"{torch.cuda.get_device_name(index)}, sm_{''.join(map(str, torch.cuda.get_device_capability(index)))}"
        if (obstacle := _cuda.obstacle(index)) is None:
            section.add(f"GPU {index}", f"{name}: a test kernel ran")
        else:
            section.problem(f"GPU {index}", f"{name}: {obstacle[0]}", obstacle[1])


def backends(section: Section) -> None:
    import torch

    import ultra_kernels
    from ultra_kernels._dispatch import OPS

    section.lines.append("  an op runs the first backend of its line that is not refused; [n] is the reason")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        table = ultra_kernels.available(device)
        reasons: dict[str, int] = {}
        width = max(map(len, table))
        section.lines.append(f"  on {device}:")
        for op, states in table.items():
            cells = []
            for backend in dict.fromkeys([*OPS[op].order.get(device, ()), *states]):
                reason = states[backend]
                note = "" if reason is None else f" no [{reasons.setdefault(reason, len(reasons) + 1)}]"
                cells.append(f"{backend}{note}")
            section.lines.append(f"    {op:<{width}}  {', '.join(cells)}")
        section.lines += [f"    [{number}] {reason}" for reason, number in reasons.items()]


def extras(section: Section) -> None:
    try:
        requires = importlib.metadata.requires("ultra") or []
    except importlib.metadata.PackageNotFoundError:
        section.add("extras", "unknown: not installed with pip")
        return
    wanted: dict[str, list[str]] = {}
    for line in requires:
        if (found := re.match(r"([\w.-]+).*extra\s*==\s*['\"](\w+)['\"]", line)) and found[1] != "ultra":
            wanted.setdefault(found[2], []).append(found[1])
    for extra, names in sorted(wanted.items()):
        missing = [name for name in names if not is_installed(name)]
        remedy = f"without {', '.join(missing)}: pip install '.[{extra}]' in the clone"
        section.add(f"[{extra}]", remedy if missing else "complete")


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


SECTIONS: dict[str, Callable[[Section], None]] = {
    "System": system,
    "Packages": packages,
    "C++ library": library,
    "CUDA library": cuda_library,
    "Backends": backends,
    "Optional extras": extras,
}
