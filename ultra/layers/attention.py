"""Softmax attention over packed rows, and the projections that every attention mixer has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.nn.functional import scaled_dot_product_attention

from ultra.config.fields import ModelFields
from ultra.layers.linear import RMSNorm, make_linear
from ultra.layers.module import AutocastState, Mixer
from ultra.layers.sequences import Sequences
from ultra_kernels import hope_attention, rotary
from ultra_kernels._dispatch import OPS, autocast, opaque

Prefix = tuple[torch.Tensor, torch.Tensor]  # keys and values [P,H,K] before every sequence


def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqs: Sequences,
    theta: float | None = None,
    prefix: Prefix | None = None,
) -> torch.Tensor:
    """o = softmax(q kᵀ / sqrt(K)) v within each sequence, bidirectional; q, k, v, o `[B,T,H,K]`.

    theta: q and k get rotary positions first, which the prefix does not see. On the CPU `hope_attention` with rotary
    heads does both at once, in 0.5 to 0.7 times the time of SDPA alone (docs/LOG.md) and without turned copies of q and
    k. Else torch's own kernels do the work: varlen attention on CUDA in half precision, or SDPA on each group of
    sequences of one length.
    """
    if theta is not None and (_fused(q, k, v) or prefix is not None):
        prefix_k, prefix_v = prefix or (None, None)
        return hope_attention(
            q, k, v, rotary_heads=q.shape[2], rotary_theta=theta, prefix_k=prefix_k, prefix_v=prefix_v,
            cu_seqlens=seqs.cu_seqlens,
        )  # fmt: skip
    if theta is not None:
        q, k = (rotary(t, seqs.positions, theta=theta) for t in (q, k))
    if seqs.cu_seqlens is None:
        return _dense(q, k, v, prefix)
    q, k, v = autocast(q, k, v)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and prefix is None:
        from torch.nn.attention.varlen import varlen_attn

        cu, longest = seqs.cu_seqlens, seqs.max_seqlen
        out: torch.Tensor = varlen_attn(q[0], k[0], v[0], cu, cu, longest, longest)  # type: ignore[assignment]
        return out[None]
    if torch.compiler.is_compiling():
        prefix_k, prefix_v = prefix or (None, None)
        return _packed(q, k, v, prefix_k, prefix_v, seqs.cu_seqlens)
    return _grouped(q, k, v, seqs, prefix)


def _fused(*qkv: torch.Tensor) -> bool:
    """Whether one kernel does rotary positions and softmax attention; a backend that the user asked for counts."""
    return qkv[0].device.type == "cpu" and OPS["hope_attention"].choose(None, *qkv) == "native"


@opaque(  # the groups depend on the lengths
    "packed_softmax_attention(Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor cu_seqlens) "
    "-> Tensor",
    lambda q, k, v, *rest: q.new_empty(v.shape),
)
def _packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_k: torch.Tensor | None,
    prefix_v: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    prefix = None if prefix_k is None or prefix_v is None else (prefix_k, prefix_v)
    return _grouped(q, k, v, Sequences.packed(cu_seqlens, 0, q.shape[1]), prefix)


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seqs: Sequences, prefix: Prefix | None) -> torch.Tensor:
    if seqs.by_length is None:
        shape = (len(seqs.lengths), seqs.lengths[0] if seqs.lengths else 0, *q.shape[2:])
        return _dense(q.reshape(shape), k.reshape(shape), v.reshape(shape), prefix).reshape(q.shape)
    groups, rows, back = seqs.by_length
    # one gather of q, k, v together, then every group is a slice
    qkv = torch.stack((q[0], k[0], v[0]), 1).index_select(0, rows)
    outputs = []
    # split, not slices: the gradient of a split is one concatenation, that of each slice a full tensor of zeros
    for (count, length), part in zip(groups, qkv.split([count * length for count, length in groups]), strict=True):
        part = part.view(count, length, 3, *q.shape[2:])
        qp, kp, vp = part.unbind(2)
        outputs.append(_dense(qp, kp, vp, prefix).reshape(count * length, *q.shape[2:]))
    return torch.cat(outputs).index_select(0, back)[None] if outputs else torch.zeros_like(q)


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix: Prefix | None) -> torch.Tensor:
    if prefix is not None:
        k, v = (torch.cat((p.to(t.dtype).expand(len(t), *p.shape), t), 1) for p, t in zip(prefix, (k, v), strict=True))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B,H,T,K]
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


class SelfAttention(Mixer):
    """W_o attend(q, k, v) with q, k, v = W x; a mixer overrides `attend`, which gives the positions too.

    rotary: theta of rotary positions is set, else None; qk_norm: RMSNorm of queries and keys per head.
    """

    def __init__(self, cfg: ModelFields, *, rotary: bool, qk_norm: bool) -> None:
        super().__init__(cfg)
        D, self.H, self.K = cfg.hidden_size, cfg.num_heads, cfg.head_dim
        self.theta = cfg.rope_theta if rotary else None
        self.qkv = make_linear(cfg, D, 3 * D)
        self.out = make_linear(cfg, D, D, sub_norm=True, residual_out=True)
        self.q_norm = RMSNorm(self.K, cfg.rms_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.K, cfg.rms_norm_eps) if qk_norm else None

    def forward(self, x: torch.Tensor, seqs: Sequences) -> torch.Tensor:
        return self.out(self.heads(x, seqs))

    def heads(self, x: torch.Tensor, seqs: Sequences) -> torch.Tensor:
        """All before the output projection."""
        return self.attend(*self.project(x), seqs).flatten(2)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v `[B,T,H,K]`, without positions."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.H, self.K)).unbind(2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seqs: Sequences) -> torch.Tensor:
        return softmax_attention(q, k, v, seqs, self.theta)


def recomputed_heads(
    attention: SelfAttention,
    inside: Callable[[torch.Tensor], torch.Tensor],
    z: torch.Tensor,
    seqs: Sequences,
    trained: Sequence[nn.Parameter],
) -> torch.Tensor:
    """attention.heads(inside(z), seqs), of which the backward keeps z and the answer and computes q, k, v again.

    `trained`: every parameter on the way. Where positions and softmax are not one kernel, all is kept.
    """
    if attention.theta is None or not _fused(z):
        return attention.heads(inside(z), seqs)
    return _RecomputedHeads.apply(attention, inside, seqs, z, *trained)  # type: ignore[no-any-return, no-untyped-call]


class _RecomputedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attention: Any, inside: Any, seqs: Sequences, z: torch.Tensor, *trained: Any) -> torch.Tensor:
        q, k, v = autocast(*attention.project(inside(z)))
        o, lse = torch.ops.ultra_kernels.hope_attention(*_arguments(q, k, v, attention.theta, seqs))
        ctx.attention, ctx.inside, ctx.seqs, ctx.trained = attention, inside, seqs, trained
        ctx.autocast = AutocastState(z)
        ctx.save_for_backward(z, o, lse)
        return o.flatten(2)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        z, o, lse = ctx.saved_tensors
        z = z.detach().requires_grad_()
        with torch.enable_grad(), ctx.autocast.again():
            qkv = autocast(*ctx.attention.project(ctx.inside(z)))
        edges = tuple(get_gradient_edge(t) for t in qkv)  # q, k, v are freed before their gradients are joined
        q, k, v = (t.detach() for t in qkv)
        arguments = _arguments(q, k, v, ctx.attention.theta, ctx.seqs)
        grad = grad.unflatten(2, o.shape[2:])
        dqkv = torch.ops.ultra_kernels.hope_attention_backward(grad, o, lse, False, *arguments)[:3]
        del qkv, q, k, v, arguments, o, lse, grad
        return None, None, None, *torch.autograd.grad(edges, (z, *ctx.trained), dqkv, allow_unused=True)


def _arguments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, theta: float, seqs: Sequences) -> tuple[Any, ...]:
    """Of the operator behind hope_attention with rotary heads alone."""
    H, K = q.shape[2:]
    hope = (q.new_zeros((), dtype=torch.float32), 1e4, "per_pair")
    return q, k, v, *hope, K**-0.5, False, H, theta, None, None, seqs.cu_seqlens, "native"
