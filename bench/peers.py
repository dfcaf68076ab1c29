"""Other libraries' functions for the same equation, unless they say so, called with an op's own arguments.

A peer raises ImportError where its package is missing and NotImplementedError for cases that it does not cover.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench import i2s
from ultra_kernels import PackedTernary, selective_scan, unpack_ternary
from ultra_kernels.moe_ffn.reference import ACTIVATIONS


def torch_layer_norm(x, weight, bias, eps=1e-5, residual=None):
    s = x if residual is None else x + residual
    y = F.layer_norm(s, s.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    return y if residual is None else (y, s)


def torch_conv1d(x, weight, bias=None, activation=None, direction="forward", cu_seqlens=None):
    if direction != "forward" or cu_seqlens is not None:
        raise NotImplementedError("F.conv1d: dense causal rows")
    D, W = weight.shape
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv1d(x, weight[:, None].to(x.dtype), bias, padding=W - 1, groups=D)[..., : x.shape[-1]]
    return F.silu(y) if activation == "silu" else y


def dao_causal_conv1d(x, weight, bias=None, activation=None, direction="forward", cu_seqlens=None):
    if direction != "forward" or cu_seqlens is not None:
        raise NotImplementedError("causal_conv1d_fn: dense causal rows")
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(x, weight, bias, activation=activation)


def loop_selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False,
    direction="forward", cu_seqlens=None,
):  # fmt: skip
    """Decays and inputs as [B,D,L,N] tensors, then a loop over time, as mamba-ssm's selective_scan_ref does it."""
    if direction != "forward" or cu_seqlens is not None or return_last_state or B.dim() != 3:
        raise NotImplementedError("the loop: dense rows read forwards, one group")
    u_wide, dt = u.float(), delta.float() if delta_bias is None else delta.float() + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    decays = torch.exp(dt[..., None] * A[:, None])
    inputs = (dt * u_wide)[..., None] * B.float().mT[:, None]
    h, ys = u_wide.new_zeros(len(u), *A.shape), []
    for decay, step, c in zip(decays.unbind(2), inputs.unbind(2), C.float().unbind(2), strict=True):
        h = decay * h + step
        ys.append((h * c[:, None]).sum(-1))
    y = torch.stack(ys, 2)
    y = y if D is None else y + D[:, None] * u_wide
    return (y if z is None else y * F.silu(z.float())).to(u.dtype)


def two_selective_scans(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, shift=True, cu_seqlens=None
):
    """What one does without this op: two calls of selective_scan, the second on flipped inputs."""
    if cu_seqlens is not None:
        raise NotImplementedError("two scans: dense rows")
    biases = (None, None) if delta_bias is None else delta_bias
    left = selective_scan(u, delta[0], A[0], B[0], C[0], None, None, biases[0], delta_softplus)
    flipped = (t.flip(-1) for t in (u, delta[1], B[1], C[1]))
    u_back, delta_back, B_back, C_back = flipped
    right = selective_scan(u_back, delta_back, A[1], B_back, C_back, None, None, biases[1], delta_softplus).flip(-1)
    y = F.pad(left, (1, -1)) + F.pad(right, (-1, 1)) if shift else left + right
    y = y if D is None else y + D.to(u.dtype)[:, None] * u
    return y if z is None else y * F.silu(z)


def mamba_selective_scan(*args, direction="forward", cu_seqlens=None, **kwargs):
    if direction != "forward" or cu_seqlens is not None:
        raise NotImplementedError("selective_scan_fn: dense rows read forwards")
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(*args, **kwargs)


def fla_retention(q, k, v, log_decay, *, scale=None, direction="bidirectional", cu_seqlens=None, **states):
    """What chunk_retention calls, which itself knows one set of decays; both directions are two passes."""
    if any(states.values()) or isinstance(scale, torch.Tensor) or direction == "backward":
        raise NotImplementedError("chunk_simple_gla: one scale, here without states")
    from fla.ops.simple_gla import chunk_simple_gla

    def causal(q, k, v, borders):
        return chunk_simple_gla(q, k, v, g_gamma=log_decay, scale=scale, cu_seqlens=borders)[0]

    borders = None if cu_seqlens is None else cu_seqlens.long()
    o = causal(q, k, v, borders)
    if direction == "forward":
        return o
    flipped = None if borders is None else q.shape[1] - borders.flip(0)
    back = causal(q.flip(1), k.flip(1), v.flip(1), flipped).flip(1)
    diagonal = (q * k).sum(-1, keepdim=True) * (q.shape[-1] ** -0.5 if scale is None else scale) * v
    return o + back - diagonal


