"""Padding by cu_seqlens: exact inverse, right gradients, no leak, views where nothing has to move."""

from __future__ import annotations

import pytest
import torch

from ultra_kernels._packed import Packing, by_sequence

LENGTHS = [[5], [4, 4, 4], [3, 0, 7, 1, 7, 0], [0, 1], [2, 20, 3, 19, 0, 11], [0, 6, 0, 6]]


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_blocks_hold_each_sequence_and_zeros(lengths: list[int]) -> None:
    T = sum(lengths)
    x = torch.arange(1.0, 2 * T + 1).view(1, T, 2)
    packing = Packing(bounds(lengths), T)
    blocks = packing.pad(x)
    pieces = x[0].split(lengths)
    seen = []
    for group, block in zip(packing.groups, blocks, strict=True):
        assert block.shape == (group.S, group.L, 2) and group.sequences.shape == (group.S,)
        for row, s in zip(block, group.sequences.tolist(), strict=True):
            n = lengths[s]
            assert torch.equal(row[:n], pieces[s]) and not row[n:].any()
            seen.append(s)
        pads = group.key_mask()
        want = torch.arange(group.L) >= torch.tensor([lengths[s] for s in group.sequences.tolist()])[:, None]
        assert not want.any() if pads is None else torch.equal(pads, want)
    assert sorted(seen) == [s for s, n in enumerate(lengths) if n]
    assert torch.equal(packing.unpad(list(blocks)), x)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_gradients_twice(lengths: list[int]) -> None:
    cu = bounds(lengths)
    x = torch.randn(1, sum(lengths), 3, dtype=torch.float64, requires_grad=True)

    def f(x: torch.Tensor) -> torch.Tensor:  # mixes rows of one sequence; pads count only as zeros
        return by_sequence(lambda group, a: a * (a * a).sum(1, keepdim=True), cu, x)

    assert torch.autograd.gradcheck(f, x) and torch.autograd.gradgradcheck(f, x)


def test_equal_lengths_are_a_view() -> None:
    x = torch.randn(1, 12, 2, 3)
    (block,) = Packing(bounds([4, 0, 4, 4]), 12).pad(x)
    assert block.data_ptr() == x.data_ptr() and block._base is x
    strided = torch.randn(2, 12, 5)[None].permute(0, 2, 1, 3)[:, :4]
    assert Packing(bounds([2, 2]), 4).pad(strided)[0].data_ptr() == strided.data_ptr()


def test_similar_lengths_share_a_block_and_different_ones_do_not() -> None:
    packing = Packing(bounds([100, 3, 90, 2, 99]), 294)
    assert [(g.S, g.L) for g in packing.groups] == [(3, 100), (2, 3)]


def test_bounds_must_cover_the_rows() -> None:
    for wrong in ([0, 3], [1, 4], [0, 5, 4], [0, 5]):
        with pytest.raises(ValueError, match="number of rows, 4"):
            Packing(torch.tensor(wrong, dtype=torch.int32), 4)
