"""What gpu_check.sh has found so far: one JSON object a line, appended as it happens, so that a killed run keeps it.

{"part", "status", "seconds", "reason"} ends a part: passed, failed, skipped, or incomplete (out of time).
{"part", "test", "outcome", "seconds", "error", "properties"} is one test or tool run within it; the last line counts.

As a pytest plugin (-p bench.outcomes --outcomes FILE --outcomes-part PART) it writes a line per test, leaves out the
tests that FILE has already, and ends the process with CONTEXT_LOST when a kernel has broken the CUDA context, in which
every later test would fail too.

    python bench/outcomes.py FILE add PART STATUS SECONDS REASON      ends a part
    python bench/outcomes.py FILE status PART                         prints how it ended, or "none"
    python bench/outcomes.py FILE tool PART NAME EXIT_STATUS          adds the run of a tool
    python bench/outcomes.py FILE clean PART                          exit status 1 when a test of it failed
    python bench/outcomes.py FILE forget PART
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

CONTEXT_LOST = 86
Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """All lines; one cut short by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def append(path: Path, line: Line) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def parts(lines: list[Line]) -> dict[str, Line]:
    """part -> its last ending."""
    return {line["part"]: line for line in lines if "status" in line}


def tests(lines: list[Line], part: str) -> dict[str, Line]:
    """test -> its last outcome in `part`: passed, failed, skipped or crashed; interrupted ones are yet to run."""
    found = {line["test"]: line for line in lines if line["part"] == part and "outcome" in line}
    return {name: line for name, line in found.items() if line["outcome"] != "interrupted"}


# ---- the pytest plugin ---------------------------------------------------------------------------------------


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
        done = tests(read(self.path), self.part)
        if known := [item for item in items if item.nodeid in done]:
            items[:] = [item for item in items if item.nodeid not in done]
            config.hook.pytest_deselected(items=known)

    def write(self, test: str, outcome: str, error: str | None, **more: Any) -> None:
        append(self.path, {"part": self.part, "test": test, "outcome": outcome, "error": error, **more})

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


def main(arguments: list[str]) -> int:
    path, verb, part, *rest = Path(arguments[0]), *arguments[1:]
    lines = read(path)
    if verb == "add":
        status, seconds, reason = rest
        append(path, {"part": part, "status": status, "seconds": float(seconds), "reason": reason})
    elif verb == "status":
        sys.stdout.write(str(parts(lines).get(part, {}).get("status", "none")) + "\n")
    elif verb == "tool":
        name, status = rest
        outcome = {"0": "passed", "124": "interrupted"}.get(status, "failed")
        append(path, {"part": part, "test": name, "outcome": outcome, "error": f"exit status {status}"})
    elif verb == "clean":
        return int(any(line["outcome"] in ("failed", "crashed") for line in tests(lines, part).values()))
    elif verb == "forget":
        path.write_text("".join(json.dumps(line) + "\n" for line in lines if line["part"] != part), encoding="utf-8")
    else:
        raise ValueError(f"unknown verb {verb!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
