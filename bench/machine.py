"""What a result was measured on and with. `python -m bench.machine FILE` writes it as JSON; prints GPU, slug, key."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
SOURCES = ("setup.py", "pyproject.toml", "csrc", "configs", "ultra", "ultra_kernels", "tests", "bench")


@functools.cache
def about() -> dict[str, Any]:
    """Card or processor, versions, commit and a hash of the sources (a working tree may differ from its commit)."""
    import torch

    gpu = torch.cuda.is_available()
    facts = {
        "machine": torch.cuda.get_device_name() if gpu else cpu_name(),
        "gpu": gpu,
        "compute_capability": list(torch.cuda.get_device_capability()) if gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "allocator": {name: os.environ.get(name) for name in ALLOCATOR},
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty"),
        "sources": source_hash(),
    }
    return facts | {"key": key(facts)}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A file name for a card: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def source_hash() -> str:
    """Twelve hex digits over every source file, with or without git."""
    total = hashlib.sha256()
    for path in _sources():
        total.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return total.hexdigest()[:12]


def _sources() -> Iterator[Path]:
    suffixes = {".py", ".sh", ".toml", ".yaml", ".h", ".cpp", ".cu", ".cuh"}
    for top in (ROOT / name for name in SOURCES):
        yield from sorted(p for p in (top.rglob("*") if top.is_dir() else [top]) if p.suffix in suffixes)


def key(facts: dict[str, Any]) -> str:
    """Results are of one state of the sources on one card with one set of versions; this names the set."""
    names = ("sources", "machine", "driver", "cuda", "torch", "triton", "python")
    return hashlib.sha256(repr([facts[name] for name in names]).encode()).hexdigest()[:16]


def _output(*command: str) -> str | None:
    """The first line that `command` prints; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    facts = about()
    Path(sys.argv[1]).write_text(json.dumps(facts, indent=1) + "\n")
    sys.stdout.write(f"{facts['machine'] if facts['gpu'] else ''}\n{slug(facts['machine'])}\n{facts['key']}\n")
