"""`python -m bench.blocks mamba retnet`: where the time of a mixer's forward and backward goes, operation by operation.

At the width of BERT base, one row of tokens (`--length`, default 512), float32, on the GPU if there is one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from bench.limits import copy_bandwidth, matmul_rate
from bench.timing import measure, synchronize
from ultra.config import load_config
from ultra.layers.sequences import Sequences
from ultra.mixers import MIXERS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 20


def step(name: str, width: int, length: int) -> Callable[[], None]:
    """Forward and backward of one mixer, gradients to its input and parameters."""
    torch.manual_seed(0)
    config = load_config("standard", [f"model.layer_pattern=[{name}]", f"model.hidden_size={width}"])
    mixer = MIXERS[name](config.model).to(DEVICE).train()
    x = torch.randn(1, length, width, device=DEVICE, requires_grad=True)
    cotangent = torch.randn_like(x)
    seqs = Sequences.dense(length, torch.device(DEVICE))
    leaves = [x, *(p for p in mixer.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(mixer(x, seqs), leaves, cotangent, allow_unused=True) and None


def shares(call: Callable[[], None]) -> list[tuple[str, int, float]]:
    """(operation, calls in one step, its own microseconds in one step), longest first."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
    call()
    with profile(activities=activities) as found:
        for _ in range(ROUNDS):
            call()
        synchronize(DEVICE)
    own = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    rows = [(e.key, e.count // ROUNDS, getattr(e, own) / ROUNDS) for e in found.key_averages()]
    return sorted(rows, key=lambda row: -row[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(": ", 1)[-1].splitlines()[0])
    parser.add_argument("mixers", nargs="+", choices=list(MIXERS))
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--width", type=int, default=768)
    args = parser.parse_args()
    copy, matmul = copy_bandwidth(DEVICE) / 1e9, matmul_rate(DEVICE, torch.float32) / 1e9
    print(f"copy {copy:.1f} GB/s, float32 matmul {matmul:.0f} GFLOP/s, {torch.get_num_threads()} threads")
    for name in args.mixers:
        call = step(name, args.width, args.length)
        timing = measure(call, DEVICE, 2.0)
        rows = shares(call)
        total = sum(time for _, _, time in rows)
        print(f"\n{name}, {args.length} tokens, width {args.width}: {timing.median * 1e3:.2f} ms forward and backward")
        for key, calls, time in rows[:14]:
            print(f"  {time / total:6.1%} {time / 1e3:8.3f} ms {calls:4d} × {key}")


if __name__ == "__main__":
    main()
