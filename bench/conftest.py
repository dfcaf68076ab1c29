"""Prints the op bench as one compact table, and writes it as JSON lines when --ultra-json names a file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.limits import copy_bandwidth, matmul_rate

ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ultra-json", metavar="PATH", help="append one JSON line per measured cell to PATH")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # its own table is replaced by the one below
    config.option.benchmark_disable_gc = True


def machine() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "machine": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "allocator": {name: os.environ.get(name) for name in ALLOCATOR},
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def rows(config: pytest.Config) -> Iterator[dict[str, Any]]:
    """One dict per measured cell; `ratio` is the reference's time over this backend's, where both were measured."""
    session = getattr(config, "_benchmarksession", None)
    measured = [b for b in session.benchmarks if b.extra_info.get("op")] if session else []
    cells = [{**b.extra_info, "ms": b.stats.median * 1e3, "min_ms": b.stats.min * 1e3} for b in measured]
    keys = ("op", "case", "dtype", "mode")
    reference = {tuple(c[k] for k in keys): c["ms"] for c in cells if c["backend"] == "reference"}
    for c in cells:
        c["gb_per_s"] = c["bytes"] / c["ms"] / 1e6
        c["gflop_per_s"] = c["flops"] / c["ms"] / 1e6
        c["share"] = c["limit_ms"] / c["ms"]
        slow = reference.get(tuple(c[k] for k in keys))
        c["ratio"] = slow / c["ms"] if slow else None
        yield c


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    cells = sorted(rows(config), key=lambda c: (c["op"], c["case"], c["dtype"], c["mode"], c["ms"]))
    if not cells:
        return
    write = terminalreporter.write_line
    about = machine()
    unset = [name for name, value in about["allocator"].items() if value is None]
    write("")
    write(f"{about['machine']}, {about['threads']} threads, torch {about['torch']}")
    device = cells[0]["device"]
    rates = ", ".join(
        f"{dtype} matmul {matmul_rate(device, getattr(torch, dtype)) / 1e9:.0f} GFLOP/s"
        for dtype in sorted({c["dtype"] for c in cells})
    )
    write(f"limits of this run: copy {copy_bandwidth(device) / 1e9:.1f} GB/s, {rates}")
    if device == "cpu" and unset:
        write(f"{', '.join(unset)} not set: fresh output pages cost more than most kernels (bench/README.md)")
    names = [f"{c['op']} {c['case']} {c['dtype']} {c['mode']}" for c in cells]
    width = max(map(len, names))
    write(f"{'':{width}}  {'backend':9} {'ms':>9} {'GB/s':>7} {'GFLOP/s':>8} {'of limit':>15} {'× reference':>12}")
    last = None
    for name, c in zip(names, cells, strict=True):
        ratio = f"{c['ratio']:.2f}" if c["ratio"] else "-"
        share = f"{c['share']:.0%} {c['limit']}"
        write(
            f"{name if name != last else '':{width}}  {c['backend']:9} {c['ms']:9.3f} {c['gb_per_s']:7.1f} "
            f"{c['gflop_per_s']:8.1f} {share:>15} {ratio:>12}"
        )
        last = name
    path = config.getoption("--ultra-json")
    if path:
        with open(path, "a") as file:
            file.writelines(json.dumps({**c, **about}) + "\n" for c in cells)
        write(f"written to {path}")
