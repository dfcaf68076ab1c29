"""bench/gpu_check.sh and its helpers, as far as they go without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "gpu_check.sh"
NO_GPU, USAGE, FAILED = 77, 2, 1
BenchModule = Callable[[str], ModuleType]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def check(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    steer = {"CUDA_VISIBLE_DEVICES": "", "GPU_CHECK_DIR": str(folder), "PYTHON": sys.executable}
    env = {k: v for k, v in os.environ.items() if k != "OUT"} | steer | environment
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=env, cwd="/")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bensh"], "unknown argument 'bensh'"),
        (["--fast"], "unknown argument '--fast'"),
        (["--budget", "soon"], "--budget is 'soon'"),
        (["test", "--out"], "--out needs a value"),
        (["--wheels", "/nowhere"], "no folder '/nowhere'"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = check(tmp_path / "work", *arguments)
    assert done.returncode == USAGE
    assert message in done.stderr and "usage: bench/gpu_check.sh" in done.stderr
    assert not (tmp_path / "work").exists()


def test_help(tmp_path: Path) -> None:
    done = check(tmp_path / "work", "--help")
    assert done.returncode == 0 and "exit status" in done.stdout


def test_without_a_gpu(tmp_path: Path) -> None:
    """Every part goes as far as it can and says what it left out; then resumption, a failing part, a forced one."""
    work, out = tmp_path / "work", tmp_path / "out"
    no_compiler = {"CXX": "false", "ULTRA_SKIP_CUDA": "1"}
    done = check(work, "all", "--out", str(out), **no_compiler)
    assert done.returncode == NO_GPU, done.stdout + done.stderr
    page = (out / "summary.md").read_text()
    assert page.startswith("# GPU check: no GPU") and "torch " in page
    assert "| build | passed |" in page and "no working C++ compiler (tried: false)" in page
    for part, said in {
        "test": "no GPU; the tests collect",
        "train": "no GPU; the tests collect",
        "sanitize": "no GPU; the kernels are listed",
        "bench": "no GPU; the cells collect",
    }.items():
        assert f"| {part} | skipped |" in page and said in page
    assert "test_against_float64_gpu[dyt-triton-" in (out / "test.log").read_text()
    assert "dyt triton: 3 kernels" in (out / "sanitize.log").read_text()
    assert "bench_ops.py::test_op[dyt-" in (out / "bench.log").read_text()
    files = list(out.iterdir())
    assert len(files) <= 8 and all(f.is_file() for f in files)  # what borrowed machines bring back

    again = check(work, "build", **no_compiler)
    assert again.returncode == NO_GPU and "build     passed before" in again.stdout
    broken = check(work, "build", "summary", "--force", ULTRA_REQUIRE_EXT="1", **no_compiler)
    assert broken.returncode == FAILED
    assert "| build | failed |" in broken.stdout and "exit status 1" in broken.stdout


def test_no_time_left(tmp_path: Path) -> None:
    """A part that its limit cuts short is not taken for done."""
    done = check(tmp_path, "bench", "summary", "--budget", "1")
    assert done.returncode == FAILED and "| bench | incomplete |" in done.stdout
    assert "call again to go on" in done.stdout


def test_an_interpreter_without_torch(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    fake.chmod(0o755)
    done = check(tmp_path / "work", "test", PYTHON=str(fake))
    assert done.returncode == FAILED and "cannot import torch" in done.stderr


# ---- the record of tests -------------------------------------------------------------------------------------

SAMPLE = """
import os
import pytest

def test_good(record_property):
    record_property("of_tolerance", 0.25)

def test_bad():
    assert 1 + 1 == 3

def test_left_out():
    pytest.skip("no such thing here")

@pytest.fixture
def broken():
    raise RuntimeError("the fixture is broken")

def test_broken_fixture(broken): ...

def test_crash():
    os._exit(139)

