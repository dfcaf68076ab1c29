"""Peak memory of an ode block's forward and backward, in units of one state z `[B,T,D]`, each in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ultra_kernels import _native

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resets the peak by Linux's /proc"),
    pytest.mark.skipif(_native.missing() is not None, reason=f"measures the C++ kernels: {_native.missing()}"),
]

MEASURE = """
import sys
import torch
import torch.nn.functional as F
from ultra.config import load_config
from ultra.layers import attention
from ultra.layers.sequences import Sequences
from ultra.mixers import MIXERS
from ultra_kernels import rotary

mode, steps, B, T, D = sys.argv[1], int(sys.argv[2]), 8, 256, 256
torch.manual_seed(0)
kept = "none" if mode == "plain" else mode
fields = ["layer_pattern=[ode]", f"hidden_size={D}", "num_heads=4", "ode_solver=rk4", f"ode_steps={steps}"]
config = load_config("standard", [f"model.{f}" for f in [*fields, f"ode_checkpoint={kept}"]])
mixer = MIXERS["ode"](config.model).train()

if mode == "plain":  # torch's own attention and turned copies of q and k
    def softmax_attention(q, k, v, seqs, theta=None, prefix=None):
        q, k = (rotary(t, seqs.positions, theta=theta) for t in (q, k))
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    attention.softmax_attention = softmax_attention

def run(T):
    x, cotangent = (torch.randn(B, T, D, requires_grad=r) for r in (True, False))
    torch.autograd.grad(mixer(x, Sequences.dense(T, x.device)), [x, *mixer.parameters()], cotangent)

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

run(8)
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # the peak starts again
run(T)
print((status("VmHWM") - before) / (4 * B * T * D))
"""


def peak(mode: str, steps: int) -> float:
    # what is freed is given back at once, so that the peak is of memory in use
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, mode, str(steps)], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_a_step_costs_one_state() -> None:
    """A quarter of what plain autograd keeps, and one more z for each further step; measured 0.22 and 1.0."""
    four, twelve = peak("step", 4), peak("step", 12)
    assert four < 0.25 * peak("plain", 4)
    assert twelve - four < 8 * 1.5
