"""A pytest plugin that writes a line of outcomes.py per test: -p bench.pytest_outcomes --outcomes FILE.

It leaves out the tests that FILE has already, and ends the process with CONTEXT_LOST when a kernel has broken the CUDA
context, in which every later test would fail too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import outcomes

CONTEXT_LOST = 86


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", metavar="FILE", type=Path, help="append one JSON line per test to FILE")
    parser.addoption("--outcomes-part", default="test", help="the name of the part in those lines")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.outcomes is not None:
        config.pluginmanager.register(Recorder(config.option.outcomes, config.option.outcomes_part))


class Recorder:
    def __init__(self, path: Path, part: str) -> None:
        self.path, self.part = path, part
        self.running: str | None = None
        self.lost: str | None = None

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = outcomes.tests(outcomes.read(self.path), self.part)
        if known := [item for item in items if item.nodeid in done]:
            items[:] = [item for item in items if item.nodeid not in done]
            config.hook.pytest_deselected(items=known)

    def write(self, test: str, outcome: str, error: str | None, **more: Any) -> None:
        outcomes.append(self.path, {"part": self.part, "test": test, "outcome": outcome, "error": error, **more})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running = nodeid
        self.write(nodeid, "crashed", "the process ended within this test")  # until another outcome follows

    def pytest_keyboard_interrupt(self) -> None:
        if self.running is not None:
            self.write(self.running, "interrupted", None)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = (yield).get_result()
        # a test is its call; what fails or skips before or after it counts for it
        if report.when != "call" and (report.passed or (report.when == "teardown" and not report.failed)):
            return
        seconds, properties = round(report.duration, 3), dict(report.user_properties)
        self.write(report.nodeid, report.outcome, first_line(report), seconds=seconds, properties=properties)
        if report.failed and (reason := context_loss()) is not None:
            self.lost = f"{report.nodeid}: {reason}"

    def pytest_runtest_logfinish(self) -> None:
        self.running = None
        if self.lost is not None:
            pytest.exit(f"the CUDA context is lost after {self.lost}", returncode=CONTEXT_LOST)


def first_line(report: pytest.TestReport) -> str | None:
    """The first line of what went wrong, or the reason of a skip."""
    if report.passed:
        return None
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash else report.longrepr).strip()
    return " ".join(text.splitlines()[:2])[:300]


def context_loss() -> str | None:
    """Why the GPU answers no more; None while it does, or where there is none."""
    import torch

    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
