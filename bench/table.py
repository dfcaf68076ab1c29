"""`python -m bench.table` writes what stands between the markers of README.md.

The op × backend table from the code, then one table of speed per machine from bench/results, GPUs first.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench import results
from ultra_kernels._dispatch import OPS

README = Path(__file__).resolve().parent.parent / "README.md"
MODES = ("forward", "training")
BEGIN, END = "<!-- ops:begin -->", "<!-- ops:end -->"
COLUMNS = {"reference": "PyTorch", "native": "C++ (CPU)", "triton": "Triton (NVIDIA)", "cuda": "CUDA C++ (NVIDIA)"}


def table() -> str:
    """One line per op in alphabetical order, one column per kind of backend that any op has."""
    columns = [b for b in COLUMNS if b == "reference" or any(b in op.names for op in OPS.values())]
    lines = ["| op | " + " | ".join(COLUMNS[c] for c in columns) + " |", "|---|" + ":-:|" * len(columns)]
    for name, op in sorted(OPS.items()):
        has = {"reference", *op.names}
        lines.append(f"| `{name}` | " + " | ".join("✓" if c in has else "–" for c in columns) + " |")
    return "\n".join(lines)


def speed(folder: Path = results.FOLDER) -> str:
    """Per results file the machine and a table of each op's best backend; what nobody measured says so."""
    files = [results.read(path) for path in sorted(folder.glob("*.jsonl"))]
    gpus = [cells for cells in files if cells[0]["gpu"]]
    none = [] if gpus else ["No op has been timed on a GPU yet; `bench/gpu_check.sh` does it."]
    return "\n\n".join([*none, *map(_speed_of, gpus), *(_speed_of(c) for c in files if not c[0]["gpu"])])


def _speed_of(cells: list[results.Cell]) -> str:
    about = cells[0]
    wanted, other = ("bfloat16", "float32") if about["gpu"] else ("float32", "bfloat16")
    threads = "" if about["gpu"] else f", {about['threads']} threads"
    commits = list(dict.fromkeys(c["commit"] for c in cells))
    lines = [
        f"On {about['machine']}{threads} with torch {about['torch']} and Triton {about['triton']}, "
        f"commit{'s'[: len(commits) > 1]} {', '.join(commits)}: the fastest backend of each op in {wanted} "
        f"({other} where it has none), its time, and its share of what memory, matrix products or exponentials allow "
        "(bench/README.md). × reference and × peer: their time over this one's, the fastest of those peers that were "
        "installed.",
        "",
        "| op | case | backend |" + "".join(f" {m}, ms | of limit | × reference | × peer |" for m in MODES),
        "|---|---|---|" + "--:|" * 8,
    ]
    for name, op in sorted(OPS.items()):
        own = results.derived(c for c in cells if c["op"] == name)
        for case in dict.fromkeys(c["case"] for c in own):
            lines.append(_row(name, wanted, [c for c in own if c["case"] == case and c["backend"] in op.names]))
        if not own:
            lines.append(f"| `{name}` | not measured |" + " |" * 9)
    return "\n".join(lines)


def _row(name: str, wanted: str, cells: list[results.Cell]) -> str:
    """One case of one op: the backend with the least time, forward and training, in the dtype shown."""
    dtype = wanted if any(c["dtype"] == wanted for c in cells) else cells[0]["dtype"]
    backend = min((c for c in cells if c["dtype"] == dtype), key=lambda c: (c["mode"] != "training", c["ms"]))[
        "backend"
    ]
    found = {c["mode"]: c for c in cells if c["dtype"] == dtype and c["backend"] == backend}
    row = [f"`{name}`", cells[0]["case"], backend]
    for mode in MODES:
        if (c := found.get(mode)) is None:
            row += ["not measured", "", "", ""]
        else:
            ratio = c["ratios"].get("reference")
            peers = {b: r for b, r in c["ratios"].items() if b not in ("reference", "torch.compile")}
            peer = min(peers, key=lambda b: peers[b], default=None)
            row += [f"{c['ms']:.3f}", f"{c['share']:.0%}", f"{ratio:.1f}" if ratio else ""]
            row.append(f"{peers[peer]:.1f} {peer}" if peer else "")
    return "| " + " | ".join(row) + " |"


def updated(readme: str) -> str:
    """`readme` with the tables between the markers. Raises ValueError without them."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md needs {BEGIN} and {END} once each")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n\n{speed()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(updated(text), encoding="utf-8")
    sys.stdout.write(f"{README}: {'unchanged' if updated(text) == text else 'updated'}\n")
