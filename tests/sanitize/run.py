"""`python tests/sanitize/run.py [-k TEXT]`: the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

Builds a copy of the tree with both and runs the tests of the native backends there, for every instruction set that this
CPU has. Any finding ends the process that made it. Exit code: that of pytest. Takes some minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "build", "runs", "__pycache__", "*.egg-info", "*.so")
CXX = "g++ -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"


def library(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    return str(Path(found.strip()).resolve(strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(": ", 1)[-1].splitlines()[0])
    parser.add_argument("-k", metavar="TEXT", default="native or instruction_sets", help="pytest's -k")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        env = {**os.environ, "PYTHONPATH": str(tree), "CXX": CXX, "ULTRA_SKIP_CUDA": "1", "ULTRA_REQUIRE_EXT": "1"}
        subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tree, env=env, check=True)
        # Python itself is not instrumented: the runtimes come first, and what it never frees is no finding.
        env["LD_PRELOAD"] = f"{library('libasan.so')}:{library('libubsan.so')}"
        env |= {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops", "-k", args.k]
        return subprocess.run(command, cwd=tree, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
