"""Packed rows [1,T,...] with cu_seqlens to dense blocks [S,L,...] and back, for references that compute densely.

Sequences of one length become a view. Others are sorted into groups of similar length, each padded with zeros to its
longest member, so that quadratic work follows the sum of squared lengths and not S·max². Empty ones are in no group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# A sequence joins a group only if it is at least this share of the group's longest: at 0.6 padding at most triples the
# quadratic work, and lengths from 1 to 512 make at most 13 groups.
_SHARE = 0.6


@dataclass(frozen=True)
class Group:
    """S sequences in one dense block of length L; `lengths` [S] int64 is None when all are exactly L long."""

    sequences: torch.Tensor  # [S] int64: which sequences of cu_seqlens
    S: int
    L: int
    lengths: torch.Tensor | None

    def key_mask(self) -> torch.Tensor | None:
        """[S,L], True at pads; None when there are none."""
        if self.lengths is None:
            return None
        return torch.arange(self.L, device=self.lengths.device) >= self.lengths[:, None]


class Packing:
    """The groups of one cu_seqlens, and the moves between packed rows and their blocks. Reads cu_seqlens on the host.

    Raises ValueError when cu_seqlens does not ascend from 0 to `total`, the number of rows.
    """

    def __init__(self, cu_seqlens: torch.Tensor, total: int) -> None:
        bounds = cu_seqlens.detach().to("cpu", torch.int64)
        lengths = bounds.diff()
        if bounds[0] != 0 or bounds[-1] != total or (lengths < 0).any():
            raise ValueError(
                f"cu_seqlens must ascend from 0 to the number of rows, {total}; got {_short(bounds.tolist())}"
            )
        device = cu_seqlens.device
        sorted_lengths, order = lengths.sort(stable=True, descending=True)
        filled = int((lengths > 0).sum())
        sorted_lengths, order = sorted_lengths[:filled], order[:filled]
        self.total, self.groups = total, []
        self._equal = filled > 0 and bool(sorted_lengths[0] == sorted_lengths[-1])
        if self._equal:
            order = order.sort().values
        takes = []
        back = torch.empty(total, dtype=torch.int64)
        first, offset = 0, 0
        while first < filled:
            L = int(sorted_lengths[first])
            last = int((sorted_lengths >= L * _SHARE).sum())
            members, S = order[first:last], last - first
            sizes = lengths[members]
            same = bool(sizes[-1] == L)
            self.groups.append(Group(members.to(device), S, L, None if same else sizes.to(device)))
            if not self._equal:
                place = torch.arange(L)
                inside = place < sizes[:, None]
                rows = bounds[members][:, None] + place
                takes.append(rows.masked_fill(~inside, total).flatten().to(device))  # pads: row `total`
                back[rows[inside]] = offset + inside.flatten().nonzero().squeeze(1)
            first, offset = last, offset + S * L
        self._takes = takes
        self._back = back.to(device)

    def pad(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x [1,T,...] as one block [S,L,...] per group, zeros at pads; a view when all lengths are equal."""
        if self._equal:
            return (x[0].unflatten(0, (self.groups[0].S, self.groups[0].L)),)
        return tuple(_Pad.apply(x[0], self))  # type: ignore[no-untyped-call]

    def unpad(self, blocks: list[torch.Tensor]) -> torch.Tensor:
        """The inverse of pad: [1,T,...] from one block [S,L,...] per group; pads are dropped."""
        if self._equal:
            return blocks[0].flatten(0, 1)[None]
        return _Unpad.apply(self, *blocks)[None]  # type: ignore[no-untyped-call]

    def _gather(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = torch.cat([x, x.new_zeros((1, *x.shape[1:]))])
        return tuple(
            x.index_select(0, take).unflatten(0, (g.S, g.L)) for take, g in zip(self._takes, self.groups, strict=True)
        )

    def _scatter(self, blocks: tuple[torch.Tensor, ...]) -> torch.Tensor:
        flat = [b.flatten(0, 1) for b in blocks]
        return (flat[0] if len(flat) == 1 else torch.cat(flat)).index_select(0, self._back)


class _Pad(torch.autograd.Function):
    """The gradient of a gather with distinct rows is a gather; torch's own would add row by row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packing: Packing) -> Any:
        ctx.packing = packing
        return packing._gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _Unpad.apply(ctx.packing, *grads), None  # type: ignore[no-untyped-call]


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packing: Packing, *blocks: torch.Tensor) -> Any:
        ctx.packing = packing
        return packing._scatter(blocks)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return None, *_Pad.apply(grad, ctx.packing)  # type: ignore[no-untyped-call]


def by_sequence(dense: Callable[..., torch.Tensor], cu_seqlens: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
    """Packed rows [1,T,...] through dense(group, *blocks [S,L,...]) -> [S,L,...], group by group, to rows [1,T,...]."""
    packing = Packing(cu_seqlens, rows[0].shape[1])
    if not packing.groups:  # no rows at all; the call keeps the shapes and the autograd graph
        none = Group(torch.zeros(0, dtype=torch.int64, device=cu_seqlens.device), 0, 0, None)
        return dense(none, *(x[:0] for x in rows)).flatten(0, 1)[None]
    blocks = [packing.pad(x) for x in rows]
    return packing.unpad([dense(g, *(b[i] for b in blocks)) for i, g in enumerate(packing.groups)])


def check_cu_seqlens(op: str, x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
    """The checks that need no data. Raises ValueError."""
    if cu_seqlens is None:
        return
    if x.shape[0] != 1:
        raise ValueError(f"{op}: with cu_seqlens the batch size must be 1, got {tuple(x.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{op}: cu_seqlens must be int32 [num_seqs + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{values[0]}, {values[1]}, ..., {values[-1]}]"
