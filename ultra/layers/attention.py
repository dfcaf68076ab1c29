"""Softmax attention over packed rows, and the projections that every attention mixer has."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from ultra.config.fields import ModelFields
from ultra.layers.linear import RMSNorm, make_linear
from ultra.layers.module import Mixer
from ultra.layers.sequences import Sequences
from ultra_kernels import rotary
from ultra_kernels._dispatch import autocast, opaque

Prefix = tuple[torch.Tensor, torch.Tensor]  # keys and values [P,H,K] before every sequence


def softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seqs: Sequences, prefix: Prefix | None = None
) -> torch.Tensor:
    """o = softmax(q kᵀ / sqrt(K)) v within each sequence, bidirectional; q, k, v, o `[B,T,H,K]`.

    Torch's own kernels do the work: varlen attention on CUDA in half precision, else SDPA on each group of sequences
    of one length (the CPU has no varlen kernel).
    """
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
    """W_o attend(q, k, v) with q, k, v = W x; a mixer overrides `attend`.

    rotary: rotate queries and keys by position; qk_norm: RMSNorm of queries and keys per head.
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
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.H, self.K).unbind(2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.theta is not None:
            q, k = (rotary(t, seqs.positions, theta=self.theta) for t in (q, k))
        return self.out(self.attend(q, k, v, seqs).reshape(B, T, self.H * self.K))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seqs: Sequences) -> torch.Tensor:
        return softmax_attention(q, k, v, seqs)
