"""A linear memory written at test time: the gated branch of Titans (arXiv:2501.00663, MAG with a one-layer memory)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import linear, normalize, silu

from ultra.layers.linear import init_normal_, make_linear
from ultra.layers.module import Component, wide
from ultra.layers.sequences import Sequences
from ultra_kernels._dispatch import full_precision, opaque

if TYPE_CHECKING:
    from ultra.config.fields import ModelFields

CHUNK = 16  # tokens whose surprise is measured against one state; 1 is the plain recurrence


def linear_memory(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eta: torch.Tensor, theta: torch.Tensor, alpha: torch.Tensor,
    chunk: int = CHUNK,
) -> torch.Tensor:  # fmt: skip
    """y_t = M_t q_t,  S_t = η_t S_{t-1} - 2 θ_t (M_c k_t - v_t) k_tᵀ,  M_t = (1 - α_t) M_{t-1} + S_t,  M_0 = S_0 = 0.

    M_c is the state at the start of t's chunk, so that a chunk is a few matrix products. q, k, v `[B,H,T,K]`, y like v;
    η (momentum), θ (step), α (forgetting) `[B,H,T]` in (0, 1).
    """
    B, H, T, K = q.shape
    M = S = q.new_zeros(B, H, v.shape[-1], K)
    outputs = []
    for begin in range(0, T, chunk):
        part = slice(begin, begin + chunk)
        qc, kc, vc = q[:, :, part], k[:, :, part], v[:, :, part]
        # keep[t,r] = Π_{r<j≤t} (1-α_j) and carry[r,s] = Π_{s<j≤r} η_j, lower triangular; column 0: from before
        keep, carry = decay_matrix(1 - alpha[:, :, part]), decay_matrix(eta[:, :, part])
        from_S = (keep[..., 1:] @ carry[..., :1]).squeeze(-1)  # weight of S_c in M_t
        from_u = keep[..., 1:] @ carry[..., 1:]  # weight of token s's update in M_t
        surprise = -2 * theta[:, :, part, None] * (kc @ M.transpose(2, 3) - vc)  # [B,H,C,V]
        y = keep[..., 0, None] * (qc @ M.transpose(2, 3)) + from_S[..., None] * (qc @ S.transpose(2, 3))
        outputs.append(y + ((qc @ kc.transpose(2, 3)) * from_u) @ surprise)
        last_u, last_s = from_u[:, :, -1, :, None], carry[:, :, -1, 1:, None]
        M, S = (
            keep[:, :, -1, 0, None, None] * M
            + from_S[:, :, -1, None, None] * S
            + (last_u * surprise).transpose(2, 3) @ kc,
            carry[:, :, -1, 0, None, None] * S + (last_s * surprise).transpose(2, 3) @ kc,
        )
    return torch.cat(outputs, 2) if outputs else torch.zeros_like(v)


def decay_matrix(factor: torch.Tensor) -> torch.Tensor:
    """factor `[..., C]` -> `[..., C, C+1]`: [t, s] is Π_{s≤j≤t} factor_j (s = 0: the whole product), [t, t+1] is 1."""
    C = factor.shape[-1]
    log = torch.nn.functional.pad(factor.clamp_min(1e-30).log().cumsum(-1), (1, 0))  # [..., C+1]
    difference = log[..., 1:, None] - log[..., None, :]
    seen = torch.ones(C, C + 1, dtype=torch.bool, device=factor.device).tril(1)
    return difference.masked_fill(~seen, float("-inf")).exp()


class LinearMemory(Component):
    """sigmoid(W_g x - 2) · W_o (memory read forwards + memory read backwards)."""

    param_group = "attention"

    def __init__(self, cfg: ModelFields) -> None:
        super().__init__()
        D, self.H = cfg.hidden_size, cfg.num_heads
        self.qkv = make_linear(cfg, D, 3 * D)
        self.rates = nn.Linear(D, 3 * self.H)
        self.gate = nn.Linear(D, D)
        self.out = make_linear(cfg, D, D, sub_norm=True, residual_out=True)
        for layer in (self.rates, self.gate):
            init_normal_(layer.weight, cfg)
        with torch.no_grad():
            self.gate.bias.fill_(-2.0)  # the branch starts nearly closed
            # momentum 0.5, half the largest stable step, and a memory of about 50 tokens
            self.rates.bias.copy_(torch.tensor([0.0, 0.0, -4.0]).repeat_interleave(self.H))

    def forward(self, x: torch.Tensor, seqs: Sequences) -> torch.Tensor:
        B, T, D = x.shape
        shape = (B, T, 3, self.H, D // self.H)
        q, k, v = self.qkv(x).view(shape).unbind(2)
        q, k = normalize(silu(q), dim=-1), normalize(silu(k), dim=-1)
        with full_precision(x):  # a memory is a state, and its decays are products over the whole sequence
            rates = linear(wide(x), wide(self.rates.weight), wide(self.rates.bias)).sigmoid()
            eta_theta_alpha = rates.view(B, T, 3, self.H).transpose(2, 3)
            streams = torch.cat((*(wide(t) for t in (q, k, v)), eta_theta_alpha), -1)  # [B,T,H,3K+3]
            y = read_both_ways(streams, seqs.cu_seqlens, seqs.max_seqlen)
        return torch.sigmoid(self.gate(x)) * self.out(y.to(x.dtype).flatten(2))


@opaque(
    "linear_memory(Tensor streams, Tensor? cu_seqlens, SymInt max_seqlen) -> Tensor",
    lambda streams, *rest: streams.new_empty(*streams.shape[:3], (streams.shape[3] - 3) // 3),
)
def read_both_ways(streams: torch.Tensor, cu_seqlens: torch.Tensor | None, max_seqlen: int) -> torch.Tensor:
    """The memory's answers of both directions, added; streams `[B,T,H,3K+3]` are q, k, v and the three rates."""
    B, T, H, _ = streams.shape
    K = (streams.shape[3] - 3) // 3
    y = streams.new_zeros(B, T, H, K)
    for rows in directions(cu_seqlens, max_seqlen, B, T, streams.device):
        # [S,L] flat token numbers, -1 behind a shorter sequence's end: those tokens come last and touch nothing
        valid = rows >= 0
        part = streams.flatten(0, 1)[rows.clamp_min(0)].transpose(1, 2)  # [S,H,L,3K+3]
        q, k, v, rates = part.split([K, K, K, 3], -1)
        # a step of at most 1/CHUNK keeps a whole chunk of equal keys below the stability limit 2
        read = linear_memory(q, k, v, rates[..., 0], rates[..., 1] / CHUNK, rates[..., 2])
        y = y.flatten(0, 1).index_add(0, rows[valid], read.transpose(1, 2)[valid]).view(y.shape)
    return y


def directions(
    cu_seqlens: torch.Tensor | None, max_seqlen: int, B: int, T: int, device: torch.device
) -> list[torch.Tensor]:
    """Flat token numbers `[S,L]` of every sequence, in order and reversed; -1 past a sequence's end."""
    if cu_seqlens is None:
        rows = torch.arange(B * T, device=device).view(B, T)
        return [rows, rows.flip(1)]
    start, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    place = torch.arange(max_seqlen, device=device)[None]
    inside = place < end - start
    return [
        torch.where(inside, start + place, -1),
        torch.where(inside, end - 1 - place, -1),
    ]
