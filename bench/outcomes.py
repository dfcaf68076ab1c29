"""What gpu_check.sh has found so far: one JSON object a line, appended as it happens, so that a killed run keeps it.

{"part", "status", "seconds", "reason"} ends a part: passed, failed, skipped, or incomplete (out of time).
{"part", "test", "outcome", "seconds", "error", "properties"} is one test or tool run within it; the last line counts.

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
