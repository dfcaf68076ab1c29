"""Shapes, inputs, bytes and flops of the selective scan, for tests and bench."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .._testing import Case, Inputs


def scan_inputs(
    g: torch.Generator,
    batch: int,
    channels: int,
    length: int,
    states: int,
    *,
    groups: int = 0,
    directions: tuple[int, ...] = (),
    rows: bool = False,
    bare: bool = False,
    cu: tuple[int, ...] | None = None,
) -> Inputs:
    """Decays and step sizes as a trained layer has them: A = −(1..N), Δ from 0.003 to 0.3 after the softplus.

    rows: `[B,L,D]` memory seen as `[B,D,L]`, as the encoder passes it; bare: no D, z, delta_bias, softplus.
    """

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def wide(*lead: int) -> torch.Tensor:
        if rows:
            return randn(*lead, batch, length, channels).transpose(-1, -2)
        return randn(*lead, batch, channels, length)

    grouped = (groups,) if groups else ()
    A = -(1 + torch.arange(states, dtype=torch.float64)).expand(*directions, channels, states)
    inputs: Inputs = {
        "u": wide(),
        "delta": wide(*directions) - 3,
        "A": A * (1 + 0.1 * randn(*directions, channels, states)),
        "B": randn(*directions, batch, *grouped, states, length),
        "C": randn(*directions, batch, *grouped, states, length),
    }
    if bare:
        inputs["delta"] = 0.3 * torch.sigmoid(inputs["delta"])
    else:
        inputs |= {
            "D": randn(channels),
            "z": wide(),
            "delta_bias": 0.3 * randn(*directions, channels),
            "delta_softplus": True,
        }
    if cu is not None:
        inputs["cu_seqlens"] = torch.tensor(cu, dtype=torch.int32)
    return inputs


def _case(
    name: str,
    batch: int,
    channels: int,
    length: int,
    states: int,
    *,
    groups: int = 0,
    rows: bool = False,
    bare: bool = False,
    cu: tuple[int, ...] | None = None,
    direction: str = "forward",
    last: bool = False,
    bench: bool = False,
) -> Case:
    def make(g: torch.Generator) -> Inputs:
        inputs = scan_inputs(g, batch, channels, length, states, groups=groups, rows=rows, bare=bare, cu=cu)
        return inputs | {"direction": direction, "return_last_state": last}

    return scan_case(name, make, batch, channels, length, states, bench=bench)


def scan_case(
    name: str,
    make: Callable[[torch.Generator], Inputs],
    batch: int,
    channels: int,
    length: int,
    states: int,
    *,
    directions: int = 1,
    bench: bool = False,
) -> Case:
    return Case(
        name=name,
        make=make,
        small=("A", "D", "delta_bias"),
        # dA sums over batch and time, dB over channels, and each term is itself a sum over time and states
        reduction=max(batch * length, channels) * length * states,
        # u, z, out once; delta, B, C once per direction
        elements=batch * length * (3 * channels + directions * (channels + 2 * states)),
        # Δ A, exp, Δ u B, two multiply-adds
        flops=7 * directions * batch * length * channels * states,
        exps=directions * batch * length * channels * states,
        bench=bench,
    )


CASES = [
    _case("1x1x1-N1", 1, 1, 1, 1),
    _case("T1-D7-N16", 2, 7, 1, 16, last=True),
    _case("T63-D17-N16", 1, 17, 63, 16, last=True),
    _case("rows-T113-D40-N17", 1, 40, 113, 17, rows=True),
    _case("backward-T65-D16-N3", 2, 16, 65, 3, direction="backward", last=True),
    _case("groups-T40-D24-N5", 2, 24, 40, 5, groups=3),
    _case("bare-T130-D33-N4", 1, 33, 130, 4, bare=True, last=True),
    _case("ragged-T150-D19-N8", 1, 19, 150, 8, rows=True, cu=(0, 1, 1, 66, 79, 150, 150), last=True),
    _case("ragged-backward-T97-D9-N2", 1, 9, 97, 2, cu=(0, 0, 3, 96, 97), direction="backward", last=True),
    _case("standard-T512-D1536-N16", 1, 1536, 512, 16, rows=True, bench=True),
]