@functools.lru_cache(maxsize=2)
def _decay_by_distance(T, log_decay, device):
    t = torch.arange(T, device=device)
    return (torch.tensor(log_decay, device=device)[:, None, None] * (t[:, None] - t).abs()).exp()


def eager_retention(q, k, v, log_decay, *, scale=None, direction="bidirectional", cu_seqlens=None, **states):
    """The scores as one matrix [H,T,T]; the decay is made once, not in every call."""
    if (
        any(states.values())
        or direction != "bidirectional"
        or cu_seqlens is not None
        or isinstance(scale, torch.Tensor)
    ):
        raise NotImplementedError("eager retention: dense rows in both directions")
    decay = _decay_by_distance(q.shape[1], tuple(log_decay.tolist()), q.device).to(q.dtype)
    scores = torch.einsum("bnhk,bmhk->bhnm", q, k) * (decay * (q.shape[3] ** -0.5 if scale is None else scale))
    return torch.einsum("bhnm,bmhv->bnhv", scores, v)


def torch_softmax(q, k, v, *, scale=None, causal=False, cu_seqlens=None, **options):
    """Softmax attention of the same shape, another equation: what one runs where these two are too slow."""
    if cu_seqlens is not None or options.get("prefix_k") is not None:
        raise NotImplementedError("scaled_dot_product_attention: dense rows")
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)


def loop_moe(
    x, router_logits, w_in, w_out, *, top_k, activation, gated, normalize_gates=None, bitnet=False, **others
):  # fmt: skip
    """The usual loop over experts: each takes its tokens and adds its outputs to their rows."""
    if bitnet or gated or others:
        raise NotImplementedError("the loop: plain experts without biases, norm or BitNet")
    gates, chosen = router_logits.float().softmax(-1).topk(top_k)
    if normalize_gates or (normalize_gates is None and top_k > 1):
        gates = gates / gates.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for e, (up, down) in enumerate(zip(w_in, w_out, strict=True)):
        tokens, choice = (chosen == e).nonzero(as_tuple=True)
        if len(tokens):
            h = F.linear(ACTIVATIONS[activation](F.linear(x[tokens], up)), down)
            y = y.index_add(0, tokens, (h * gates[tokens, choice, None]).to(x.dtype))
    return y


def liger_moe(
    x, router_logits, w_in, w_out, *, top_k, activation, gated, normalize_gates=None, bitnet=False, **others
):  # fmt: skip
    """LigerFusedMoEFunction is given the choice and the gates, here by PyTorch; it has no statistics of the router."""
    if activation != "silu" or not gated or bitnet or others:
        raise NotImplementedError("LigerFusedMoEFunction: SwiGLU without biases or norm")
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    probs, chosen = router_logits.float().softmax(-1).topk(top_k)
    if normalize_gates or (normalize_gates is None and top_k > 1):
        probs = probs / probs.sum(-1, keepdim=True)
    return LigerFusedMoEFunction.apply(x, w_in, w_out, chosen.int(), probs)


def torch_cross_entropy(hidden, weight, labels, bias=None, ignore_index=-100, z_loss=0.0, reduction="mean"):
    if z_loss:
        raise NotImplementedError("F.cross_entropy has no z loss")
    rows = labels != ignore_index
    logits = F.linear(hidden[rows], weight, None if bias is None else bias.to(hidden.dtype))
    return F.cross_entropy(logits.float(), labels[rows], reduction=reduction)


def liger_cross_entropy(hidden, weight, labels, bias=None, ignore_index=-100, z_loss=0.0, reduction="mean"):
    if not hidden.is_cuda:
        raise NotImplementedError("Liger's kernels run on a GPU")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=ignore_index, lse_square_scale=z_loss, reduction=reduction)
    return loss(weight, hidden.flatten(0, -2), labels.flatten(), bias)


