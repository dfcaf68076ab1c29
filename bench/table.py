"""`python -m bench.table` writes the op × backend table between the markers of README.md, from the code."""

from __future__ import annotations

import sys
from pathlib import Path

from ultra_kernels._dispatch import OPS

README = Path(__file__).resolve().parent.parent / "README.md"
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


def updated(readme: str) -> str:
    """`readme` with the table of the code between the markers. Raises ValueError without them."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md needs {BEGIN} and {END} once each")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(updated(text), encoding="utf-8")
    sys.stdout.write(f"{README}: {'unchanged' if updated(text) == text else 'updated'}\n")
