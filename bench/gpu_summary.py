"""The page that gpu_check.sh ends with, from its folder: `python -m bench.gpu_summary FOLDER PART...` prints it."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

from bench import outcomes, results

MOST_LISTED = 40  # failures; all are in outcomes.jsonl


def page(folder: Path, parts: list[str]) -> str:
    facts = json.loads((folder / "machine.json").read_text())
    lines = outcomes.read(folder / "outcomes.jsonl")
    sections = [heading(facts), states(lines, parts)]
    for part in ("test", "train"):
        if found := outcomes.tests(lines, part):
            sections.append(counted(part, found))
    if found := outcomes.tests(lines, "test"):
        sections += [worst(found), host_waits(found)]
    if found := outcomes.tests(lines, "train"):
        sections.append(losses(found))
    if found := outcomes.tests(lines, "sanitize"):
        sections.append(sanitized(found, folder / "sanitize.log"))
    files = [p for p in sorted(folder.glob("*.jsonl")) if p.name != "outcomes.jsonl"]
    sections.append(benched([c for p in files for c in results.read(p)], outcomes.tests(lines, "bench")))
    return "\n\n".join(s for s in sections if s) + "\n"


def heading(facts: dict[str, object]) -> str:
    names = ("driver", "cuda", "torch", "triton", "python", "commit", "sources")
    versions = ", ".join(f"{name} {facts[name] or 'unknown'}" for name in names)
    return f"# GPU check: {facts['machine'] if facts['gpu'] else 'no GPU'}\n\n{versions}"


def states(lines: list[outcomes.Line], parts: list[str]) -> str:
    ended = outcomes.parts(lines)
    rows = ["| part | result | seconds | |", "|---|---|--:|---|"]
    for part in parts:
        end = ended.get(part, {"status": "not run", "seconds": 0, "reason": ""})
        rows.append(f"| {part} | {end['status']} | {end['seconds']:.0f} | {one_line(end['reason'])} |")
    return "\n".join(rows)


def counted(part: str, found: dict[str, outcomes.Line]) -> str:
    """How many tests ended how, and the failures by name with the first line of each."""
    counts = Counter(line["outcome"] for line in found.values())
    total = ", ".join(f"{counts[o]} {o}" for o in ("passed", "failed", "crashed", "skipped") if counts[o])
    bad = [line for line in found.values() if line["outcome"] in ("failed", "crashed")]
    shown = [f"- {line['test'].split('::', 1)[-1]}: {one_line(line['error'])}" for line in bad[:MOST_LISTED]]
    more = [f"- and {len(bad) - MOST_LISTED} more, in outcomes.jsonl"] if len(bad) > MOST_LISTED else []
    skips = Counter(one_line(line["error"]) for line in found.values() if line["outcome"] == "skipped")
    reasons = [f"- skipped {n}: {reason}" for reason, n in skips.most_common(8)]
    return "\n".join([f"## {part}: {total}", "", *shown, *more, *reasons]).rstrip()


def worst(found: dict[str, outcomes.Line]) -> str:
    """The largest error as a share of its tolerance, per op, backend and dtype; 1 would fail."""
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for line in found.values():
        properties = line.get("properties", {})
        if "of_tolerance" in properties:
            name, backend, dtype = properties["cell"]
            row = cells.setdefault((name, backend), {})
            row[dtype] = max(row.get(dtype, 0.0), properties["of_tolerance"])
    if not cells:
        return ""
    dtypes = sorted({d for row in cells.values() for d in row}, reverse=True)
    rows = [
        f"| {name} | {backend} | " + " | ".join(f"{row[d]:.2f}" if d in row else "–" for d in dtypes) + " |"
        for (name, backend), row in sorted(cells.items())
    ]
    head = [f"| op | backend | {' | '.join(dtypes)} |", "|---|---|" + "--:|" * len(dtypes)]
    return "\n".join(["## Largest error over its tolerance (tests that passed)", "", *head, *rows])


def host_waits(found: dict[str, outcomes.Line]) -> str:
    names = sorted({p["host_waits"] for line in found.values() if "host_waits" in (p := line.get("properties", {}))})
    return f"References that make the host wait for the GPU: {', '.join(names)}." if names else ""


def losses(found: dict[str, outcomes.Line]) -> str:
    rows = [
        f"- {p['preset']}: loss {p['first_loss']:.3f} at step 1, {p['last_loss']:.3f} at step {p['steps']}"
        for line in found.values()
        if "preset" in (p := line.get("properties", {}))
    ]
    return "\n".join(["## Training in bfloat16", "", *rows]) if rows else ""


def sanitized(found: dict[str, outcomes.Line], log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    verdicts = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    rows = [f"- {tool}: {line['outcome']} ({line['error']})" for tool, line in found.items()]
    return "\n".join(["## compute-sanitizer", "", *rows, *(f"- summary line: {v}" for v in verdicts)])


def benched(cells: list[results.Cell], found: dict[str, outcomes.Line]) -> str:
    """The table of measured cells, then what was not measured and why, counted by reason."""
    out = ["## Bench"]
    if cells:
        out += ["", "```", *results.lines(cells), "```"]
    missing = Counter(one_line(line["error"]) for line in found.values() if line["outcome"] != "passed")
    ops: dict[str, set[str]] = {}
    for test, line in found.items():
        if line["outcome"] != "passed":
            ops.setdefault(one_line(line["error"]), set()).add(test.split("[", 1)[-1].split("-", 1)[0])
    if missing:
        out += ["", "Not measured:", ""]
        out += [f"- {n} cells of {', '.join(sorted(ops[reason]))}: {reason}" for reason, n in missing.most_common()]
    elif not cells:
        out += ["", "Nothing was measured."]
    return "\n".join(out)


def one_line(text: str | None) -> str:
    """As a cell of a Markdown table."""
    return " ".join((text or "").split()).replace("|", "/")[:300]


if __name__ == "__main__":
    sys.stdout.write(page(Path(sys.argv[1]), sys.argv[2:]))
