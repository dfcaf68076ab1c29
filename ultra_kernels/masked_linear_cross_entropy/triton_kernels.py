"""The masked cross-entropy in Triton: between torch's products, what turns logits into loss and gradient in place.

The products are torch's. For M labelled rows they are 6·M·V·D operations at cuBLAS's 750 TFLOP/s on an H100, plus 12
bytes of memory for each of the M·V logits: 2.3 ms at M 4915, V 50368, D 768. Kernels that never write a logit compute
them twice, 8·M·V·D operations, and Triton's products reach about 500 TFLOP/s: 3 ms. Computed, not measured.

How many rows are labelled must then be known to the host: selecting them is the one wait for the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .._triton import Configuration
from .reference import waiting_dtype


@triton.jit(do_not_specialize=["V", "end"])
def softmax_kernel(logits, targets, bias, losses, width, V, end, z_loss, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """losses `[rows]` of rows of logits `[rows, width]`, of which V columns count; up to column `end` (width, or 0 when
    no gradient is wanted) logits become their gradient, and zeros beyond V. Grid: rows.

    Columns are masked at `width`, a multiple of 16, so that loads have 16 bytes whatever V is.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    own = logits + row * width
    target = tl.load(targets + row).to(tl.int32)
    most = tl.full((BLOCK,), -3.4028235e38, tl.float32)  # finite: -inf less it is -inf, and its exponential 0
    total = tl.zeros((BLOCK,), tl.float32)
    chosen = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        v = first + i
        x = _logits(own, bias, v, width, V, BIAS)
        above = tl.maximum(most, x)
        total = total * tl.exp(most - above) + tl.exp(x - above)
        most = above
        chosen += tl.where(v == target, x, 0.0)
    largest = tl.max(most, axis=0)
    total_row = tl.sum(total * tl.exp(most - largest), axis=0)
    lse = largest + tl.log(total_row)
    tl.store(losses + row, lse - tl.sum(chosen, axis=0) + z_loss * lse * lse)
    pull = 2.0 * z_loss * lse  # apart from p - 1, which it would round where p is nearly 1
    for first in range(0, end, BLOCK):
        v = first + i
        x = _logits(own, bias, v, width, V, BIAS)
        p = tl.exp(x - largest) / total_row
        tl.store(own + v, tl.where(v == target, p - 1.0, p) + p * pull, mask=v < width)


@triton.jit
def _logits(own, bias, v, width, V, BIAS: tl.constexpr):
    """-inf from V on."""
    x = tl.load(own + v, mask=v < width, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias + v, mask=v < width, other=0.0)
    return tl.where(v < V, x, float("-inf"))


@triton.jit(do_not_specialize=["M"])
def total_kernel(losses, loss, M, scale, BLOCK: tl.constexpr):
    """loss = scale · Σ losses `[M]`. Grid: one."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, M, BLOCK):
        total += tl.load(losses + first + i, mask=first + i < M, other=0.0)
    tl.store(loss, tl.sum(total, axis=0) * scale)


# Not timed on a GPU yet. None spills with Triton 3.6 or 3.9.
BLOCK, WARPS = 2048, 8
TOTAL_BLOCK, TOTAL_WARPS = 1024, 4
# Bytes of one block of logits: a seventh of what log_softmax and its gradient keep of as many rows. Several blocks cost
# a pass over the weight's gradient each.
BLOCK_BYTES = 512 * 2**20


def masked_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    z_loss: float,
    mean: bool,
    grads: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """(loss, dhidden, dweight, dbias, scale) as in reference.py."""
    of_hidden, of_weight = waiting_dtype(hidden.dtype), waiting_dtype(weight.dtype)
    rows = (labels != ignore_index).nonzero().squeeze(1)
    x, targets, weight = hidden[rows].to(dtype), labels[rows], weight.to(dtype)
    (V, D), M = weight.shape, x.shape[0]
    if labels.device.type == "cuda":
        inside = ((targets >= 0) & (targets < V)).all()
        torch._assert_async(inside, f"masked_linear_cross_entropy: a label is outside 0..{V - 1}")
    width = V + -V % 16
    block = max(16, BLOCK_BYTES // (dtype.itemsize * width) // 16 * 16)  # so that addresses stay multiples of 16
    buffer = x.new_empty(min(block, M), width)
    padded = buffer if bias is None else F.pad(bias.float(), (0, width - V))
    losses, loss = x.new_empty(M, dtype=torch.float32), x.new_empty((), dtype=torch.float32)
    dx = x.new_empty(M if grads else 0, D)
    # several blocks are added up in float32
    of_sums = of_weight if M <= block else torch.float32
    dweight = x.new_zeros(V if grads else 0, D, dtype=of_sums)
    dbias = x.new_zeros(V if grads and bias is not None else 0, dtype=torch.float32)
    for start in range(0, M, block):
        xs, own = x[start : start + block], slice(start, start + block)
        whole = buffer[: len(xs)]
        logits = whole[:, :V]
        torch.mm(xs, weight.t(), out=logits)
        softmax_kernel[(len(xs),)](
            whole, targets[own], padded, losses[own], width, V, width if grads else 0, z_loss,
            BIAS=bias is not None, BLOCK=BLOCK, num_warps=WARPS, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
        if not grads:
            continue
        torch.mm(logits, weight, out=dx[own])
        if M <= block and dtype == of_sums:
            torch.mm(logits.t(), xs, out=dweight)
        else:
            dweight += logits.t() @ xs
        if bias is not None:
            dbias += logits.sum(0, dtype=torch.float32)
    scale = 1 / max(M, 1) if mean else 1.0
    total_kernel[(1,)](
        losses, loss, M, scale, BLOCK=TOTAL_BLOCK, num_warps=TOTAL_WARPS, num_stages=1, enable_fp_fusion=True
    )
    dhidden = x.new_zeros(hidden.shape[0] if grads else 0, D, dtype=of_hidden)
    if grads:
        dhidden.index_copy_(0, rows, dx.to(of_hidden))
    return loss, dhidden, dweight.to(of_weight), dbias, loss.new_full((), scale)


def configurations() -> Iterator[Configuration]:
    """What the function above launches."""
    floats = {"bias": "*fp32", "losses": "*fp32", "z_loss": "fp32"}
    for dtype in ("fp32", "bf16", "fp16"):
        for with_bias in (False, True):
            signature = {"logits": f"*{dtype}", "targets": "*i64", "width": "i32", "V": "i32", "end": "i32"} | floats
            if not with_bias:
                signature["bias"] = f"*{dtype}"  # the logits stand in for it
            yield Configuration(
                f"softmax-{dtype}{'-bias' * with_bias}",
                softmax_kernel,
                {name: signature[name] for name in softmax_kernel.arg_names if name in signature},
                {"BIAS": with_bias, "BLOCK": BLOCK},
                ("logits", "targets", "bias", "losses", "width"),
                WARPS,
            )
    yield Configuration(
        "total",
        total_kernel,
        {"losses": "*fp32", "loss": "*fp32", "M": "i32", "scale": "fp32"},
        {"BLOCK": TOTAL_BLOCK},
        ("losses", "loss"),
        TOTAL_WARPS,
    )
