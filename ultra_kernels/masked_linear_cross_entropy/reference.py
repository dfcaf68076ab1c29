"""Cross-entropy of a linear map at labelled rows, in PyTorch; the contract is in op.py."""

from __future__ import annotations

import torch

# Bytes of one block of logits, the only large temporary: 600 rows of 50,000 in one block, so that on a CPU the weight
# gradient of a usual batch is one product, not several read-modify-write passes over [V, D].
BLOCK_BYTES = 128 * 2**20


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
    """(loss, dhidden, dweight, dbias, scale): scale times the gradients are the loss's; empty without `grads`.

    `dtype` is that of the products. The gradients have the dtypes of waiting_dtype.
    Each block of rows is multiplied, turned in place from logits into softmax and then into the gradient of the
    logits, and multiplied into the gradients: logits exist once, for one block. Sums are kept in float32.
    """
    of_hidden, of_weight = waiting_dtype(hidden.dtype), waiting_dtype(weight.dtype)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    V, D = weight.shape
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = (labels != ignore_index).nonzero().squeeze(1)
    targets = labels[rows]
    x = hidden[rows]
    M = x.shape[0]
    loss = torch.zeros((), dtype=wide, device=x.device)
    dx = torch.empty(M if grads else 0, D, dtype=wide, device=x.device)
    dweight = torch.zeros(V if grads else 0, D, dtype=wide, device=x.device)
    dbias = torch.zeros(V if grads and bias is not None else 0, dtype=wide, device=x.device)
    block = max(1, BLOCK_BYTES // (wide.itemsize * V))
    buffer = torch.empty(min(block, M), V, dtype=wide, device=x.device)
    for start in range(0, M, block):
        xs, ts = x[start : start + block], targets[start : start + block, None]
        logits = buffer[: xs.shape[0]]
        if xs.dtype == wide:
            torch.mm(xs, weight.t(), out=logits)
        else:
            logits.copy_(xs @ weight.t())
        if bias is not None:
            logits += bias
        at_target, largest = logits.gather(1, ts).squeeze(1), logits.amax(1)
        probs = torch.softmax(logits, 1, out=logits)  # row by row, so in place is safe
        logsumexp = largest - probs.amax(1).log()  # the largest probability is exp(largest − logsumexp)
        loss += (logsumexp - at_target).sum() + z_loss * logsumexp.square().sum()
        if not grads:
            continue
        if z_loss:
            probs *= (1 + 2 * z_loss * logsumexp).unsqueeze(1)
        probs.scatter_add_(1, ts, probs.new_full(ts.shape, -1))
        dlogits = probs.to(xs.dtype)
        if xs.dtype == wide:
            torch.mm(dlogits, weight, out=dx[start : start + block])
            torch.addmm(dweight, dlogits.t(), xs, beta=0 if start == 0 else 1, out=dweight)
        else:
            dx[start : start + block] = dlogits @ weight
            dweight += dlogits.t() @ xs
        if bias is not None:
            dbias += probs.sum(0)
    scale = loss.new_ones(()) / (max(M, 1) if mean else 1)
    dhidden = torch.zeros(hidden.shape[0] if grads else 0, D, dtype=of_hidden, device=x.device)
    if grads:
        dhidden[rows] = dx.to(of_hidden)
    return loss * scale, dhidden, dweight.to(of_weight), dbias, scale


def waiting_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient that waits for the backward to scale it: float16 would lose what a loss scale is to keep."""
    return torch.float32 if dtype == torch.float16 else dtype
