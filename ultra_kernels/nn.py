"""The ops as layers: `from ultra_kernels.nn import Retention`.

Layers take x `[B,T,D]` and, where tokens meet, `cu_seqlens` int32 `[num_seqs + 1]` for packed sequences (then B is 1);
their state has no part that depends on a length. They follow torch.nn: `device` and `dtype`, `reset_parameters`,
`state_dict`, autocast, `torch.compile` without a graph break for dense input. What half precision would ruin (decays,
time steps, norm statistics, routing) is computed in float32, in a bfloat16 layer too.

Projections start from a normal distribution with standard deviation `init_std` cut at 3 of them, biases from 0, gains
from 1. With `layers`, the depth of the stack, the projection into the residual stream starts at init_std / sqrt(2 ·
layers). Where a layer takes `linear`, that makes its projections and is called as nn.Linear is:
`Retention(512, 8, linear=BitLinear)` has ternary ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu

from . import (
    MoEStats,
    bidirectional_scan,
    bitlinear,
    causal_conv1d,
    derf,
    dyt,
    hope_attention,
    moe_ffn,
    pack_ternary,
    quantize_ternary,
    retention,
    rotary,
    selective_scan,
    sigmoid_attention,
    ternary_linear,
)
from ._dispatch import full_precision
from ._products import linear
from .moe_ffn.op import route
from .moe_ffn.reference import inner
from .ternary.op import LINEAR, PackedTernary, codes_shape, grouped_ternary_linear

__all__ = [
    "BitLinear",
    "Derf",
    "DyT",
    "HopeAttention",
    "Linear",
    "Mamba",
    "MoE",
    "PackedBitLinear",
    "PackedMoE",
    "RMSNorm",
    "Retention",
    "SigmoidAttention",
]

MakesLinear = Callable[..., nn.Module]
Device = torch.device | str | None


class Linear(nn.Linear):
    """y = x weightᵀ + bias: torch.nn.Linear, whose float32 products on an AMD processor with AVX-512 are oneDNN's.

    x `[..., in_features]`, y `[..., out_features]`; torch multiplies with MKL, at less than half the rate there.
    Elsewhere, and where products are small, it is torch.nn.Linear. Raises RuntimeError on a shape mismatch.
    oneDNN's products are batch-reduce kernels, Georganas et al. 2019 (arXiv:1906.06440).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """y = weight · x / sqrt(mean(x²) + eps) over the last axes, statistics in float32 whatever x and weight are.

    torch.nn.RMSNorm otherwise: x `[..., *normalized_shape]`, weight `[*normalized_shape]` or None. eps None is 1e-6.
    Raises RuntimeError where x does not end in normalized_shape. After Zhang & Sennrich 2019 (arXiv:1910.07467).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else wide(self.weight)
        return rms_norm(wide(x), self.normalized_shape, weight, 1e-6 if self.eps is None else self.eps).to(x.dtype)


class DyT(nn.Module):
    """y = weight · tanh(alpha · x) + bias, a pointwise replacement of layer normalisation.

    x `[..., dim]`; alpha `[1]`, weight `[dim]` from 1, bias `[dim]` from 0. alpha starts at `alpha_init`: 0.5 as in the
    authors' code; 1 suits language models up to width 1024. forward(x, residual) normalises s = x + residual and
    returns (y, s). Raises ValueError on a shape mismatch. After Zhu et al. 2025 (arXiv:2503.10622).
    """

    def __init__(
        self, dim: int, alpha_init: float = 0.5, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.dim, self.alpha_init = dim, alpha_init
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.alpha, self.alpha_init)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            return dyt(x, self.alpha, self.weight, self.bias)
        return dyt(x, self.alpha, self.weight, self.bias, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.dim}, alpha_init={self.alpha_init}"


class Derf(nn.Module):
    """y = weight · erf(alpha · x + shift) + bias, a pointwise replacement of layer normalisation.

    x `[..., dim]`; alpha `[1]`, shift `[1]` from 0, weight `[dim]` from 1, bias `[dim]` from 0. alpha starts at
    `alpha_init`: 0.5 is the authors' value for images, 1 theirs for language models. forward(x, residual) normalises
    s = x + residual and returns (y, s). Raises ValueError on a shape mismatch. After Chen et al. 2025
    (arXiv:2512.10938).
    """

    def __init__(
        self, dim: int, alpha_init: float = 0.5, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.dim, self.alpha_init = dim, alpha_init
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.alpha, self.alpha_init)
        nn.init.zeros_(self.shift)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            return derf(x, self.alpha, self.shift, self.weight, self.bias)
        return derf(x, self.alpha, self.shift, self.weight, self.bias, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.dim}, alpha_init={self.alpha_init}"


