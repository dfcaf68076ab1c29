"""BitLinear: levels, scales, the straight-through gradient by its formula, and what a token may depend on."""

from __future__ import annotations

import pytest
import torch

from ultra_kernels import bitlinear
from ultra_kernels.bitlinear.cases import CASES, grid_tokens, ternary_weights
from ultra_kernels.bitlinear.reference import quantize_tokens, quantize_weight


def draw(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def literal_weight(w, scale):
    """Entry by entry, in Python; `round` of a Python float is half to even."""
    magnitudes = sorted(abs(v) for v in w.flatten().tolist())
    gamma = sum(magnitudes) / len(magnitudes) if scale == "mean" else magnitudes[(len(magnitudes) - 1) // 2]
    levels = [[max(-1, min(1, round(v / (gamma + 1e-5)))) for v in row] for row in w.tolist()]
    return torch.tensor(levels, dtype=torch.float64) * gamma


def literal_tokens(x):
    rows = []
    for row in x.tolist():
        absmax = max(max(abs(v) for v in row), 1e-5)
        rows.append([max(-128, min(127, round(127 * v / absmax))) * absmax / 127 for v in row])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("scale", ["mean", "median"])
@pytest.mark.parametrize("K", [1, 6, 13])
def test_literal_formula_and_gradients(scale, K):
    """y = x̂ Ŵᵀ + b, dx = dy Ŵ, dW = dyᵀ x̂, db = Σ dy: the scales are constants to the gradient."""
    x, w, b = draw(5, K).requires_grad_(), draw(4, K, seed=1).requires_grad_(), draw(4, seed=2).requires_grad_()
    x_hat, w_hat, dy = literal_tokens(x.detach()), literal_weight(w.detach(), scale), draw(5, 4, seed=3)
    y = bitlinear(x, w, b, scale=scale)
    torch.testing.assert_close(y, x_hat @ w_hat.t() + b)
    dx, dw, db = torch.autograd.grad(y, (x, w, b), dy)
    torch.testing.assert_close(dx, dy @ w_hat)
    torch.testing.assert_close(dw, dy.t() @ x_hat)
    torch.testing.assert_close(db, dy.sum(0))


def test_norm_is_rms_norm_before_the_quantiser_and_is_differentiated():
    x, w, gain = draw(5, 12).requires_grad_(), draw(4, 12, seed=1), (1 + 0.2 * draw(12, seed=2)).requires_grad_()
    normal = gain * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    y, want = bitlinear(x, w, norm_weight=gain), bitlinear(normal, w)
    torch.testing.assert_close(y, want)
    dy = draw(5, 4, seed=3)
    for a, b in zip(torch.autograd.grad(y, (x, gain), dy), torch.autograd.grad(want, (x, gain), dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scale", ["mean", "median"])
def test_three_levels_and_integer_codes(scale):
    codes, gamma = quantize_weight(draw(64, 48), scale)
    assert codes.unique().tolist() == [-1, 0, 1]
    assert gamma == (draw(64, 48).abs().mean() if scale == "mean" else draw(64, 48).abs().median())
    # 31 % zeros for Gaussian weights and the mean: P(|w| < 0.5 · 0.7979 σ) = 0.310; 3072 draws err by 0.8 %
    if scale == "mean":
        assert abs(float((codes == 0).double().mean()) - 0.310) < 0.034
    tokens, _ = quantize_tokens(draw(200, 48, dtype=torch.float32))
    assert torch.equal(tokens, tokens.round()) and tokens.abs().amax(-1).eq(127).all()


def test_token_codes_on_many_values():
    """2560 codes: a grid off by 0.2 % moves about one in ten of them."""
    x = draw(40, 64)
    codes, step = quantize_tokens(x)
    torch.testing.assert_close(codes * step, literal_tokens(x))


def test_ties_round_to_even():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.0]])
    assert quantize_tokens(x)[0].tolist() == [[0, 2, 2, 0, -2, -2, 127]]


def test_the_least_scales():
    """Both are 1e-5: the least absmax of a token, and the term beside γ (0.9 / 1.9 rounds down, 1.1 / 2.1 up)."""
    assert quantize_tokens(torch.tensor([[4e-6, -1e-6]]))[0].tolist() == [[51, -13]]  # 127 · 0.4, 127 · 0.1
    assert quantize_weight(torch.full((2, 2), 0.9e-5))[0].unique().tolist() == [0]
    assert quantize_weight(torch.full((2, 2), 1.1e-5))[0].unique().tolist() == [1]


def test_zero_rows_and_zero_weights_give_the_bias():
    x, w, b = torch.zeros(3, 8, requires_grad=True), draw(4, 8, dtype=torch.float32), draw(4, dtype=torch.float32)
    for weight in (w, torch.zeros_like(w)):
        y = bitlinear(x, weight, b)
        assert torch.equal(y, b.expand(3, 4))
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx.isfinite().all()
    assert torch.equal(bitlinear(x, w, norm_weight=torch.ones(8)), torch.zeros(3, 4))


def test_nan_and_inf_are_not_hidden():
    x = draw(3, 8, dtype=torch.float32)
    x[0, 2], x[1, 2] = float("nan"), float("inf")
    y = bitlinear(x, draw(4, 8, dtype=torch.float32))
    assert not y[:2].isfinite().any() and y[2].isfinite().all()


def test_a_token_depends_on_itself_alone():
    x, w = draw(6, 9, dtype=torch.float32), draw(5, 9, seed=1, dtype=torch.float32)
    changed = x.clone()
    changed[2] *= 50
    a, b = bitlinear(x, w, norm_weight=torch.ones(9)), bitlinear(changed, w, norm_weight=torch.ones(9))
    others = [0, 1, 3, 4, 5]
    assert torch.equal(a[others], b[others])
    torch.testing.assert_close(bitlinear(x[2:3], w), bitlinear(x, w)[2:3])


def test_two_and_three_dimensions_agree():
    x, w = draw(6, 9, dtype=torch.float32), draw(5, 9, seed=1, dtype=torch.float32)
    assert torch.equal(bitlinear(x.view(2, 3, 9), w), bitlinear(x, w).view(2, 3, 5))


@pytest.mark.parametrize("c", [2.0**-6, 3.7])
def test_scaling_x_scales_y(c):
    x, w = grid_tokens(torch.Generator().manual_seed(0), 6, 9), draw(5, 9, seed=1)
    torch.testing.assert_close(bitlinear(c * x, w), c * bitlinear(x, w))


def test_half_precision_takes_the_float64_decisions_on_the_cases():
    """What makes the suite's tolerances meaningful: no rounding decision of a case depends on the precision."""
    for case in CASES:
        if case.bench or "norm_weight" in case.inputs(torch.float64):
            continue
        wide = case.inputs(torch.float64)
        for dtype in case.dtypes:
            narrow = case.inputs(dtype)
            assert torch.equal(narrow["x"].double(), wide["x"]), case.name  # exactly representable
            assert torch.equal(quantize_tokens(narrow["x"])[0].double(), quantize_tokens(wide["x"])[0]), case.name
            for scale in ("mean", "median"):
                codes = quantize_weight(narrow["weight"], scale)[0].double()
                assert torch.equal(codes, quantize_weight(wide["weight"], scale)[0]), case.name
    g = torch.Generator().manual_seed(0)
    scaled = grid_tokens(g, 200, 64)
    scaled = scaled / scaled.abs().amax(-1, keepdim=True) * 127
    assert ((scaled - scaled.floor() - 0.5).abs() > 0.24).all()
    assert len(quantize_weight(ternary_weights(g, 5, 7))[0].unique()) == 3


def test_autocast_quantises_float32_and_multiplies_in_bfloat16():
    x, w = draw(6, 9, dtype=torch.float32).requires_grad_(), draw(5, 9, seed=1, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = bitlinear(x, w)
    x_hat, w_hat = literal_tokens(x.detach()), literal_weight(w.detach(), "mean")
    assert y.dtype == torch.bfloat16
    # two factors and the result rounded to 8 bits: 3 · 2⁻⁹, against the largest value
    want = x_hat @ w_hat.t()
    assert (y.double() - want).abs().max() <= 3 * 2**-9 * (x_hat.abs() @ w_hat.abs().t()).max()
    assert [g.dtype for g in torch.autograd.grad(y.sum(), (x, w))] == [torch.float32] * 2


def test_compiles_without_a_graph_break():
    x, w, n = (draw(*s, dtype=torch.float32).requires_grad_() for s in ((6, 9), (5, 9), (9,)))
    compiled = torch.compile(bitlinear, fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(bitlinear(x, w, norm_weight=n).square().sum(), (x, w, n))
    got = torch.autograd.grad(compiled(x, w, norm_weight=n).square().sum(), (x, w, n))
    for a, b in zip(eager, got, strict=True):
        torch.testing.assert_close(a, b)


def test_inputs_are_left_alone():
    x, w, n = (draw(*s, dtype=torch.float32) for s in ((6, 9), (5, 9), (9,)))
    before = x.clone(), w.clone(), n.clone()
    bitlinear(x, w, norm_weight=n, scale="median")
    assert all(torch.equal(a, b) for a, b in zip(before, (x, w, n), strict=True))


def test_errors_name_the_argument():
    x, w = draw(6, 9), draw(5, 9)
    with pytest.raises(ValueError, match=r"weight has shape \(5, 8\).*\(N, 9\)"):
        bitlinear(x, w[:, :8])
    with pytest.raises(ValueError, match=r"bias has shape \(4,\).*\(5,\)"):
        bitlinear(x, w, draw(4))
    with pytest.raises(ValueError, match=r"norm_weight has shape \(5,\).*\(9,\)"):
        bitlinear(x, w, norm_weight=draw(5))
    with pytest.raises(ValueError, match="'max' is unknown"):
        bitlinear(x, w, scale="max")