def int8_weights(packed: PackedTernary, dtype: torch.dtype):
    """codesᵀ in two layouts and the scale.

    On a CPU, at 2048 × 2048, the first is faster for one row (0.05 against 0.3 ms), the second for 8 (0.25, 0.37 ms).
    """
    codes, scale = unpack_ternary(packed)
    return codes.t(), codes.t().contiguous(), scale


def torch_int_mm(x, packed):
    if x.is_cuda and len(x) <= 16:
        raise NotImplementedError("torch._int_mm: more than 16 rows on a GPU")
    return torch._int_mm(x, packed[0] if x.is_cuda or len(x) == 1 else packed[1])


def torch_int_mm_linear(x, packed, bias=None):
    """Tokens quantised by PyTorch's functions: what one writes without a kernel."""
    step = x.float().abs().amax(-1, keepdim=True).clamp_(min=1e-5).div_(127)
    product = torch_int_mm((x / step).round_().to(torch.int8), packed)
    y = product * (step * packed[2])
    return (y if bias is None else y + bias).to(x.dtype)


def int8pack_weights(packed: PackedTernary, dtype: torch.dtype):
    codes, scale = unpack_ternary(packed)
    return codes, scale.to(torch.bfloat16).expand(len(codes)).contiguous()


def torch_int8pack(x, packed, bias=None):
    """Activations are not quantised but bfloat16, the one dtype in which torch._weight_int8pack_mm is fast."""
    y = torch._weight_int8pack_mm(x.bfloat16(), *packed).to(torch.int32 if x.dtype == torch.int8 else x.dtype)
    return y if bias is None else y + bias


def dense_weights(packed: PackedTernary, dtype: torch.dtype):
    codes, scale = unpack_ternary(packed)
    return (codes * scale).to(dtype)


def torch_linear(x, packed, bias=None):
    """Without rounding of activations: the layer that these weights replace."""
    return F.linear(x, packed, None if bias is None else bias.to(x.dtype))


def torch_linear_for_bitlinear(x, weight, bias=None, norm_weight=None, scale="mean"):
    """Without any rounding: the layer that bitlinear replaces."""
    x = x if norm_weight is None else F.rms_norm(x, x.shape[-1:], norm_weight.to(x.dtype), 1e-6)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


# Weights as a peer keeps them, made of the packed ones and the case's dtype before the clock starts.
PREPARED: dict[str, Callable[[PackedTernary, torch.dtype], Any]] = {
    "torch-int_mm": int8_weights,
    "torch-int8pack": int8pack_weights,
    "torch-linear": dense_weights,
    "bitnet.cpp-i2s": lambda packed, dtype: i2s.pack(*unpack_ternary(packed)),
}

PEERS: dict[str, dict[str, Callable[..., torch.Tensor | tuple[Any, ...]]]] = {
    "bidirectional_scan": {"two-scans": two_selective_scans},
    "bitlinear": {"torch-linear": torch_linear_for_bitlinear},
    "causal_conv1d": {"torch": torch_conv1d, "causal-conv1d": dao_causal_conv1d},
    "hope_attention": {"torch-softmax": torch_softmax},
    "layer_norm": {"torch": torch_layer_norm},
    "masked_linear_cross_entropy": {"liger-kernel": liger_cross_entropy, "torch": torch_cross_entropy},
    "moe_ffn": {"liger-kernel": liger_moe, "loop": loop_moe},
    "retention": {"flash-linear-attention": fla_retention, "torch-eager": eager_retention},
    "selective_scan": {"loop": loop_selective_scan, "mamba-ssm": mamba_selective_scan},
    "sigmoid_attention": {"torch-softmax": torch_softmax},
    "ternary_linear": {
        "bitnet.cpp-i2s": i2s.linear,
        "torch-int8pack": torch_int8pack,
        "torch-int_mm": torch_int_mm_linear,
        "torch-linear": torch_linear,
    },
    "ternary_matmul": {
        "bitnet.cpp-i2s": i2s.matmul,
        "torch-int8pack": torch_int8pack,
        "torch-int_mm": torch_int_mm,
    },
}
