"""other_device.py, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_nothing_is_made_on_the_cpu_by_oversight() -> None:
    command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).with_name("other_device.py"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
