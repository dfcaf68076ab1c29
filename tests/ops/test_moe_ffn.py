"""The mixture of experts against a token-by-token loop, and what routing must and must not change."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional

from ultra_kernels import _native, bitlinear, moe_ffn
from ultra_kernels._dispatch import OPS
from ultra_kernels.bitlinear.reference import bitlinear as reference_bitlinear
from ultra_kernels.moe_ffn.cases import distinct_logits

NATIVE = _native.missing()
BACKENDS = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("reference", torch.float64),
        pytest.param("native", torch.float32, marks=pytest.mark.skipif(NATIVE is not None, reason=str(NATIVE))),
    ],
)
ACT = {
    "silu": lambda h: h * torch.sigmoid(h),
    "gelu": lambda h: h * (1 + torch.erf(h / 2**0.5)) / 2,
    "relu": lambda h: h.clamp(min=0),
    "relu2": lambda h: h.clamp(min=0) ** 2,
}


def inputs(T=23, D=6, F=5, E=4, gated=False, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = 2 * F if gated else F

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    return {
        "x": normal(T, D),
        "router_logits": distinct_logits(g, T, E).to(dtype).requires_grad_(),
        "w_in": normal(E, rows, D),
        "w_out": normal(E, D, F),
        "b_in": normal(E, rows),
        "b_out": normal(E, D),
    }


def loop(
    x, router_logits, w_in, w_out, b_in=None, b_out=None, *, top_k, activation="silu", gated=False,
    normalize_gates=None, select_bias=None, sub_norm=None, bitnet=False, bitnet_scale="mean",
):  # fmt: skip
    """One token and one expert at a time, straight from the equations."""
    F = w_out.shape[-1]
    linear = functools.partial(bitlinear, scale=bitnet_scale) if bitnet else functional.linear
    probs = router_logits.softmax(-1)
    rows, counts = [], [0] * w_in.shape[0]
    for t in range(x.shape[0]):
        scores = probs[t] + (0 if select_bias is None else select_bias)
        chosen = sorted(range(len(counts)), key=lambda e: -scores[e].item())[:top_k]
        total = sum(probs[t, e] for e in chosen)
        normalised = normalize_gates if normalize_gates is not None else top_k > 1
        y = torch.zeros_like(x[t])
        for e in chosen:
            counts[e] += 1
            h = linear(x[t : t + 1], w_in[e], None if b_in is None else b_in[e])[0]
            h = ACT[activation](h[:F]) * h[F:] if gated else ACT[activation](h)
            if sub_norm is not None:
                h = sub_norm * h / (h.square().mean() + 1e-6).sqrt()
            out = linear(h[None], w_out[e], None if b_out is None else b_out[e])[0]
            y = y + out * (probs[t, e] / total if normalised else probs[t, e])
        rows.append(y)
    z = (router_logits.exp().sum(-1).log() ** 2).mean()
    return torch.stack(rows), torch.tensor(counts), probs.mean(0), z


def compare(arguments, **options):
    leaves = [v for v in arguments.values() if v.requires_grad]
    if "sub_norm" in options:
        leaves.append(options["sub_norm"])
    y, stats = moe_ffn(**arguments, **options)
    want, counts, mean_prob, z = loop(**arguments, **options)
    torch.testing.assert_close(y, want)
    assert stats.counts.dtype == torch.int64 and torch.equal(stats.counts, counts)
    torch.testing.assert_close(stats.mean_prob, mean_prob)
    torch.testing.assert_close(stats.z, z)
    g = torch.Generator().manual_seed(9)
    cotangents = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (y, mean_prob, z)]
    got = torch.autograd.grad([y, stats.mean_prob, stats.z], leaves, cotangents)
    expected = torch.autograd.grad([want, mean_prob, z], leaves, cotangents, materialize_grads=True)
    for leaf, a, b in zip(leaves, got, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, s=leaf.shape: f"gradient of the {tuple(s)} argument: {m}")


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "relu2"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("normalize_gates", [None, False])
def test_equals_the_loop(top_k, activation, gated, normalize_gates):
    compare(inputs(gated=gated), top_k=top_k, activation=activation, gated=gated, normalize_gates=normalize_gates)


@pytest.mark.parametrize("options", [{}, {"bitnet": True}, {"bitnet": True, "bitnet_scale": "median"}])
def test_equals_the_loop_with_sub_norm_and_selection_bias(options):
    arguments = inputs()
    del arguments["b_in"], arguments["b_out"]
    sub_norm = torch.linspace(0.5, 2, 5, dtype=torch.float64).requires_grad_()
    bias = torch.tensor([0.0, 0.6, -0.3, 0.1], dtype=torch.float64)
    compare(arguments, top_k=2, sub_norm=sub_norm, select_bias=bias, **options)


def test_selection_bias_selects_and_does_not_weigh():
    arguments = inputs(E=4)
    pushed = torch.tensor([9.0, 0.0, 0.0, 9.0], dtype=torch.float64)
    y, stats = moe_ffn(**arguments, top_k=2, select_bias=pushed)
    assert stats.counts.tolist() == [23, 0, 0, 23]
    masked = arguments["router_logits"].detach().clone()
    masked[:, 1:3] = -torch.inf  # the same choice made by the logits themselves
    torch.testing.assert_close(y, moe_ffn(**arguments | {"router_logits": masked}, top_k=2)[0])


def test_gates_far_below_the_smallest_float_are_still_normalised():
    arguments = inputs(E=3, dtype=torch.float32)
    logits = torch.tensor([[0.0, -300.0, -301.0]]).repeat(23, 1)
    y, _ = moe_ffn(**arguments | {"router_logits": logits}, top_k=2, select_bias=torch.tensor([-9.0, 0, 0]))
    shifted = torch.tensor([[-torch.inf, 0.0, -1.0]]).repeat(23, 1)
    torch.testing.assert_close(y, moe_ffn(**arguments | {"router_logits": shifted}, top_k=2)[0])


@BACKENDS
def test_one_expert_is_the_dense_ffn(backend, dtype):
    a = inputs(E=1, dtype=dtype)
    y, stats = moe_ffn(**a, top_k=1, activation="gelu", backend=backend)
    h = functional.gelu(functional.linear(a["x"], a["w_in"][0], a["b_in"][0]))
    torch.testing.assert_close(y, functional.linear(h, a["w_out"][0], a["b_out"][0]))
    assert stats.counts.tolist() == [23] and stats.mean_prob.tolist() == [1.0]


@BACKENDS
def test_permuting_the_experts_changes_nothing(backend, dtype):
    a, order = inputs(dtype=dtype), torch.tensor([2, 0, 3, 1])
    permuted = {n: t if n == "x" else t[:, order] if n == "router_logits" else t[order] for n, t in a.items()}
    y, stats = moe_ffn(**a, top_k=2, backend=backend)
    y2, stats2 = moe_ffn(**permuted, top_k=2, backend=backend)
    torch.testing.assert_close(y, y2)
    assert torch.equal(stats.counts[order], stats2.counts)


@BACKENDS
def test_a_token_depends_on_itself_alone(backend, dtype):
    a = inputs(dtype=dtype)
    y, _ = moe_ffn(**a, top_k=2, backend=backend)
    for rows in ([5], [7, 3, 11]):
        some, _ = moe_ffn(**a | {n: a[n][rows] for n in ("x", "router_logits")}, top_k=2, backend=backend)
        torch.testing.assert_close(some, y[rows])


def test_router_gradient_with_one_expert_per_token():
    """Not renormalised, or the gate would be the constant 1 and the router would never learn."""
    a = inputs()
    (raw,) = torch.autograd.grad(moe_ffn(**a, top_k=1)[0].sum(), a["router_logits"])
    assert (raw.abs().amax(-1) > 0).all()
    (scaled,) = torch.autograd.grad(moe_ffn(**a, top_k=1, normalize_gates=True)[0].sum(), a["router_logits"])
    assert scaled.abs().max() == 0


@pytest.mark.parametrize("bitnet", [False, True])
def test_experts_without_a_token_get_zero_gradients(bitnet):
    a = inputs()
    with torch.no_grad():
        a["router_logits"][:, 1:3] -= 50
    y, stats = moe_ffn(**a, top_k=2, bitnet=bitnet)
    assert stats.counts.tolist() == [23, 0, 0, 23]
    for name in ("w_in", "w_out", "b_in", "b_out"):
        (grad,) = torch.autograd.grad(y.sum(), a[name], retain_graph=True)
        assert grad[1:3].abs().max() == 0 and (grad[[0, 3]].abs().amax(tuple(range(1, grad.ndim))) > 0).all(), name


def test_no_tokens():
    a = inputs(T=0)
    y, stats = moe_ffn(**a, top_k=2)
    assert y.shape == (0, 6) and stats.counts.tolist() == [0] * 4
    assert stats.mean_prob.tolist() == [0] * 4 and stats.z.item() == 0
    for grad, leaf in zip(
        torch.autograd.grad(y.sum() + stats.z + stats.mean_prob.sum(), list(a.values())), a.values(), strict=True
    ):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_gradcheck_away_from_routing_borders():
    a = inputs(T=5, D=3, F=2, E=3)
    with torch.no_grad():  # ten times the step between logits: a finite difference cannot change the choice
        a["router_logits"] *= 2
    assert torch.autograd.gradcheck(
        lambda *v: moe_ffn(**dict(zip(a, v, strict=True)), top_k=2)[0], tuple(a.values()), eps=1e-6
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sub_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bitnet_experts_are_bitlinear_layers(gated, sub_norm, dtype):
    """With all tokens in one expert the op is two BitLinear layers to the last bit: all rounding decisions agree."""
    a = inputs(E=1, gated=gated, dtype=dtype)
    norm = torch.linspace(0.5, 2, 5) if sub_norm else None
    options = {"top_k": 1, "activation": "relu2", "gated": gated, "bitnet": True, "sub_norm": norm}
    y, _ = moe_ffn(**a, **options, backend="reference")
    h = bitlinear(a["x"], a["w_in"][0], a["b_in"][0], backend="reference").float()
    h = h[:, :5].relu().square() * h[:, 5:] if gated else h.relu().square()
    assert torch.equal(y, reference_bitlinear(h, a["w_out"][0], a["b_out"][0], norm, "mean", dtype))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sub_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitnet_experts_on_the_kernels_of_bitlinear(gated, sub_norm, dtype):
    if (reason := OPS["bitlinear"].why_not("native", torch.zeros(1))) is not None:
        pytest.skip(reason)
    a = inputs(E=1, gated=gated, dtype=dtype)
    norm = torch.linspace(0.5, 2, 5) if sub_norm else None
    y, _ = moe_ffn(**a, top_k=1, activation="relu2", gated=gated, bitnet=True, sub_norm=norm, backend="native")
    h = bitlinear(a["x"], a["w_in"][0], a["b_in"][0], backend="native").float()
    h = h[:, :5].relu().square() * h[:, 5:] if gated else h.relu().square()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        want = bitlinear(h, a["w_out"][0], a["b_out"][0], norm_weight=norm, backend="native")
    assert torch.equal(y, want)


def test_autocast_multiplies_in_the_autocast_dtype_and_routes_in_float32():
    a = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, stats = moe_ffn(**a, top_k=2)
    halves = {n: a[n].bfloat16() for n in ("x", "w_in", "w_out")}
    want, exact = moe_ffn(**a | halves, top_k=2)
    assert y.dtype == torch.bfloat16 and torch.equal(y, want)
    assert stats.z.dtype == stats.mean_prob.dtype == torch.float32
    assert torch.equal(stats.z, exact.z) and torch.equal(stats.mean_prob, exact.mean_prob)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), list(a.values())))


@pytest.mark.parametrize("bitnet", [False, True])
def test_compiles_without_a_graph_break(bitnet):
    a = inputs(dtype=torch.float32)
    compiled = torch.compile(moe_ffn, fullgraph=True, backend="aot_eager")

    def grads(fn):
        y, stats = fn(**a, top_k=2, bitnet=bitnet)
        return torch.autograd.grad(y.square().sum() + stats.z + stats.mean_prob.square().sum(), list(a.values()))

    for x, y in zip(grads(moe_ffn), grads(compiled), strict=True):
        torch.testing.assert_close(x, y)


def test_errors_name_the_argument():
    a = inputs()
    for change, message in (
        ({"top_k": 5}, r"top_k=5 must be between 1 and the number of experts, 4"),
        ({"top_k": 0}, r"top_k=0"),
        ({"activation": "tanh"}, r"'tanh' is unknown; known are silu"),
        ({"gated": True}, r"w_in has shape \(4, 5, 6\); with .*gated=True it must be \(4, 10, 6\)"),
        ({"b_out": a["b_out"][:3]}, r"b_out has shape \(3, 6\)"),
        ({"router_logits": a["router_logits"][:3]}, r"\(T, D\) and \(T, E\)"),
        ({"sub_norm": torch.ones(6)}, r"sub_norm has shape \(6,\).*\(5,\)"),
        (
            {"select_bias": torch.ones(3)},
            r"select_bias has shape \(3,\); with router_logits \(23, 4\).* \(4,\)",
        ),
        ({"w_out": a["w_out"].mT}, r"w_out has shape \(4, 5, 6\).* must be \(4, 6, F\)"),
        ({"w_out": a["w_out"][0, 0, 0]}, r"w_out has shape \(\)"),
        ({"router_logits": a["router_logits"][:, :3]}, r"w_out has shape .*router_logits \(23, 3\)"),
        ({"w_in": a["w_in"][:, :0], "w_out": a["w_out"][..., :0], "b_in": None}, r"D and F must be at least 1"),
        ({"x": a["x"].int()}, r"x is torch.int32 .* must be floats"),
        ({"select_bias": torch.ones(4, device="meta")}, r"x is on cpu, select_bias on meta"),
        ({"b_in": a["b_in"].to("meta"), "bitnet": True}, r"x is on cpu, b_in on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            moe_ffn(**{"top_k": 2} | a | change)


@BACKENDS
def test_a_second_derivative_is_refused_without_advice_that_does_not_help(backend, dtype):
    a = inputs(dtype=dtype)
    y, _ = moe_ffn(**a, top_k=2, backend=backend)
    (first,) = torch.autograd.grad(y.square().sum(), [a["x"]], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative: .*; no backend of moe_ffn"):
        first.sum().backward()