def test_after_it(): ...
"""


def run_sample(folder: Path, *arguments: str) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(folder), str(folder)]
    command += ["-p", "no:cacheprovider", "-p", "bench.pytest_outcomes", "--outcomes", str(folder / "outcomes.jsonl")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *arguments], cwd=folder, env=env, capture_output=True).returncode


def test_outcomes_survive_a_crash_and_are_not_repeated(tmp_path: Path, bench_module: BenchModule) -> None:
    outcomes = bench_module("outcomes")
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    assert run_sample(tmp_path) == 139
    found = outcomes.tests(outcomes.read(tmp_path / "outcomes.jsonl"), "test")
    by_name = {name.split("::")[1]: line for name, line in found.items()}
    assert {name: line["outcome"] for name, line in by_name.items()} == {
        "test_good": "passed", "test_bad": "failed", "test_left_out": "skipped", "test_broken_fixture": "failed",
        "test_crash": "crashed",
    }  # fmt: skip
    assert by_name["test_good"]["properties"] == {"of_tolerance": 0.25}
    assert "assert (1 + 1) == 3" in by_name["test_bad"]["error"]
    assert by_name["test_left_out"]["error"] == "no such thing here"
    assert "the fixture is broken" in by_name["test_broken_fixture"]["error"]

    assert run_sample(tmp_path) == 0  # the one that is left
    found = outcomes.tests(outcomes.read(tmp_path / "outcomes.jsonl"), "test")
    assert len(found) == 6 and outcomes.main([str(tmp_path / "outcomes.jsonl"), "clean", "test"]) == 1


def test_a_lost_context_ends_the_process(tmp_path: Path, bench_module: BenchModule) -> None:
    outcomes = bench_module("outcomes")
    (tmp_path / "test_sample.py").write_text("def test_bad():\n    assert False\n\ndef test_next(): ...\n")
    patch = "from bench import pytest_outcomes\n\npytest_outcomes.context_loss = lambda: 'an illegal memory access'\n"
    (tmp_path / "conftest.py").write_text(patch)
    assert run_sample(tmp_path) == 86
    assert run_sample(tmp_path) == 0
    found = outcomes.tests(outcomes.read(tmp_path / "outcomes.jsonl"), "test")
    assert [line["outcome"] for line in found.values()] == ["failed", "passed"]


def test_interrupted_tests_and_half_lines_are_not_outcomes(tmp_path: Path, bench_module: BenchModule) -> None:
    outcomes, file = bench_module("outcomes"), tmp_path / "outcomes.jsonl"
    for outcome in ("crashed", "interrupted"):
        outcomes.append(file, {"part": "test", "test": "a", "outcome": outcome, "error": None})
    outcomes.append(file, {"part": "train", "status": "passed", "seconds": 1.0, "reason": ""})
    file.write_text(file.read_text() + '{"part": "test", "te')
    assert outcomes.tests(outcomes.read(file), "test") == {}
    outcomes.main([str(file), "forget", "train"])
    assert outcomes.parts(outcomes.read(file)) == {} and len(outcomes.read(file)) == 2


# ---- the page ------------------------------------------------------------------------------------------------


def cell(backend: str, ms: float, **more: object) -> dict[str, object]:
    base = {"op": "dyt", "case": "T8-D4", "dtype": "bfloat16", "mode": "forward", "device": "cuda"}
    sizes = {"bytes": 2_000_000, "flops": 1_000_000, "limit": "copy", "limit_ms": 0.5, "min_ms": ms, "rounds": 9}
    return base | sizes | {"backend": backend, "ms": ms} | more


def test_the_page_says_what_was_found(tmp_path: Path, bench_module: BenchModule) -> None:
    outcomes, summary = bench_module("outcomes"), bench_module("gpu_summary")
    machine = dict.fromkeys(("driver", "cuda", "torch", "triton", "python", "commit", "sources"), "1.2")
    (tmp_path / "machine.json").write_text(json.dumps(machine | {"machine": "NVIDIA X", "gpu": True, "commit": None}))
    file = tmp_path / "outcomes.jsonl"

    def add(part: str, test: str, outcome: str, error: str | None = None, **properties: object) -> None:
        line = {"part": part, "test": test, "outcome": outcome, "error": error, "properties": properties}
        outcomes.append(file, line)

    dyt = ["dyt", "triton", "float32"]
    add("test", "t.py::test_a[1]", "passed", cell=dyt, of_tolerance=0.3)
    add("test", "t.py::test_a[2]", "passed", cell=dyt, of_tolerance=0.7)
    add("test", "t.py::test_b", "failed", "AssertionError: out0: error 3 > 1")
    add("test", "t.py::test_c", "passed", host_waits="moe_ffn")
    add("train", "t.py::test_d", "passed", preset="quickstart", steps=20, first_loss=9.0, last_loss=7.5)
    add("sanitize", "memcheck", "failed", "exit status 9")
    add("bench", "b.py::test_op[derf-cuda-T8-float32-forward]", "skipped", "not built")
    outcomes.append(file, {"part": "test", "status": "failed", "seconds": 12.0, "reason": "exit status 1"})
    (tmp_path / "sanitize.log").write_text("========= ERROR SUMMARY: 3 errors\n")
    cells = [cell("triton", 1.0), cell("reference", 4.0), cell("torch.compile", 2.0)]
    (tmp_path / "nvidia-x.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cells))

    page = summary.page(tmp_path, ["build", "test"])
    assert "# GPU check: NVIDIA X" in page and "commit unknown" in page
    assert "| build | not run |" in page and "| test | failed | 12 | exit status 1 |" in page
    assert "## test: 3 passed, 1 failed" in page and "- test_b: AssertionError: out0: error 3 > 1" in page
    assert "| dyt | triton | 0.70 |" in page and "0.30" not in page
    assert "wait for the GPU: moe_ffn" in page
    assert "quickstart: loss 9.000 at step 1, 7.500 at step 20" in page
    assert "memcheck: failed (exit status 9)" in page and "3 errors" in page
    triton = next(
        line for line in page.splitlines() if " triton " in line and "of limit" not in line and "copy" in line
    )
    assert "50% copy" in triton and "4.00 reference, 2.00 torch.compile" in triton and " 2.0 " in triton  # GB/s
    assert "1 cells of derf: not built" in page


def test_the_key_follows_sources_card_and_versions(bench_module: BenchModule) -> None:
    machine = bench_module("machine")
    names = ("sources", "machine", "driver", "cuda", "torch", "triton", "python")
    facts = dict.fromkeys(names, "a")
    assert all(machine.key(facts) != machine.key(facts | {name: "b"}) for name in names)
    assert machine.key(facts | {"threads": 1}) == machine.key(facts | {"threads": 2})
    assert machine.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# ---- what the op tests need ----------------------------------------------------------------------------------

ALONE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {absent} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
import pytest

sys.exit(pytest.main(sys.argv[1:]))
"""
ABSENT = """
numpy scipy pandas hypothesis pytest_benchmark xdist jsonschema pydantic tokenizers safetensors tqdm datasets pyarrow
transformers numba psutil
""".split()


def test_op_tests_need_torch_triton_pytest_and_pyyaml_alone() -> None:
    """All of tests/ops and tests/gpu is collected, and some of it run, where nothing else can be imported."""
    command = [sys.executable, "-c", ALONE.format(absent=ABSENT), "tests/ops", "tests/gpu", "-q"]
    command += ["-m", "not slow", "-k", "test_packed or (against_float64 and dyt and T7) or same_bits"]
    env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout.splitlines()[-1]
