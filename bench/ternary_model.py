"""`python -m bench.ternary_model`: a whole encoder with ternary weights beside itself in float32, on the CPU.

The preset frankenstein (or another CONFIG with key=value) with random weights, one row of 128 tokens, 2 threads. Timed
are `float32`, the network with plain linear layers; `trained`, the BitNet as training evaluates it, which rounds its
weights at every call; and `ternary`, what `ultra export --format ternary` makes of it. The three take turns, so that
what else the machine does meets all alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from bench.machine import cpu_name
from ultra.config import load_config
from ultra.export.ternary import linear_bytes, pack
from ultra.model import build_model


def encoder(config: str, overrides: list[str]) -> nn.Module:
    torch.manual_seed(0)
    return build_model(load_config(config, overrides)).eval().requires_grad_(False)


def take_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(": ", 1)[-1].splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="CONFIG key=value", help="default: frankenstein")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_intermixed_args(argv)
    config, *overrides = args.words or ["frankenstein"]
    torch.set_num_threads(args.threads)
    models = {
        "float32": encoder(config, [*overrides, "model.use_bitnet=false"]),
        "trained": encoder(config, [*overrides, "model.use_bitnet=true"]),
        "ternary": encoder(config, [*overrides, "model.use_bitnet=true"]),
    }
    pack(models["ternary"])
    matrices, packed, unpacked = linear_bytes(models["ternary"])
    ids = torch.randint(5, load_config(config, overrides).model.vocab_size, (1, args.tokens))
    with torch.inference_mode():
        calls = {name: lambda model=model: model(ids) for name, model in models.items()}  # type: ignore[misc]
        times = take_turns(calls, args.rounds)
        apart = (models["ternary"](ids).last_hidden_state - models["trained"](ids).last_hidden_state).abs()
    print(f"{config} {' '.join(overrides)}: 1 × {args.tokens} tokens, {args.threads} threads, {cpu_name()}")
    middle = {name: statistics.median(found) for name, found in times.items()}
    for name, seconds in middle.items():
        print(
            f"{name:8} {seconds * 1e3:9.1f} ms (best {min(times[name]) * 1e3:.1f}); "
            f"ternary is {seconds / middle['ternary']:.2f} times as fast"
        )
    print(f"{matrices} linear weights: {packed:,} bytes ternary, {unpacked:,} float32: 1/{unpacked / packed:.1f}")
    print(f"hidden states of trained and ternary: {apart.median():.1e} apart in the median, {apart.max():.1e} at most")


if __name__ == "__main__":
    main()
