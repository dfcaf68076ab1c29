"""The masked cross-entropy on the CPU in C++ (csrc/masked_linear_cross_entropy); the contract is in op.py."""

from __future__ import annotations

import torch

from .._native import DTYPES, address, contiguous_rows, load
from .reference import waiting_dtype


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
    """(loss, dhidden, dweight, dbias, scale) as in reference.py; the gradients have the scale in them, so it is 1."""
    C_, threads = load(), torch.get_num_threads()
    labels, labelled = labels.contiguous(), (labels != ignore_index).nonzero().squeeze(1)
    (T, D), V, M = hidden.shape, weight.shape[0], len(labelled)

    def gradient(*shape: int, dtype: torch.dtype = torch.float32, wanted: bool = True) -> torch.Tensor:
        return (torch.empty if M else torch.zeros)(shape if grads and wanted else (0, *shape[1:]), dtype=dtype)

    dhidden = gradient(T, D, dtype=waiting_dtype(hidden.dtype))
    dweight = gradient(V, D, dtype=waiting_dtype(weight.dtype))
    dbias = gradient(V, wanted=bias is not None)
    loss, one = torch.zeros(()), torch.ones(())
    if M:
        pairs = dtype == torch.bfloat16 and C_.cross_entropy_has_pairs()
        hidden, weight = (_readable(t, dtype, pairs) for t in (hidden, weight))
        bias = None if bias is None else bias.float().contiguous()
        call = C_.CrossEntropy(
            (T, M, D, V), pairs, *([t.data_ptr(), t.stride(0), DTYPES[t.dtype]] for t in (hidden, weight)),
            labels.data_ptr(), labelled.data_ptr(), address(bias), z_loss, 1 / M if mean else 1.0,
            address(dhidden if grads else None), DTYPES[dhidden.dtype], address(dweight if grads else None),
            DTYPES[dweight.dtype], address(dbias if grads and bias is not None else None),
        )  # fmt: skip
        scratch = torch.empty(C_.cross_entropy_scratch(call, threads), dtype=torch.float32)
        C_.cross_entropy(call, loss.data_ptr(), scratch.data_ptr(), threads)
    return loss, dhidden, dweight, dbias, one


def _readable(x: torch.Tensor, dtype: torch.dtype, pairs: bool) -> torch.Tensor:
    """x as the kernel takes it. It rounds float32 to pairs of bfloat16 by itself."""
    return contiguous_rows(x if pairs and x.dtype == torch.float32 else x.to(dtype))
