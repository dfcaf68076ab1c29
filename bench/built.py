"""Prints in one line what the installed `ultra_kernels` was built with, from its _build_info.json; needs no torch."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path


def main() -> int:
    file = Path(str(importlib.metadata.distribution("ultra").locate_file("ultra_kernels/_build_info.json")))
    info = json.loads(file.read_text())
    # one object per library; an older layout had the C++ library's state and reason on the first level
    parts = {k: v for k, v in info.items() if isinstance(v, dict)} or {"cpp": {**info, "state": info["cpp"]}}
    sys.stdout.write("; ".join(f"{name} {describe(part)}" for name, part in parts.items()) + "\n")
    return 0


def describe(part: dict[str, object]) -> str:
    if part["state"] == "built":
        what = part.get("archs") or part.get("isas") or ""
        return f"built ({', '.join(map(str, what))})" if isinstance(what, list) and what else "built"
    reason = str(part.get("reason", "no reason recorded")).strip().splitlines()[-1]
    return f"{part['state']}: {reason}; to mend: {part.get('fix', 'unknown')}"


if __name__ == "__main__":
    sys.exit(main())
