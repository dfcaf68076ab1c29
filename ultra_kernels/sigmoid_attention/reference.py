"""Sigmoid attention in PyTorch; the contract is in op.py."""

from __future__ import annotations

import math

import torch

from .._dispatch import opaque
from .._packed import Group, by_sequence


@opaque(
    "sigmoid_attention_reference(Tensor q, Tensor k, Tensor v, float scale, float? bias, Tensor? head_bias, "
    "bool normalize, bool causal, Tensor? cu_seqlens) -> Tensor",
    lambda q, k, v, *options: q.new_empty(v.shape),
)
def sigmoid_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    bias: float | None,
    head_bias: torch.Tensor | None,
    normalize: bool,
    causal: bool,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    """b is `head_bias` [H], or `bias`, or -ln of the sequence's length when both are None."""
    wide = torch.promote_types(q.dtype, torch.float32)

    def dense(group: Group, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        S, L, H, _ = q.shape
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [S·H,L,...]
        if normalize:
            b = q.new_zeros((1, 1, 1))
        elif head_bias is not None:
            b = head_bias.to(wide).expand(S, H).reshape(S * H, 1, 1)
        elif bias is not None:
            b = q.new_full((1, 1, 1), bias)
        elif group.lengths is None:
            b = q.new_full((1, 1, 1), -math.log(max(L, 1)))
        else:
            b = -group.lengths.to(wide).log().repeat_interleave(H)[:, None, None]
        p = torch.baddbmm(b, q, k.mT, alpha=scale)
        if causal:
            p = p.masked_fill_(torch.ones(L, L, dtype=torch.bool, device=q.device).triu_(1), -math.inf)
        p = p.sigmoid_()
        o = p @ v  # pads need no mask: their v and, in the backward pass, their dP = dO v^T are zero
        if normalize:
            pads = group.key_mask()
            rows = p.sum(-1, keepdim=True) if pads is None else p @ _expand(~pads, H).to(wide)
            o = o / (rows + 1e-6)
        return o.unflatten(0, (S, H)).transpose(1, 2)

    rows = q.to(wide), k.to(wide), v.to(wide)
    if cu_seqlens is None:
        B, T = q.shape[:2]
        o = dense(Group(torch.arange(B, device=q.device), B, T, None), *rows)
    else:
        o = by_sequence(dense, cu_seqlens, *rows)
    return o.to(q.dtype)


def _expand(mask: torch.Tensor, H: int) -> torch.Tensor:
    """[S,L] -> [S·H,L,1]."""
    return mask.repeat_interleave(H, 0)[..., None]
