"""Shapes, inputs, bytes and flops of the mixture of experts, for tests and bench.

Routing is discontinuous, so logits are distinct multiples of 1/8 within a row, which half precisions hold exactly.
"""

from __future__ import annotations

import torch

from .._testing import Case, Inputs
from ..bitlinear.cases import grid_tokens, ternary_weights
from ..bitlinear.reference import quantize_tokens, quantize_weight, rms_norm
from .reference import inner


def distinct_logits(g: torch.Generator, T: int, E: int) -> torch.Tensor:
    ranks = torch.rand(T, E, generator=g).argsort(-1)
    return (ranks - E // 2) * 0.375 + torch.randint(-4, 5, (T, 1), generator=g) * 0.125


def _far_from_ties(inputs: Inputs, rows: torch.Tensor) -> torch.Tensor:
    """Which rows of x give, in every expert, hidden activations at least 1e-3 of a step away from a rounding tie.

    float32 errs by about 1e-5 of a step there, so it takes the float64 decisions.
    """
    safe = torch.ones(rows.shape[0], dtype=torch.bool)
    codes, step = quantize_tokens(rows)
    for e, w in enumerate(inputs["w_in"]):
        w_codes, gamma = quantize_weight(w)
        h = (codes * step) @ (w_codes * gamma).t()
        if "b_in" in inputs:
            h = h + inputs["b_in"][e]
        h = inner(h, inputs["activation"], inputs["gated"])
        if "sub_norm" in inputs:
            h = rms_norm(h, inputs["sub_norm"])
        scaled = h * 127 / h.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        safe &= ((scaled - scaled.floor() - 0.5).abs() > 1e-3).all(-1)
    return safe


def case(
    name: str,
    T: int,
    D: int,
    F: int,
    E: int,
    k: int,
    activation: str = "silu",
    gated: bool = False,
    biases: bool = False,
    normalize_gates: bool | None = None,
    select_bias: bool = False,
    sub_norm: bool = False,
    bitnet: bool = False,
    one_expert: bool = False,
    strided: bool = False,
    bench: bool = False,
    large: bool = False,
) -> Case:
    rows_in = 2 * F if gated else F

    def make(g: torch.Generator) -> Inputs:
        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

        draw_weight = (lambda *s: ternary_weights(g, *s)) if bitnet else (lambda *s: normal(*s, scale=s[-1] ** -0.5))
        logits = distinct_logits(g, T, E).double()
        if one_expert:  # all tokens go to expert 0, the others get none
            logits[:, 0] += 2
        inputs: Inputs = {
            "router_logits": logits,
            "w_in": torch.stack([draw_weight(rows_in, D) for _ in range(E)]),
            "w_out": torch.stack([draw_weight(D, F) for _ in range(E)]),
            "top_k": k,
            "activation": activation,
            "gated": gated,
            "normalize_gates": normalize_gates,
            "bitnet": bitnet,
        }
        if biases:
            inputs |= {"b_in": normal(E, rows_in, scale=0.3), "b_out": normal(E, D, scale=0.3)}
        if select_bias:
            inputs["select_bias"] = torch.arange(E, dtype=torch.float64).flip(0) / 16
        if sub_norm:
            inputs["sub_norm"] = 1 + normal(F, scale=0.2)
        if bitnet:
            pool = grid_tokens(g, 4 * T + 16, D)
            x = pool[_far_from_ties(inputs, pool)][:T]
            assert len(x) == T, f"{name}: only {len(x)} of {T} rows are away from ties"
        else:
            x = normal(T, D)
        if strided:
            x = x.t().contiguous().t()
            inputs["w_in"] = inputs["w_in"].transpose(1, 2).contiguous().transpose(1, 2)
            inputs["router_logits"] = logits.t().contiguous().t()
        return {"x": x} | inputs

    return Case(
        name=name,
        make=make,
        small=("router_logits", "b_in", "b_out", "sub_norm", "select_bias"),
        constant=("select_bias",),
        through_half=("drouter_logits", "db_in", "db_out", "dsub_norm"),
        # the longest: a weight's gradient over its tokens, or dx through both products
        reduction=max(T * k, D * rows_in),
        elements=2 * T * D + T * E + E * (rows_in + F) * D,
        flops=2 * T * k * D * (rows_in + F),
        bench=bench,
        large=large,
        # Hidden activations in half precision fall on other sides of ties; tests/ops/test_moe_ffn.py has those.
        dtypes=(torch.float32,) if bitnet else (torch.float32, torch.bfloat16, torch.float16),
    )


CASES = [
    case("T1-D2-F3-E1-k1", 1, 2, 3, 1, 1),
    case("T0-E4-k2", 0, 8, 12, 4, 2, biases=True),
    case("T63-D16-F24-E4-k2", 63, 16, 24, 4, 2),
    case("T63-E4-k1-gelu-biases", 63, 17, 13, 4, 1, activation="gelu", biases=True),
    case("T113-E7-k3-gated", 113, 20, 9, 7, 3, gated=True, biases=True),
    case("T33-E5-k5-relu2-subnorm", 33, 12, 16, 5, 5, activation="relu2", sub_norm=True),
    case("T33-E6-k2-selectbias-raw", 33, 12, 16, 6, 2, activation="relu", select_bias=True, normalize_gates=False),
    case("T33-all-to-one", 33, 12, 16, 4, 1, one_expert=True, biases=True),
    case("T31-strided", 31, 12, 16, 4, 2, strided=True),
    case("T31-bitnet", 31, 24, 32, 4, 2, bitnet=True),
    case("T31-bitnet-gated-subnorm", 31, 24, 16, 3, 1, bitnet=True, gated=True, sub_norm=True, biases=True),
    # the Triton kernels' tiles: sizes in multiples of 16, rows per expert up to 16, 128 and more, many experts
    case("T24-D32-F48-E4-k2", 24, 32, 48, 4, 2, biases=True),
    case("T24-D16-F16-E3-k2-gated-subnorm", 24, 16, 16, 3, 2, gated=True, biases=True, sub_norm=True),
    case("T40-D16-F17-E3-k1-subnorm", 40, 16, 17, 3, 1, activation="gelu", sub_norm=True),
    case("T100-D16-F32-E4-k2-gated", 100, 16, 32, 4, 2, activation="gelu", gated=True),
    case("T100-D32-F16-E4-k2", 100, 32, 16, 4, 2, activation="relu"),
    case("T300-D16-F16-E2-k1", 300, 16, 16, 2, 1, activation="relu2"),
    case("T300-D16-F32-E2-k1-gated", 300, 16, 32, 2, 1, gated=True),
    case("T50-E40-k8", 50, 5, 3, 40, 8, biases=True),
    case("mini-T2048-D384-F768-E4-k2", 2048, 384, 768, 4, 2, bench=True),
    case("T1024-D768-F768-E8-k2", 1024, 768, 768, 8, 2, bench=True),
    case("frankenstein-T512-D1024-F2048-E4-k2", 512, 1024, 2048, 4, 2, bench=True),
    # an encoder's, a sparser one's, and that of Liger-Kernel's own table
    case("T16384-D768-F1152-E8-k2-gated", 16384, 768, 1152, 8, 2, gated=True, bench=True, large=True),
    case("T16384-D768-F512-E64-k4-gated", 16384, 768, 512, 64, 4, gated=True, bench=True, large=True),
    case("T8192-D2048-F768-E128-k8-gated", 8192, 2048, 768, 128, 8, gated=True, bench=True, large=True),
]
