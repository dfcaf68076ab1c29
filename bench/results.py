"""Measured cells: one JSON object a line, read by the bench's own table, the GPU summary and the README's table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"
Cell = dict[str, Any]


def read(path: Path) -> list[Cell]:
    """The cells of one file, the last one where a cell was measured twice."""
    cells = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return list({(*_group(c), c["backend"]): c for c in cells}.values())


def derived(cells: Iterable[Cell]) -> list[Cell]:
    """The cells with rates and ratios, sorted for a table.

    gb_per_s, gflop_per_s; share: the limit's time over the cell's; ratios: backend -> its time over the cell's, for
    the reference, torch.compile and the peers that were measured in the same file.
    """
    cells = list(cells)
    times: dict[tuple[str, ...], dict[str, float]] = {}
    for c in cells:
        times.setdefault(_group(c), {})[c["backend"]] = c["ms"]
    out = [
        c
        | {
            "gb_per_s": c["bytes"] / c["ms"] / 1e6,
            "gflop_per_s": c["flops"] / c["ms"] / 1e6,
            "share": c["limit_ms"] / c["ms"],
            "ratios": {
                b: ms / c["ms"]
                for b, ms in times[_group(c)].items()
                if b != c["backend"] and b not in ("native", "triton", "cuda")
            },
        }
        for c in cells
    ]
    return sorted(out, key=lambda c: (*_group(c), c["ms"]))


def _group(cell: Cell) -> tuple[str, ...]:
    """What is compared with each other."""
    return cell["op"], cell["case"], cell["dtype"], cell["mode"]


def lines(cells: Iterable[Cell]) -> list[str]:
    """One line per cell as a table in plain text."""
    rows = derived(cells)
    names = [" ".join(_group(c)) for c in rows]
    width = max(map(len, names), default=0)
    out = [f"{'':{width}}  {'backend':13} {'ms':>9} {'GB/s':>7} {'GFLOP/s':>8} {'of limit':>20}  × others"]
    last = None
    for name, c in zip(names, rows, strict=True):
        limits = c.get("limits_ms", {c["limit"]: c["limit_ms"]})
        share = ", ".join(f"{ms / c['ms']:.0%} {limit}" for limit, ms in list(limits.items())[:2])
        ratios = ", ".join(f"{ratio:.2f} {other}" for other, ratio in c["ratios"].items()) or "-"
        out.append(
            f"{name if name != last else '':{width}}  {c['backend']:13} {c['ms']:9.3f} {c['gb_per_s']:7.1f} "
            f"{c['gflop_per_s']:8.1f} {share:>20}  {ratios}"
        )
        last = name
    return out
