"""Compiles a C++ file of the bench for this processor into build/bench/ and loads it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch  # noqa: F401  loads the OpenMP runtime that the libraries use

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "bench"


def load(source: str, *flags: str) -> ctypes.CDLL:
    """Raises ImportError where there is no g++ ($CXX) or it fails."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ImportError(f"no compiler: {compiler} ($CXX)")
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as work:
        built, library = Path(work) / "built.o", BUILD / f"{Path(source).stem}.so"
        # Linked without -fopenmp, as setup.py does it: two OpenMP runtimes spin against each other.
        for command in (
            [compiler, "-O3", "-march=native", "-fopenmp", "-fPIC", *flags, "-c", str(HERE / source), "-o", str(built)],
            [compiler, "-shared", str(built), "-o", f"{built}.so"],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ImportError(f"{source}: {done.stderr.strip()[-500:]}")
        os.replace(f"{built}.so", library)
    return ctypes.CDLL(str(library))
