"""How the rows of a batch divide into sequences. Mixers see packed or dense rows, never padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Sequences:
    """The sequences of an input `[B,T,D]`.

    Dense: cu_seqlens None, B sequences of T tokens. Packed: B is 1 and sequence i is rows cu_seqlens[i] to
    cu_seqlens[i+1] (int32, [S+1]). positions `[T]`: each token's place in its own sequence.
    """

    cu_seqlens: torch.Tensor | None
    max_seqlen: int
    positions: torch.Tensor

    @classmethod
    def dense(cls, T: int, device: torch.device) -> Sequences:
        return cls(None, T, torch.arange(T, device=device))

    @classmethod
    def packed(cls, cu_seqlens: torch.Tensor, max_seqlen: int, total: int) -> Sequences:
        place = torch.arange(total, device=cu_seqlens.device)
        # right=True: the sequence of token t is the last border at or before t, so empty sequences are skipped
        sequence = torch.searchsorted(cu_seqlens, place.to(cu_seqlens.dtype), right=True) - 1
        return cls(cu_seqlens, max_seqlen, place - cu_seqlens.long()[sequence])

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the packed sequences, on the host."""
        if self.cu_seqlens is None:
            raise ValueError("dense sequences have one length: max_seqlen")
        return tuple(self.cu_seqlens.diff().tolist())

    @cached_property
    def by_length(self) -> tuple[list[tuple[int, int]], torch.Tensor, torch.Tensor] | None:
        """The packed sequences sorted by length: [(count, length)], the rows in that order, and the way back.

        None when all have one length, so that the packed rows can be viewed as a dense batch.
        """
        lengths = torch.tensor(self.lengths)
        if lengths.numel() and bool((lengths == lengths[0]).all()):
            return None
        order = torch.argsort(lengths, stable=True)
        cu = torch.zeros(lengths.numel() + 1, dtype=torch.long)
        cu[1:] = lengths.cumsum(0)
        sorted_lengths = lengths[order]
        starts = torch.repeat_interleave(cu[order], sorted_lengths)
        sorted_cu = sorted_lengths.cumsum(0) - sorted_lengths
        rows = starts + torch.arange(int(cu[-1])) - torch.repeat_interleave(sorted_cu, sorted_lengths)
        back = torch.empty_like(rows)
        back[rows] = torch.arange(rows.numel())
        values, counts = sorted_lengths.unique_consecutive(return_counts=True)
        groups = [(c, n) for c, n in zip(counts.tolist(), values.tolist(), strict=True) if n > 0]
        return groups, rows.to(self.positions.device), back.to(self.positions.device)


@torch.compiler.disable(reason="how many tokens are no padding is data")
def unpad(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """mask bool `[B,T]`, True = a token -> (flat indices of the tokens, cu_seqlens, longest length).

    None when there is no padding. Left, right and scattered padding are all taken; a row without a token is a sequence
    of length 0.
    """
    if bool(mask.all()):
        return None
    lengths = mask.sum(1)
    cu_seqlens = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    cu_seqlens[1:] = lengths.cumsum(0)
    return mask.flatten().nonzero().squeeze(1), cu_seqlens, int(lengths.max())
