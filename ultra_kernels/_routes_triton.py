"""The router in Triton: which experts each token goes to, with which gates, and where the pairs lie.

Two launches, whatever the routing is. Tokens are cut into at most MAX_BLOCKS blocks. The first kernel chooses and
counts per block; in the second, each block adds up the counts of all for itself and places its pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ._triton import Configuration

# As int32 and beyond NaN: below every key that a logit has.
_TAKEN = tl.constexpr(-9223372036854775807)


@triton.jit
def _logits(logits, t, end, e, E):
    """Rows t of logits, their softmax and logsumexp; columns beyond E are -inf, rows beyond end are 0."""
    at = t.to(tl.int64)[:, None] * E + e[None, :]
    own = tl.load(logits + at, mask=(t < end)[:, None] & (e < E)[None, :], other=0.0)
    own = tl.where((e < E)[None, :], own, float("-inf"))
    most = tl.max(own, axis=1)
    p = tl.exp(own - most[:, None])
    total = tl.sum(p, axis=1)
    return own, p / total[:, None], most + tl.log(total)


@triton.jit
def _gates(logits, taken, normalize):
    """The softmax over the experts taken, or over all without normalize."""
    among = tl.where(taken, logits, tl.where(normalize != 0, float("-inf"), logits))
    q = tl.exp(among - tl.max(among, axis=1)[:, None])
    return q / tl.sum(q, axis=1)[:, None]


@triton.jit
def _key(scores, e, WIDTH: tl.constexpr):
    """int64 in the order of the scores, NaN first, and of equal ones by e, the lowest first."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)  # -0 is 0
    ascending = tl.where(scores == scores, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return ascending.to(tl.int64) * WIDTH + (WIDTH - 1 - e)[None, :]


_NUMBERS = ["T", "E", "top_k", "per_block", "blocks", "num_bias", "normalize"]


@triton.jit(do_not_specialize=_NUMBERS)
def choose_kernel(
    logits, select_bias, gates, chosen, counts, probs, squares, T, E, top_k, per_block, num_bias, normalize,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """gates and chosen `[T, k]` of a block of tokens, and its sums: counts and probs `[blocks, E]`, squares `[blocks]`.

    By softmax + select_bias where num_bias is E, by the logits where it is 0. squares are of the logsumexp.
    """
    block, e = tl.program_id(0), tl.arange(0, WIDTH)
    bias = tl.load(select_bias + e, mask=e < num_bias, other=0.0)
    count = tl.zeros((ROWS, WIDTH), tl.int32)
    prob = tl.zeros((ROWS, WIDTH), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    begin = block * per_block
    end = tl.minimum(begin + per_block, T)
    for first in range(begin, end, ROWS):
        t = first + tl.arange(0, ROWS)
        inside = (t < end)[:, None] & (e < E)[None, :]
        own, p, lse = _logits(logits, t, end, e, E)
        key = _key(tl.where(num_bias != 0, p + bias[None, :], own), e, WIDTH)
        key = tl.where((e < E)[None, :], key, _TAKEN)
        rank = tl.full((ROWS, WIDTH), -1, tl.int32)
        for j in range(0, top_k):
            best = key == tl.max(key, axis=1)[:, None]
            rank = tl.where(best, j, rank)
            key = tl.where(best, _TAKEN, key)
        taken = rank >= 0
        at = t.to(tl.int64)[:, None] * top_k + rank
        gate = tl.where((lse == lse)[:, None], _gates(own, taken, normalize), lse[:, None])
        tl.store(gates + at, gate, mask=inside & taken)
        tl.store(chosen + at, tl.broadcast_to(e[None, :], (ROWS, WIDTH)), mask=inside & taken)
        count += (inside & taken).to(tl.int32)
        prob += tl.where(inside, p, 0.0)
        square += tl.where(t < end, lse * lse, 0.0)
    tl.store(counts + block * E + e, tl.sum(count, axis=0), mask=e < E)
    tl.store(probs + block * E + e, tl.sum(prob, axis=0), mask=e < E)
    tl.store(squares + block, tl.sum(square, axis=0))


@triton.jit
def _ranks(chosen, t, end, e, top_k, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Which of token t's choices e is, or -1."""
    rank = tl.full((ROWS, WIDTH), -1, tl.int32)
    for j in range(0, top_k):
        choice = tl.load(chosen + t.to(tl.int64) * top_k + j, mask=t < end, other=-1)
        rank = tl.where(choice[:, None] == e[None, :], j, rank)
    return rank


@triton.jit(do_not_specialize=_NUMBERS)
def place_kernel(
    chosen, counts, probs, squares, order, inverse, ends, totals, mean_prob, z, T, E, top_k, per_block, blocks,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """order and inverse of a block of tokens; the first block also writes ends, totals and mean_prob `[E]` and z."""
    block, e = tl.program_id(0), tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.int32)
    place = tl.zeros((WIDTH,), tl.int32)
    prob = tl.zeros((ROWS, WIDTH), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for first in range(0, blocks, ROWS):
        b = first + tl.arange(0, ROWS)
        inside = (b < blocks)[:, None] & (e < E)[None, :]
        count = tl.load(counts + b[:, None] * E + e[None, :], mask=inside, other=0)
        total += tl.sum(count, axis=0)
        place += tl.sum(tl.where((b < block)[:, None], count, 0), axis=0)
        prob += tl.load(probs + b[:, None] * E + e[None, :], mask=inside, other=0.0)
        square += tl.load(squares + b, mask=b < blocks, other=0.0)
    until = tl.cumsum(total, axis=0)
    if block == 0:
        tokens = tl.maximum(T, 1).to(tl.float32)
        tl.store(ends + e, until.to(tl.int64), mask=e < E)
        tl.store(totals + e, total.to(tl.int64), mask=e < E)
        tl.store(mean_prob + e, tl.sum(prob, axis=0) / tokens, mask=e < E)
        tl.store(z, tl.sum(square, axis=0) / tokens)
    place += until - total
    begin = block * per_block
    end = tl.minimum(begin + per_block, T)
    for first in range(begin, end, ROWS):
        t = first + tl.arange(0, ROWS)
        rank = _ranks(chosen, t, end, e, top_k, ROWS, WIDTH)
        taken = (rank >= 0).to(tl.int32)
        row = place[None, :] + tl.cumsum(taken, axis=0) - taken
        pair = t[:, None] * top_k + rank
        tl.store(order + row, pair.to(tl.int64), mask=rank >= 0)
        tl.store(inverse + pair, row.to(tl.int64), mask=rank >= 0)
        place += tl.sum(taken, axis=0)


@triton.jit(do_not_specialize=_NUMBERS)
def logits_grad_kernel(
    dgates, dmean_prob, dz, logits, chosen, dlogits, T, E, top_k, normalize,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dlogits `[T, E]` of ROWS tokens: the gradients of gates and mean_prob through a softmax, and of z."""
    e = tl.arange(0, WIDTH)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own, p, lse = _logits(logits, t, T, e, E)
    dmean = tl.load(dmean_prob + e, mask=e < E, other=0.0)[None, :] / T
    d = p * (dmean - tl.sum(p * dmean, axis=1)[:, None] + (2.0 * tl.load(dz) / T) * lse[:, None])
    rank = _ranks(chosen, t, T, e, top_k, ROWS, WIDTH)
    at = t.to(tl.int64)[:, None] * top_k + rank
    dgate = tl.load(dgates + at, mask=rank >= 0, other=0.0)
    q = _gates(own, rank >= 0, normalize)
    d += q * (dgate - tl.sum(q * dgate, axis=1)[:, None])
    to = dlogits + t.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(to, d, mask=(t < T)[:, None] & (e < E)[None, :])


# Experts up to which a kernel serves -> tokens at a time: 2048 numbers are 8 per thread. Not timed on a GPU yet.
WIDTHS = {32: 64, 256: 8}
WARPS = 8
MAX_BLOCKS = 256
OPTIONS: dict[str, Any] = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": True}


def _sizes(E: int) -> dict[str, int]:
    width = next(width for width in WIDTHS if width >= E)
    return {"ROWS": WIDTHS[width], "WIDTH": width}


def route(
    logits: torch.Tensor, select_bias: torch.Tensor | None, top_k: int, normalize: bool
) -> tuple[torch.Tensor, ...]:
    """gates, chosen int32 `[T, k]`, order, inverse, ends, counts, mean_prob, z; logits float32."""
    logits, (T, E), sizes = logits.contiguous(), logits.shape, _sizes(logits.shape[1])
    rows = sizes["ROWS"]
    per_block = rows * max(1, triton.cdiv(T, rows * MAX_BLOCKS))
    blocks = max(1, triton.cdiv(T, per_block))
    gates, chosen = logits.new_empty(T, top_k), logits.new_empty(T, top_k, dtype=torch.int32)
    counts, probs = (logits.new_empty(blocks, E, dtype=dtype) for dtype in (torch.int32, torch.float32))
    squares = logits.new_empty(blocks)
    order, inverse = (logits.new_empty(T * top_k, dtype=torch.int64) for _ in range(2))
    ends, totals = (logits.new_empty(E, dtype=torch.int64) for _ in range(2))
    mean_prob, z = logits.new_empty(E), logits.new_empty(())
    choose_kernel[(blocks,)](
        logits, logits if select_bias is None else select_bias.float().contiguous(), gates, chosen, counts, probs,
        squares, T, E, top_k, per_block, 0 if select_bias is None else E, int(normalize), **sizes, **OPTIONS,
    )  # fmt: skip
    place_kernel[(blocks,)](
        chosen, counts, probs, squares, order, inverse, ends, totals, mean_prob, z, T, E, top_k, per_block, blocks,
        **sizes, **OPTIONS,
    )  # fmt: skip
    return gates, chosen, order, inverse, ends, totals, mean_prob, z


def route_backward(
    dgates: torch.Tensor, dmean_prob: torch.Tensor, dz: torch.Tensor, logits: torch.Tensor, chosen: torch.Tensor,
    normalize: bool,
) -> torch.Tensor:  # fmt: skip
    """dlogits `[T, E]`."""
    logits, (T, E), sizes = logits.contiguous(), logits.shape, _sizes(logits.shape[1])
    dlogits = logits.new_empty(T, E)
    if T:
        logits_grad_kernel[(triton.cdiv(T, sizes["ROWS"]),)](
            dgates.contiguous(), dmean_prob.contiguous(), dz.contiguous(), logits, chosen, dlogits, T, E,
            chosen.shape[1], int(normalize), **sizes, **OPTIONS,
        )  # fmt: skip
    return dlogits


def configurations() -> Iterator[Configuration]:
    types = {"chosen": "*i32", "counts": "*i32"} | dict.fromkeys(("order", "inverse", "ends", "totals"), "*i64")
    for kernel in (choose_kernel, place_kernel, logits_grad_kernel):
        for width in WIDTHS:
            constexprs = _sizes(width)
            signature = {
                a: "i32" if a in _NUMBERS else types.get(a, "*fp32") for a in kernel.arg_names if a not in constexprs
            }
            aligned = tuple(a for a, t in signature.items() if t.startswith("*"))
            name = f"{kernel.fn.__name__.removesuffix('_kernel')}-{width}"
            yield Configuration(name, kernel, signature, constexprs, aligned, WARPS, 1, True)
