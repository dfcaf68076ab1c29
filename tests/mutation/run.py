"""`python tests/mutation/run.py [-k TEXT] [--list]`: breaks a copy of the tree, one constant at a time.

For every entry of mutations.py the change is made, the tests run, and they must fail; then it is undone. Exit code 0:
every mutation was noticed; 1: some survived, or their tests fail without any change. Entries that no longer fit the
code are errors before anything runs. C++ is rebuilt incrementally.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "build", "runs", "__pycache__", "*.egg-info")


def stale(mutations: list[Mutation]) -> list[str]:
    """Entries whose old text is not there exactly once, or that change nothing."""
    found = []
    for m in mutations:
        count = (ROOT / m.file).read_text(encoding="utf-8").count(m.old) if (ROOT / m.file).is_file() else 0
        if count != 1 or m.old == m.new:
            found.append(f"{m.file}: {m.old!r} occurs {count} times; it must occur once and be changed")
    return found


def run_tests(tree: Path, tests: str) -> subprocess.CompletedProcess[str]:
    env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(tree)}
    words = shlex.split(tests)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        env[name] = value
    command = [sys.executable, "-m", "pytest", "-x", "-q", *words]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)


def build(tree: Path) -> None:
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tree, check=True, capture_output=True,
                   env={**os.environ, "ULTRA_REQUIRE_EXT": "1", "ULTRA_SKIP_CUDA": "1"})  # fmt: skip


def verdict(tree: Path, m: Mutation) -> str:
    path = tree / m.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(m.old, m.new), encoding="utf-8")
    try:
        if compiled(m):
            build(tree)
        code = run_tests(tree, m.tests).returncode
    except subprocess.CalledProcessError:
        return "BROKEN (does not compile)"
    finally:
        path.write_text(text, encoding="utf-8")
    return {0: "SURVIVED", 1: "caught"}.get(code, f"BROKEN (pytest exited with {code})")


def compiled(m: Mutation) -> bool:
    """Whether the C++ library holds it."""
    return m.file.endswith((".cpp", ".h"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(": ", 1)[-1].splitlines()[0])
    parser.add_argument("-k", metavar="TEXT", default="", help="only files whose path has TEXT in it")
    parser.add_argument("--list", action="store_true", help="print the entries and stop")
    args = parser.parse_args(argv)
    chosen = [m for m in MUTATIONS if args.k in m.file]
    if problems := stale(chosen):
        print("\n".join(problems), file=sys.stderr)
        return 1
    if args.list:
        print("\n".join(f"{m.file}: {m.old.strip()} -> {m.new.strip()}  [{m.tests}]" for m in chosen))
        return 0
    bad = []
    with tempfile.TemporaryDirectory(prefix="ultra-mutation-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        if any(map(compiled, chosen)):
            build(tree)
        for tests in dict.fromkeys(m.tests for m in chosen):
            done = run_tests(tree, tests)
            if done.returncode != 0:
                bad.append(f"these tests do not pass without a change: {tests}\n{done.stdout[-1500:]}")
                print(bad[-1], flush=True)
        for m in chosen:
            began = time.monotonic()
            result = verdict(tree, m)
            line = f"{m.file}: {m.old.strip()!r} -> {m.new.strip()!r}: {result}"
            print(f"{line} ({time.monotonic() - began:.0f} s)", flush=True)
            if result != "caught":
                bad.append(line)
    print(f"{len(chosen)} mutations, {len(bad)} problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
