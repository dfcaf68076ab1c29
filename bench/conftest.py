"""Prints the op bench as one compact table, and appends each cell to the file of --ultra-json when it is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import results
from bench.limits import cached_read_bandwidth, copy_bandwidth, int8_rate, matmul_rate
from bench.machine import about

CELLS = pytest.StashKey[list[results.Cell]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ultra bench")
    group.addoption("--ultra-json", metavar="PATH", help="append one JSON line per measured cell to PATH")
    group.addoption("--ultra-seconds", type=float, default=1.0, help="time given to each cell (default 1)")
    group.addoption("--ultra-compile", action="store_true", help="also time torch.compile of the references")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CELLS] = []


@pytest.fixture
def record_cell(pytestconfig: pytest.Config) -> Callable[[results.Cell], None]:
    """Takes one measured cell: kept for the table, written at once so that a killed run keeps what it has."""

    def record(cell: results.Cell) -> None:
        pytestconfig.stash[CELLS].append(cell)
        if path := pytestconfig.getoption("--ultra-json"):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(cell | about()) + "\n")

    return record


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    cells = config.stash[CELLS]
    if not cells:
        return
    write, facts, device = terminalreporter.write_line, about(), cells[0]["device"]
    write("")
    write(f"{facts['machine']}, {facts['threads']} threads, torch {facts['torch']}")
    rates = ", ".join(
        f"{dtype} matmul {matmul_rate(device, getattr(torch, dtype)) / 1e9:.0f} GFLOP/s"
        for dtype in sorted({c["dtype"] for c in cells})
    )
    if any("int8" in c["limits_ms"] for c in cells):
        rates += f", int8 {int8_rate(device) / 1e9:.0f} GOP/s"
        if device == "cpu" and (cached := cached_read_bandwidth()):
            rates += f", reading a cached MiB {cached / 1e9:.0f} GB/s"
    write(f"limits of this run: copy {copy_bandwidth(device) / 1e9:.1f} GB/s, {rates}")
    unset = [name for name, value in facts["allocator"].items() if value is None]
    if device == "cpu" and unset:
        write(f"{', '.join(unset)} not set: fresh output pages cost more than most kernels (bench/README.md)")
    for line in results.lines(cells):
        write(line)
    if path := config.getoption("--ultra-json"):
        write(f"written to {path}")
