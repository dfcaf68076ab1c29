"""Every Triton configuration that the ops ship, compiled for each architecture on a machine without a GPU.

A configuration may not spill registers to memory, and its shared memory must fit. All of them take 20 minutes of one
core, so what the compiler said is kept in triton_compiled.json under a hash of source, configuration and compiler
versions. What changed since is compiled, and so is every sixteenth of the rest, which must come out as it is kept.
After a change of a kernel, or with another Triton: `python tests/ops/test_triton_compile.py` writes the file anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import multiprocessing
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import ultra_kernels
from ultra_kernels import _triton
from ultra_kernels._dispatch import OPS
from ultra_kernels._testing import cases, flat
from ultra_kernels._triton import ARCHS, Configuration, Launch, recorded_launches

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are Python functions", allow_module_level=True)

RECORD = Path(__file__).with_name("triton_compiled.json")
# Bytes of shared memory that one program may have (CUDA programming guide, "maximum per thread block").
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
FOLDERS: dict[str, list[str]] = {}  # folder with Triton kernels -> its ops
for name, op in OPS.items():
    if "triton" in op.names:
        FOLDERS.setdefault(op.kernels.rsplit(".", 1)[1], []).append(name)


@dataclasses.dataclass
class Usage:
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


def parse(ptxas_log: str) -> dict[str, int]:
    """The figures that `ptxas -v` prints for one kernel."""
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", ptxas_log)
    registers = re.search(r"Used (\d+) registers", ptxas_log)
    if stack is None or registers is None:
        raise ValueError(f"ptxas -v printed no figures:\n{ptxas_log}")
    names = ("stack", "spill_stores", "spill_loads")
    return {"registers": int(registers[1]), **{n: int(v) for n, v in zip(names, stack.groups(), strict=True)}}


def problems(usage: Usage, arch: int) -> list[str]:
    found = []
    if usage.spill_stores:
        found.append(f"spills {usage.spill_stores} bytes ({usage.registers} registers)")
    if usage.shared > SHARED_LIMIT[arch]:
        found.append(f"needs {usage.shared} bytes of shared memory; sm_{arch} has {SHARED_LIMIT[arch]}")
    return found


def compile_for(configuration: Configuration, arch: int) -> Usage:
    kernel, names = configuration.kernel, configuration.kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: configuration.signature.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in configuration.constexprs.items()},
        # what a launch passes for aligned addresses: without it loads are not vectorised and the figures mislead
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in configuration.aligned},
    )
    options = {f: getattr(configuration, f) for f in ("num_warps", "num_stages", "enable_fp_fusion")}
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        triton.knobs.cache.dir = folder  # an empty cache: Triton runs ptxas itself, with its own flags
        triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert compiled.asm["cubin"]
    return Usage(**parse(log.getvalue()), shared=compiled.metadata.shared)


def key(configuration: Configuration, arch: int) -> str:
    parts = [configuration.kernel.cache_key, repr(dataclasses.replace(configuration, kernel=None)), arch]
    parts += [triton.__version__, get_ptxas(arch).version, inspect.getsource(compile_for)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@functools.cache
def configurations(folder: str) -> list[Configuration]:
    return list(OPS[FOLDERS[folder][0]].module("triton").configurations())


@functools.cache
def shipped() -> dict[str, tuple[Configuration, int]]:
    """By name, once each: folders may share kernels."""
    found: dict[tuple[Any, str, int], tuple[str, tuple[Configuration, int]]] = {}
    for folder in FOLDERS:
        for c in configurations(folder):
            for arch in c.archs:
                found.setdefault((c.kernel, c.name, arch), (f"{folder}-{c.name}-sm{arch}", (c, arch)))
    return dict(found.values())


@functools.cache
def kept() -> dict[str, Any]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {"triton": None, "configurations": {}}


def known(name: str, configuration: Configuration, arch: int) -> Usage | None:
    """What the record says of this very source and compiler."""
    entry = dict(kept()["configurations"].get(name, {}))
    return Usage(**entry) if entry.pop("key", None) == key(configuration, arch) else None


def record() -> None:
    with multiprocessing.Pool() as pool:
        entries = dict(pool.imap_unordered(entry_of, shipped(), chunksize=1))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entries[name])}" for name in sorted(entries))
    RECORD.write_text(f'{{"triton": "{triton.__version__}", "configurations": {{\n{lines}\n}}}}\n')


def entry_of(name: str) -> tuple[str, dict[str, Any]]:
    what = shipped()[name]
    usage = known(name, *what) or compile_for(*what)
    return name, {"key": key(*what), **dataclasses.asdict(usage)}


@pytest.mark.parametrize("name", shipped())
def test_shipped_configuration(name: str) -> None:
    configuration, arch = shipped()[name]
    usage = known(name, configuration, arch)
    if usage is None or key(configuration, arch).startswith("0"):
        compiled = compile_for(configuration, arch)
        assert usage in (None, compiled), f"{name}: {RECORD.name} says otherwise"
        usage = compiled
    assert not problems(usage, arch), f"{name}: {problems(usage, arch)}"


def test_the_record_holds_what_is_shipped_and_nothing_else() -> None:
    if kept()["triton"] != triton.__version__:
        pytest.skip(f"{RECORD.name} is of Triton {kept()['triton']}; with {triton.__version__} everything is compiled")
    changed = [name for name, what in shipped().items() if known(name, *what) is None]
    gone = sorted(kept()["configurations"].keys() - shipped().keys())
    assert not changed and not gone, f"run `python tests/ops/{Path(__file__).name}`: changed {changed}, gone {gone}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_architecture_is_served(folder: str) -> None:
    archs = {arch for c in configurations(folder) for arch in c.archs}
    assert archs == set(ARCHS)


def launches(folder: str) -> dict[tuple[str, str, torch.dtype, int], list[Launch]]:
    """The launches of forward and backward for each op, case, dtype and architecture; nothing runs."""
    configurations(folder)  # decorated before the environment says that an interpreter is there
    found = {}
    for name, arch in itertools.product(FOLDERS[folder], ARCHS):
        for case, dtype in ((c, dtype) for c in cases(name) for dtype in c.dtypes):
            with pytest.MonkeyPatch.context() as patch, recorded_launches(run=False) as seen:
                patch.setenv("TRITON_INTERPRET", "1")
                # what a router would have written is used as an index
                patch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: self.new_zeros(*a, **k))
                # torch's own products launch nothing of ours, and take a minute in bfloat16 on a CPU that lacks it
                patch.setattr(torch.Tensor, "__matmul__", lambda a, b: a.new_zeros(*a.shape[:-1], b.shape[-1]))
                patch.setattr(_triton, "arch_of", lambda tensor, arch=arch: arch)
                result = getattr(ultra_kernels, name)(**case.inputs(dtype), backend="triton")
                outputs = flat(result)
                loss = torch.stack([o.float().sum() for o in outputs]).sum()
                if loss.requires_grad:
                    loss.backward()
            if any(o.numel() for o in outputs):
                found[name, case.name, dtype, arch] = seen
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_launches_and_shipped_configurations_are_the_same(folder: str) -> None:
    """A launch may be another folder's: experts with ternary weights are groups of bitlinear. Each configuration is
    reached by a case, so that the comparison with float64 on a GPU runs it."""
    known = [c for other in (folder, *FOLDERS) for c in configurations(other)]
    calls = launches(folder)
    for call, seen in calls.items():
        assert seen, call
        for launch in seen:
            assert any(c.covers(launch) for c in known), (
                f"{call}: {launch.kernel.fn.__name__} is launched with {launch.options} and arguments that "
                f"no configuration lists: {launch.arguments}"
            )
    every = [launch for seen in calls.values() for launch in seen]
    unreached = [c.name for c in configurations(folder) if not any(map(c.covers, every))]
    assert not unreached, f"no case of {folder} launches {', '.join(unreached)}: add one to its cases.py"


# ---- the checks themselves can fail --------------------------------------------------------------------------


@triton.jit
def hungry_kernel(x, y, N: triton.language.constexpr, WIDE: triton.language.constexpr):
    """Keeps N × WIDE values alive on one warp until the last one is read: far more than its registers hold."""
    at = triton.language.arange(0, WIDE)
    rows = triton.language.arange(0, N)
    values = triton.language.load(x + rows[:, None] * WIDE + at[None, :])
    largest = triton.language.max(triton.language.max(values, axis=0), axis=0)
    triton.language.store(y + rows[:, None] * WIDE + at[None, :], values / largest)


def hungry(num_warps: int) -> Configuration:
    signature = {"x": "*fp32", "y": "*fp32"}
    return Configuration("hungry", hungry_kernel, signature, {"N": 64, "WIDE": 256}, ("x", "y"), num_warps)


def test_a_spilling_kernel_is_caught() -> None:
    usage = compile_for(hungry(num_warps=1), 90)
    assert usage.spill_stores > 0 and "spills" in problems(usage, 90)[0]
    assert not problems(compile_for(hungry(num_warps=16), 90), 90)


def test_too_much_shared_memory_is_caught() -> None:
    usage = Usage(registers=32, stack=0, spill_stores=0, spill_loads=0, shared=200 * 1024)
    assert problems(usage, 80) and not problems(usage, 90)


def test_the_log_of_ptxas_is_read() -> None:
    log = (
        "ptxas info    : Function properties for k\n"
        "    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size\n"
    )
    assert parse(log) == {"registers": 255, "stack": 16, "spill_stores": 12, "spill_loads": 8}
    with pytest.raises(ValueError, match="no figures"):
        parse("ptxas info    : 0 bytes gmem")


def test_the_key_follows_source_and_configuration() -> None:
    configuration = hungry(4)
    assert key(configuration, 90) == key(hungry(4), 90)
    assert key(configuration, 90) != key(configuration, 100) != key(hungry(8), 100)
    first = configurations(next(iter(FOLDERS)))[0]
    assert key(dataclasses.replace(first, kernel=hungry_kernel), 90) != key(first, 90)


if __name__ == "__main__":
    record()