class BitLinear(nn.Linear):
    """y = Q8(norm(x)) · Q1.58(weight)ᵀ + bias with straight-through gradients: nn.Linear, trained for ternary weights.

    x `[..., in_features]`, y `[..., out_features]`; weight and bias as in nn.Linear. norm: an RMSNorm of the input, in
    the same pass (SubLN); scale: a weight's scale is the mean or the median of its magnitudes. The quantisers are those
    of the op `bitlinear`. `pack()` gives the layer for inference: 2 bits a weight, the product in integers.
    Raises ValueError on a shape mismatch or an unknown scale. After Ma et al. 2024 (arXiv:2402.17764).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        norm: bool = False,
        scale: Literal["mean", "median"] = "mean",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.norm = RMSNorm(in_features, device=device, dtype=dtype) if norm else None
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm_weight = None if self.norm is None else self.norm.weight
        return bitlinear(x, self.weight, self.bias, norm_weight=norm_weight, scale=self.scale)

    def pack(self) -> PackedBitLinear:
        """This layer for inference; a copy without gradients."""
        return PackedBitLinear(self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale!r}"


class PackedMatrices(nn.Module):
    """Buffers of one ternary matrix, or of several of one shape along a first axis: codes, scale and bias."""

    codes: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, scale: Literal["mean", "median"]) -> None:
        super().__init__()
        *several, self.out_features, self.in_features = weight.shape
        if weight.is_meta:  # has no values to round, only a shape
            shape = *several, *codes_shape(self.out_features, self.in_features)
            codes, scales = torch.empty(shape, dtype=torch.uint8, device="meta"), torch.empty(several, device="meta")
        else:
            packed = [pack_ternary(*quantize_ternary(w, scale=scale)) for w in weight.reshape(-1, *weight.shape[-2:])]
            codes = torch.stack([p.codes for p in packed]).view(*several, *packed[0].codes.shape)
            scales = torch.stack([p.scale for p in packed]).view(several)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scales)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def _apply(self, fn: Any, recurse: bool = True) -> PackedMatrices:
        scale = self.scale
        super()._apply(fn, recurse)
        _keep_unrounded(self, "scale", scale)
        return self

    def extra_repr(self) -> str:
        several = "" if self.scale.dim() == 0 else f", matrices={len(self.scale)}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{several}"
        )


class PackedBitLinear(PackedMatrices):
    """y = s_x · scale · (x̂ · codesᵀ) + bias, codes in {−1, 0, 1} at 2 bits each, x̂ int8: a BitLinear for inference.

    x `[..., in_features]`, y `[..., out_features]` in x's dtype, without gradient. The outputs are those of the
    BitLinear up to the rounding of its float product. Its state_dict is a quarter byte a weight and loads into the
    `pack()` of any BitLinear of the same shape, also of one on the meta device after `to_empty`. Raises ValueError on a
    shape mismatch. After Ma et al. 2024 (arXiv:2402.17764).
    """

    def __init__(self, layer: BitLinear) -> None:
        super().__init__(layer.weight, layer.bias, layer.scale)
        self.norm = None
        if layer.norm is not None:
            like = layer.norm.weight
            self.norm = RMSNorm(self.in_features, device=like.device, dtype=like.dtype).requires_grad_(False)
            self.norm.load_state_dict(layer.norm.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = wide(x)
        if self.norm is not None:  # rounded once, by the quantiser, as in `bitlinear`
            rows = self.norm(rows)
        packed = PackedTernary(self.codes, self.scale, (self.out_features, self.in_features))
        return ternary_linear(rows, packed, self.bias).to(x.dtype)


class _PackedExperts(PackedMatrices):
    """y = s_x · scale[e] · (x̂ · codes[e]ᵀ) + bias[e] for the rows ends[e−1] <= r < ends[e] of x `[S, in_features]`."""

    def forward(self, x: torch.Tensor, ends: torch.Tensor, backend: str) -> torch.Tensor:
        shape = self.out_features, self.in_features
        return grouped_ternary_linear(x, self.codes, self.scale, shape, self.bias, ends, backend)


class Retention(nn.Module):
    """y = W_o (silu(W_g x) · norm(Y)), Y = (Q Kᵀ · c_h γ_h^|n−m|) V with rotary Q, K = W x and an RMSNorm per head.

    x, y `[B,T,embed_dim]`; a head's keys are K = embed_dim / num_heads wide, its values value_factor · K. Head h
    remembers about 1 / (1 − γ_h) tokens: from window[0] to window[1], geometrically. c_h = sqrt((1−γ)/(1+γ) / K) keeps
    the scores of order 1 at any length. direction "forward" (causal), "backward" or "bidirectional"; chunk_size as in
    the op. rotary: 10000^(−linspace(0, 1, K/2)), positions from 0 in every sequence.

    Raises ValueError where the heads do not divide embed_dim, into an odd width with rotary, or the window does not
    ascend from above 1. After Sun et al. 2023 (arXiv:2307.08621).
    """

    log_decay: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        value_factor: int = 1,
        window: tuple[float, float] = (4.0, 512.0),
        rotary: bool = True,
        direction: Literal["forward", "backward", "bidirectional"] = "bidirectional",
        chunk_size: int | None = None,
        eps: float = 1e-6,
        bias: bool = False,
        linear: MakesLinear = Linear,
        init_std: float = 0.02,
        layers: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.init_std, self.out_std = init_std, _out_std(init_std, layers)
        self.head_dim = _head_dim("Retention", embed_dim, num_heads, pairs=rotary)
        self.value_dim = value_factor * self.head_dim
        if not 1 < window[0] <= window[1]:
            raise ValueError(f"Retention: window={window} must be two ascending lengths above 1, such as (4, 512)")
        self.window, self.rotary, self.direction, self.chunk_size = window, rotary, direction, chunk_size
        widths = 2 * num_heads * (self.head_dim + self.value_dim)
        self.qkvg = linear(embed_dim, widths, bias=bias, device=device, dtype=dtype)
        self.head_norm = RMSNorm(self.value_dim, eps, elementwise_affine=False)
        self.out = linear(num_heads * self.value_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        for name in ("log_decay", "scale"):
            self.register_buffer(name, None, persistent=False)
        self._set_decays()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _normal_linear(self.qkvg, self.init_std)
        _normal_linear(self.out, self.out_std)

    def _set_decays(self) -> None:
        weight = self.qkvg.weight
        first, last = (math.log2(tokens) for tokens in self.window)
        gamma = 1 - 1 / torch.logspace(first, last, self.num_heads, base=2.0, dtype=torch.float64)
        assert isinstance(weight, torch.Tensor)
        like = wide(weight.detach()[:0])
        self.log_decay = gamma.log().to(like)
        self.scale = ((1 - gamma) / (1 + gamma) / self.head_dim).sqrt().to(like)

    def _apply(self, fn: Any, recurse: bool = True) -> Retention:
        super()._apply(fn, recurse)
        self._set_decays()  # a cast to half precision would change how long each head remembers
        return self

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        B, T = _check_input("Retention", x, self.embed_dim)
        H, K, V = self.num_heads, self.head_dim, self.value_dim
        q, k, v, g = self.qkvg(x).split([H * n for n in (K, K, V, V)], -1)
        q, k, v = (t.view(B, T, H, -1) for t in (q, k, v))
        if self.rotary:
            place, theta = _positions(x, cu_seqlens), 10000.0 ** (K / max(K - 2, 1))
            q, k = (rotary(t, place, theta=theta) for t in (q, k))
        y = retention(
            q, k, v, self.log_decay, scale=self.scale, direction=self.direction, cu_seqlens=cu_seqlens,
            chunk_size=self.chunk_size,
        )  # fmt: skip
        return self.out(silu(g) * self.head_norm(y).reshape(g.shape))

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, window={self.window}, direction={self.direction!r}"


class Mamba(nn.Module):
    """y = W_o (s · silu(z)), [u, z] = W_in x, s = scan(silu(conv(u)), Δ, A, B, C) + D u: S6, in both directions.

    x, y `[B,T,embed_dim]`; E = expand · embed_dim channels with d_state states each. B, C and Δ = softplus(W_dt δ + b),
    [δ, B, C] = W_x u, and A = −exp(A_log) are each direction's own; the rest they share. direction "bidirectional":
    s_f(t−1) + s_b(t+1) + D u_t, quasi-separable, or with shift=False s_f(t) + s_b(t) + D u_t; "forward" is causal,
    "backward" its mirror image. d_conv None is 5, centred, for both directions and 4 for one; dt_rank None is
    ceil(embed_dim / 16). bc_norm: an RMS norm of B and of C over the states (Lieber et al. 2024, arXiv:2403.19887):
    without it the scan's part of y starts orders of magnitude below D u, and a short run does not draw it out. A_log, D
    and dt_bias are float32 in a half-precision layer (a later `.half()` casts them).

    A starts at −1..−d_state, Δ log-uniform in [1e-3, 1e-1], D at 1. Raises ValueError for an even d_conv in both
    directions or one outside 2..8. After Gu & Dao 2023 (arXiv:2312.00752), both directions as Hwang et al. 2024
    (arXiv:2407.09941).
    """

    def __init__(
        self,
        embed_dim: int,
        d_state: int = 16,
        d_conv: int | None = None,
        expand: int = 2,
        dt_rank: int | None = None,
        *,
        direction: Literal["forward", "backward", "bidirectional"] = "bidirectional",
        shift: bool = True,
        bc_norm: bool = True,
        bias: bool = False,
        linear: MakesLinear = Linear,
        init_std: float = 0.02,
        layers: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        both = direction == "bidirectional"
        if direction not in ("forward", "backward", "bidirectional"):
            raise ValueError(f"Mamba: direction {direction!r} is none of forward, backward, bidirectional")
        width = d_conv if d_conv is not None else 5 if both else 4
        if not 2 <= width <= 8 or (both and width % 2 == 0):
            allowed = "3, 5 or 7, so that the convolution has a centre" if both else "from 2 to 8"
            raise ValueError(f"Mamba: d_conv={width} with direction={direction!r} must be {allowed}")
        self.embed_dim, self.d_state, self.d_conv, self.d_inner = embed_dim, d_state, width, expand * embed_dim
        self.dt_rank = dt_rank if dt_rank is not None else -(-embed_dim // 16)
        self.init_std, self.out_std = init_std, _out_std(init_std, layers)
        self.direction, self.shift, self.directions = direction, shift, 2 if both else 1
        self.bc_norm = bc_norm and d_state > 1  # of one state nothing but the sign would be left
        E, factory = self.d_inner, {"device": device, "dtype": dtype}
        exact = {"device": device, "dtype": torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)}
        self.in_proj = linear(embed_dim, 2 * E, bias=bias, **factory)
        self.conv_weight = nn.Parameter(torch.empty(E, width, **factory))  # type: ignore[arg-type]
        self.conv_bias = nn.Parameter(torch.empty(E, **factory))  # type: ignore[arg-type]
        self.x_proj = nn.Linear(E, self.directions * (self.dt_rank + 2 * d_state), bias=False, **factory)  # type: ignore[arg-type]
        self.dt_weight = nn.Parameter(torch.empty(self.directions, E, self.dt_rank, **factory))  # type: ignore[arg-type]
        self.dt_bias = nn.Parameter(torch.empty(self.directions, E, **exact))  # type: ignore[arg-type]
        self.A_log = nn.Parameter(torch.empty(self.directions, E, d_state, **exact))  # type: ignore[arg-type]
        self.D = nn.Parameter(torch.empty(E, **exact))  # type: ignore[arg-type]
        self.out_proj = linear(E, embed_dim, bias=bias, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        _normal_linear(self.in_proj, self.init_std)
        _normal_linear(self.x_proj, self.init_std)
        _normal_linear(self.out_proj, self.out_std)
        nn.init.uniform_(self.conv_weight, -(self.d_conv**-0.5), self.d_conv**-0.5)
        nn.init.zeros_(self.conv_bias)
        nn.init.uniform_(self.dt_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.A_log.copy_(torch.arange(1, self.d_state + 1, device=self.A_log.device).log())
        nn.init.ones_(self.D)

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        B, T = _check_input("Mamba", x, self.embed_dim)
        R, N = self.dt_rank, self.d_state
        u, z = self.in_proj(x).transpose(1, 2).chunk(2, 1)  # [B,E,T], read through strides
        both = self.direction == "bidirectional"
        u = causal_conv1d(
            u, self.conv_weight, self.conv_bias, activation="silu", cu_seqlens=cu_seqlens,
            direction="centred" if both else self.direction,
        )  # fmt: skip
        # Δ multiplies ln-spaced decays over the whole sequence: bfloat16 would change the memory length
        with full_precision(x):
            rows = wide(u.transpose(1, 2))  # [B,T,E]
            parts = (rows @ wide(self.x_proj.weight).t()).view(B, T, self.directions, -1).permute(2, 0, 1, 3)
            dt, b, c = parts.split([R, N, N], -1)  # [directions,B,T,.]
            delta = (dt @ wide(self.dt_weight).transpose(1, 2)[:, None]).transpose(2, 3)  # [directions,B,E,T]
            if self.bc_norm:
                b, c = (rms_norm(t, (N,), eps=1e-6) for t in (b, c))
            b, c = b.transpose(2, 3), c.transpose(2, 3)  # [directions,B,N,T]
            A, u, z = -wide(self.A_log).exp(), wide(u), wide(z)
            if both:
                y = bidirectional_scan(
                    u, delta, A, b, c, self.D, z, self.dt_bias, True, shift=self.shift, cu_seqlens=cu_seqlens
                )
            else:
                y = selective_scan(  # type: ignore[assignment]
                    u, delta[0], A[0], b[0], c[0], self.D, z, self.dt_bias[0], True, direction=self.direction,
                    cu_seqlens=cu_seqlens,
                )  # fmt: skip
        return self.out_proj(y.transpose(1, 2).to(x.dtype))

    def extra_repr(self) -> str:
        how = f"direction={self.direction!r}" + (f", shift={self.shift}" if self.directions == 2 else "")
        return f"{self.embed_dim}, d_state={self.d_state}, d_conv={self.d_conv}, dt_rank={self.dt_rank}, {how}"


class _SelfAttention(nn.Module):
    """W_o attend(q, k, v) with q, k, v = W x `[B,T,H,K]`; qk_norm: an RMSNorm of queries and keys per head."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        pairs: bool,
        qk_norm: bool,
        bias: bool,
        linear: MakesLinear,
        init_std: float,
        layers: int | None,
        device: Device,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.init_std, self.out_std = init_std, _out_std(init_std, layers)
        self.head_dim = _head_dim(type(self).__name__, embed_dim, num_heads, pairs=pairs)
        self.qkv = linear(embed_dim, 3 * embed_dim, bias=bias, device=device, dtype=dtype)
        self.out = linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.q_norm = RMSNorm(self.head_dim, device=device, dtype=dtype) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, device=device, dtype=dtype) if qk_norm else None

    def reset_parameters(self) -> None:
        _normal_linear(self.qkv, self.init_std)
        _normal_linear(self.out, self.out_std)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        B, T = _check_input(type(self).__name__, x, self.embed_dim)
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, self.head_dim).unbind(2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.out(self.attend(q, k, v, cu_seqlens).reshape(B, T, self.embed_dim))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None
    ) -> torch.Tensor:
        raise NotImplementedError


class SigmoidAttention(_SelfAttention):
    """y = W_o Σ_n sigmoid(q_m·k_n / sqrt(K) + b) v_n with rotary, normalised queries and keys; [q, k, v] = W x.

    x, y `[B,T,embed_dim]`, K = embed_dim / num_heads. logit_bias None: b = −ln n for a sequence of n tokens, so that a
    row's weights sum to about 1 at first; a number: that. normalize divides each row by its sum, with b = 0. qk_norm
    bounds the logits, which nothing else does. causal: n <= m.

    Raises ValueError where the heads do not divide embed_dim, into an odd width with rotary, or normalize meets a
    logit_bias. After Ramapuram et al. 2024 (arXiv:2409.04431).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        rotary: bool = True,
        rotary_theta: float = 10000.0,
        qk_norm: bool = True,
        logit_bias: float | None = None,
        normalize: bool = False,
        causal: bool = False,
        bias: bool = False,
        linear: MakesLinear = Linear,
        init_std: float = 0.02,
        layers: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, pairs=rotary, qk_norm=qk_norm, bias=bias, linear=linear,
            init_std=init_std, layers=layers, device=device, dtype=dtype,
        )  # fmt: skip
        if normalize and logit_bias is not None:
            raise ValueError("SigmoidAttention: normalize=True uses no logit_bias; leave one of the two out")
        self.rotary, self.rotary_theta = rotary, rotary_theta
        self.logit_bias, self.normalize, self.causal = logit_bias, normalize, causal
        self.reset_parameters()

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None
    ) -> torch.Tensor:
        if self.rotary:
            place = _positions(q, cu_seqlens)
            q, k = (rotary(t, place, theta=self.rotary_theta) for t in (q, k))
        return sigmoid_attention(
            q, k, v, bias=self.logit_bias, normalize=self.normalize, causal=self.causal, cu_seqlens=cu_seqlens
        )

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, rotary={self.rotary}, causal={self.causal}"


class HopeAttention(_SelfAttention):
    """y = W_o Σ_n softmax_n(s_mn) v_n, s the hyperbolic logits of `hope_attention`, which decay with |m − n|.

    x, y `[B,T,embed_dim]`. base, damping and mode as in the op; learn_damping trains the damping (its absolute value
    acts). The first rotary_heads heads have rotary positions instead: a decaying kernel alone cannot address "8 tokens
    back". num_prefix_tokens: learned keys and values `[P,H,K]` that every token sees, without a position.

    Raises ValueError where the heads do not divide embed_dim into an even width, rotary_heads is outside 0..num_heads,
    or the damping is negative. After Dai et al. 2025 (arXiv:2509.05218); prefixes after Behrouz et al. 2025
    (arXiv:2501.00663).
    """

    prefix_k: torch.Tensor | None
    prefix_v: torch.Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        base: float = 10000.0,
        damping: float = 0.01,
        learn_damping: bool = False,
        mode: Literal["per_pair", "global"] = "per_pair",
        rotary_heads: int = 0,
        rotary_theta: float = 10000.0,
        num_prefix_tokens: int = 0,
        qk_norm: bool = False,
        causal: bool = False,
        bias: bool = False,
        linear: MakesLinear = Linear,
        init_std: float = 0.02,
        layers: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, pairs=True, qk_norm=qk_norm, bias=bias, linear=linear,
            init_std=init_std, layers=layers, device=device, dtype=dtype,
        )  # fmt: skip
        if not 0 <= rotary_heads <= num_heads:
            raise ValueError(f"HopeAttention: rotary_heads={rotary_heads} must be 0..{num_heads}, the number of heads")
        if damping < 0:
            raise ValueError(f"HopeAttention: damping={damping} must be at least 0")
        self.base, self.mode, self.damping_init, self.causal = base, mode, damping, causal
        self.rotary_heads, self.rotary_theta = rotary_heads, rotary_theta
        exact = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.damping = nn.Parameter(torch.empty((), device=device, dtype=exact)) if learn_damping else None
        for name in ("prefix_k", "prefix_v"):
            shape = num_prefix_tokens, num_heads, self.head_dim
            prefix = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if num_prefix_tokens else None
            self.register_parameter(name, prefix)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.damping is not None:
            nn.init.constant_(self.damping, self.damping_init)
        for prefix in (self.prefix_k, self.prefix_v):
            if prefix is not None:
                _normal(prefix, self.init_std)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None
    ) -> torch.Tensor:
        # a negative rate would grow with distance
        damping = self.damping_init if self.damping is None else self.damping.abs()
        return hope_attention(
            q, k, v, base=self.base, damping=damping, mode=self.mode, causal=self.causal,
            rotary_heads=self.rotary_heads, rotary_theta=self.rotary_theta, prefix_k=self.prefix_k,
            prefix_v=self.prefix_v, cu_seqlens=cu_seqlens,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, {self.num_heads}, base={self.base}, mode={self.mode!r}, "
            f"rotary_heads={self.rotary_heads}, causal={self.causal}"
        )


class MoE(nn.Module):
    """y_t = Σ_e g_te FFN_e(x_t) over the top_k experts of a softmax router, none dropped; FFN(x) = w_out act(w_in x).

    x `[..., embed_dim]`; w_in `[E, hidden_dim, embed_dim]` (gated: 2 · hidden_dim rows, h = act(gate) · up), w_out
    `[E, embed_dim, hidden_dim]`. forward returns (y, MoEStats), whose mean_prob and z carry gradients:
    `loss + 0.01 * moe.balance_loss(stats) + 0.001 * stats.z` balances and bounds the router. balance_bias adds the
    buffer select_bias, for balancing without a loss: call `update_select_bias(stats.counts)` after a step.
    sub_norm: RMSNorm between activation and w_out; bitnet: ternary experts, which `pack()` stores for inference at two
    bits a weight; the other options as in `moe_ffn`.

    Raises ValueError on a top_k outside 1..num_experts, an unknown activation or a shape mismatch. After Shazeer et al.
    2017 (arXiv:1701.06538), balance loss after Fedus et al. 2021 (arXiv:2101.03961).
    """

    b_in: torch.Tensor | None
    b_out: torch.Tensor | None
    select_bias: torch.Tensor | None

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int = 2,
        *,
        activation: Literal["silu", "gelu", "relu", "relu2"] = "silu",
        gated: bool = False,
        bias: bool = False,
        normalize_gates: bool | None = None,
        balance_bias: bool = False,
        sub_norm: bool = False,
        bitnet: bool = False,
        bitnet_scale: Literal["mean", "median"] = "mean",
        init_std: float = 0.02,
        layers: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"MoE: top_k={top_k} must be between 1 and num_experts, {num_experts}")
        self.embed_dim, self.hidden_dim, self.num_experts, self.top_k = embed_dim, hidden_dim, num_experts, top_k
        self.activation, self.gated, self.normalize_gates = activation, gated, normalize_gates
        self.bitnet, self.bitnet_scale = bitnet, bitnet_scale
        self.init_std, self.out_std = init_std, _out_std(init_std, layers)
        E, rows = num_experts, 2 * hidden_dim if gated else hidden_dim
        self.router = nn.Linear(embed_dim, E, bias=False, device=device, dtype=dtype)
        self.w_in = nn.Parameter(torch.empty(E, rows, embed_dim, device=device, dtype=dtype))
        self.w_out = nn.Parameter(torch.empty(E, embed_dim, hidden_dim, device=device, dtype=dtype))
        for name, width in (("b_in", rows), ("b_out", embed_dim)):
            b = nn.Parameter(torch.empty(E, width, device=device, dtype=dtype)) if bias else None
            self.register_parameter(name, b)
        self.sub_norm = RMSNorm(hidden_dim, device=device, dtype=dtype) if sub_norm else None
        self.register_buffer("select_bias", torch.empty(E, device=device) if balance_bias else None)
        self.reset_parameters()

    def _apply(self, fn: Any, recurse: bool = True) -> MoE:
        select_bias = self.select_bias
        super()._apply(fn, recurse)
        _keep_unrounded(self, "select_bias", select_bias)
        return self

    def reset_parameters(self) -> None:
        _normal_linear(self.router, self.init_std)
        _normal(self.w_in, self.init_std)
        _normal(self.w_out, self.out_std)
        for zero in (self.b_in, self.b_out, self.select_bias):
            if zero is not None:
                nn.init.zeros_(zero)
        if self.sub_norm is not None:
            self.sub_norm.reset_parameters()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, MoEStats]:
        rows = _token_rows(self, x, self.embed_dim)
        with full_precision(x):  # bfloat16 would send tokens to other experts
            logits = wide(rows) @ wide(self.router.weight).t()
        y, stats = moe_ffn(
            rows, logits, self.w_in, self.w_out, top_k=self.top_k, activation=self.activation, gated=self.gated,
            b_in=self.b_in, b_out=self.b_out, normalize_gates=self.normalize_gates, select_bias=self.select_bias,
            sub_norm=None if self.sub_norm is None else self.sub_norm.weight, bitnet=self.bitnet,
            bitnet_scale=self.bitnet_scale,
        )  # fmt: skip
        return y.view(x.shape), stats

    @staticmethod
    def balance_loss(stats: MoEStats) -> torch.Tensor:
        """E Σ_e f_e P_e, f the share of the routed tokens and P the mean probability: 1 when balanced."""
        share = stats.counts.float() / stats.counts.sum().clamp(min=1)
        return len(share) * (share * stats.mean_prob).sum()

    @torch.no_grad()
    def update_select_bias(self, counts: torch.Tensor, rate: float = 0.001) -> None:
        """b_e ← b_e + rate · sign(mean load − load_e), counts `[E]`, summed over processes (arXiv:2408.15664)."""
        if self.select_bias is not None:
            load = counts.float()
            self.select_bias += rate * torch.sign(load.mean() - load)

    def pack(self) -> PackedMoE:
        """This layer for inference; a copy without gradients. Raises ValueError without bitnet."""
        return PackedMoE(self)

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, {self.hidden_dim}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"activation={self.activation!r}, gated={self.gated}"
        )


class PackedMoE(nn.Module):
    """y_t = Σ_e g_te w_out_e(norm(act(w_in_e(x_t)))), e over t's top_k experts: an MoE with bitnet for inference.

    x, y `[..., embed_dim]`, y in x's dtype, without gradient; forward returns (y, MoEStats) as the MoE does, its router
    and gates are the MoE's, and the outputs are equal up to the rounding of its float products. w_in and w_out hold the
    experts' matrices one after another, codes uint8 `[E, ceil(N/16), ceil(K/16), 64]`, scale `[E]`, bias `[E, N]`, and
    multiply each expert's tokens with its own. Its state_dict loads into the `pack()` of any MoE of the same shape.
    Raises ValueError without bitnet or on a shape mismatch. After Shazeer et al. 2017
    (arXiv:1701.06538), the weights after Ma et al. 2024 (arXiv:2402.17764).
    """

    select_bias: torch.Tensor | None

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        if not layer.bitnet:
            raise ValueError("PackedMoE: the layer has float experts; make it with MoE(..., bitnet=True) to pack it")
        self.top_k, self.activation, self.gated = layer.top_k, layer.activation, layer.gated
        self.normalize_gates = layer.top_k > 1 if layer.normalize_gates is None else layer.normalize_gates
        self.router = copy.deepcopy(layer.router)
        self.sub_norm = copy.deepcopy(layer.sub_norm)
        self.register_buffer("select_bias", None if layer.select_bias is None else layer.select_bias.detach().clone())
        self.w_in = _PackedExperts(layer.w_in, layer.b_in, layer.bitnet_scale)
        self.w_out = _PackedExperts(layer.w_out, layer.b_out, layer.bitnet_scale)
        self.requires_grad_(False)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedMoE:
        select_bias = self.select_bias
        super()._apply(fn, recurse)
        _keep_unrounded(self, "select_bias", select_bias)
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, MoEStats]:
        rows = wide(_token_rows(self, x, self.router.in_features))
        with torch.no_grad(), full_precision(x):
            backend = LINEAR.choose(None, rows, self.w_in.codes)
            logits = rows @ wide(self.router.weight).t()
            routes, stats = route(logits, self.top_k, self.normalize_gates, self.select_bias, backend)
            h = self.w_in(rows.index_select(0, routes.order // self.top_k), routes.ends, backend)
            h = inner(h, self.activation, self.gated)
            h = h if self.sub_norm is None else self.sub_norm(h)
            out = self.w_out(h, routes.ends, backend).index_select(0, routes.inverse).unflatten(0, routes.gates.shape)
            y = (out * routes.gates.unsqueeze(-1)).sum(1)
        return y.to(x.dtype).view(x.shape), stats

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}, activation={self.activation!r}, gated={self.gated}"


def _keep_unrounded(layer: nn.Module, name: str, before: torch.Tensor | None) -> None:
    """After Module._apply: a buffer moves with the rest, and is never rounded to half precision."""
    after = getattr(layer, name)
    if before is not None and not before.is_meta and not after.is_meta:
        setattr(layer, name, before.to(after.device))


def _token_rows(layer: nn.Module, x: torch.Tensor, embed_dim: int) -> torch.Tensor:
    if not x.is_floating_point() or x.ndim < 1 or x.shape[-1] != embed_dim:
        raise ValueError(
            f"{type(layer).__name__}: x is {x.dtype} of shape {tuple(x.shape)}; it must be floats [..., {embed_dim}]"
        )
    return x.reshape(-1, embed_dim)


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in float64 if it is that: for what half precision would ruin."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _positions(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """`[T]`: each token's place in its own sequence."""
    place = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        return place
    starts = cu_seqlens.long()
    # right=True: the sequence of token t is the last border at or before t, so empty sequences are skipped
    return place - starts[torch.searchsorted(starts, place, right=True) - 1]


def _head_dim(layer: str, embed_dim: int, num_heads: int, *, pairs: bool) -> int:
    if num_heads < 1 or embed_dim % num_heads:
        raise ValueError(f"{layer}: num_heads={num_heads} must divide embed_dim={embed_dim}")
    width = embed_dim // num_heads
    if pairs and width % 2:
        raise ValueError(f"{layer}: positions turn pairs of channels, but embed_dim / num_heads = {width} is odd")
    return width


def _check_input(layer: str, x: torch.Tensor, embed_dim: int) -> tuple[int, int]:
    if x.dim() != 3 or x.shape[2] != embed_dim:
        raise ValueError(f"{layer}: x has shape {tuple(x.shape)}; it must be [B, T, {embed_dim}]")
    return x.shape[0], x.shape[1]


def _out_std(std: float, layers: int | None) -> float:
    """Of the projection into the residual stream, where two branches a layer add up their variances."""
    return std if layers is None else std / (2 * layers) ** 0.5


@torch.no_grad()
def _normal(weight: Any, std: float) -> None:
    nn.init.trunc_normal_(weight, 0.0, std, -3 * std, 3 * std)


def _normal_linear(layer: nn.Module, std: float) -> None:
    _normal(layer.weight, std)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
