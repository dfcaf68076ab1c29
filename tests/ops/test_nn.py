"""The layers of ultra_kernels.nn: against their equations written out, against the trainer's mixers, and as modules."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import linear, silu, softplus

pytest.importorskip("pydantic")  # of the trainer's mixers; the layers need torch alone

from ultra.config import UltraConfig
from ultra.layers.sequences import Sequences
from ultra.mixers import MIXERS
from ultra_kernels import nn as layers

D, H = 24, 2
MIXING = {
    "retention": lambda **k: layers.Retention(D, H, **k),
    "retention-backward": lambda **k: layers.Retention(D, H, direction="backward", value_factor=2, bias=True, **k),
    "mamba": lambda **k: layers.Mamba(D, d_state=4, **k),
    "mamba-add": lambda **k: layers.Mamba(D, d_state=3, shift=False, dt_rank=5, bias=True, **k),
    "mamba-causal": lambda **k: layers.Mamba(D, d_state=4, direction="forward", **k),
    "sigmoid": lambda **k: layers.SigmoidAttention(D, H, **k),
    "sigmoid-plain": lambda **k: layers.SigmoidAttention(
        D, H, rotary=False, qk_norm=False, logit_bias=-1.5, causal=True, bias=True, **k
    ),
    "hope": lambda **k: layers.HopeAttention(D, H, **k),
    "hope-all": lambda **k: layers.HopeAttention(
        D, H, rotary_heads=1, num_prefix_tokens=3, learn_damping=True, qk_norm=True, **k
    ),
}
TOKENWISE = {
    "rms_norm": lambda **k: layers.RMSNorm(D, **k),
    "dyt": lambda **k: layers.DyT(D, 0.8, **k),
    "derf": lambda **k: layers.Derf(D, **k),
    "bitlinear": lambda **k: layers.BitLinear(D, 10, norm=True, **k),
    "moe": lambda **k: layers.MoE(D, 16, 4, **k),
    "moe-all": lambda **k: layers.MoE(
        D, 16, 4, 1, gated=True, bias=True, balance_bias=True, sub_norm=True, activation="gelu", **k
    ),
}
ALL = MIXING | TOKENWISE


def moved(make, seed: int = 0, dtype: torch.dtype = torch.float64):
    """The layer with parameters off the special values of their initialisation: zero biases, unit gains."""
    torch.manual_seed(seed)
    layer = make(dtype=dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return layer


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def first(output):
    return output[0] if isinstance(output, tuple) else output


# ---- equations


def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """x [T,H,K] with the pair i at place n turned by n · angles_i, as a product of complex numbers."""
    phase = torch.arange(len(x), dtype=torch.float64)[:, None, None] * angles
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.exp(1j * phase)).flatten(-2)


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (H, -1))


def rms(x: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("direction", ["bidirectional", "forward", "backward"])
def test_retention_is_its_equation(direction: str) -> None:
    layer = moved(lambda **k: layers.Retention(D, H, window=(3, 40), direction=direction, **k))
    x = tokens(1, 13)[0]
    q, k, v, g = linear(x, layer.qkvg.weight).chunk(4, -1)
    angles = 10000.0 ** -torch.linspace(0, 1, D // H // 2, dtype=torch.float64)
    q, k, v = turned(heads(q), angles), turned(heads(k), angles), heads(v)
    n = torch.arange(13, dtype=torch.float64)
    apart = n[:, None] - n
    seen = {"bidirectional": apart == apart, "forward": apart >= 0, "backward": apart <= 0}[direction]
    Y = torch.empty_like(v)
    for h, remembered in enumerate((3.0, 40.0)):
        gamma = 1 - 1 / remembered
        c = math.sqrt((1 - gamma) / (1 + gamma) / (D // H))
        Y[:, h] = (q[:, h] @ k[:, h].T * c * gamma ** apart.abs() * seen) @ v[:, h]
    expected = linear(silu(g) * rms(Y).flatten(1), layer.out.weight)
    torch.testing.assert_close(layer(x[None])[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bc_norm", [True, False])
@pytest.mark.parametrize("direction", ["bidirectional", "add", "forward", "backward"])
def test_mamba_is_its_recurrence(direction: str, bc_norm: bool) -> None:
    options = {"shift": False} if direction == "add" else {"direction": direction}
    layer = moved(lambda **k: layers.Mamba(D, d_state=3, bc_norm=bc_norm, **options, **k))
    x, T = tokens(1, 9)[0], 9
    u, z = linear(x, layer.in_proj.weight).chunk(2, -1)
    W = layer.conv_weight.shape[1]
    offsets = {"forward": range(-W + 1, 1), "backward": range(W - 1, -1, -1)}.get(direction, range(-2, 3))
    conv = layer.conv_bias.expand(T, -1).clone()
    for t in range(T):
        for j, o in enumerate(offsets):
            if 0 <= t + o < T:
                conv[t] = conv[t] + layer.conv_weight[:, j] * u[t + o]
    u = silu(conv)
    R, N = layer.dt_rank, 3
    total = layer.D * u
    ways = {"forward": [False], "backward": [True]}.get(direction, [False, True])
    for i, reverse in enumerate(ways):
        dt, b, c = linear(u, layer.x_proj.weight).view(T, len(ways), -1)[:, i].split([R, N, N], -1)
        b, c = (rms(b), rms(c)) if bc_norm else (b, c)
        delta = softplus(linear(dt, layer.dt_weight[i]) + layer.dt_bias[i])
        state, order = torch.zeros(2 * D, N, dtype=torch.float64), range(T)[:: -1 if reverse else 1]
        s = torch.zeros(T, 2 * D, dtype=torch.float64)
        for t in order:
            state = torch.exp(-delta[t, :, None] * layer.A_log[i].exp()) * state + (delta[t] * u[t])[:, None] * b[t]
            s[t] = state @ c[t]
        if direction == "bidirectional":
            s = s.roll(-1 if reverse else 1, 0)
            s[-1 if reverse else 0] = 0
        total = total + s
    torch.testing.assert_close(layer(x[None])[0], linear(total * silu(z), layer.out_proj.weight), rtol=1e-9, atol=1e-9)


def attention_parts(layer, x):
    q, k, v = (heads(t) for t in linear(x, layer.qkv.weight).chunk(3, -1))
    if layer.q_norm is not None:
        q, k = rms(q, layer.q_norm.weight), rms(k, layer.k_norm.weight)
    return q, k, v


def theta() -> torch.Tensor:
    K = D // H
    return 10000.0 ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)


def test_sigmoid_attention_is_its_equation() -> None:
    layer = moved(MIXING["sigmoid"])
    x = tokens(1, 11)[0]
    q, k, v = attention_parts(layer, x)
    q, k = turned(q, theta()), turned(k, theta())
    weights = torch.sigmoid(torch.einsum("mhk,nhk->hmn", q, k) / math.sqrt(D // H) - math.log(11))
    expected = linear(torch.einsum("hmn,nhk->mhk", weights, v).flatten(1), layer.out.weight)
    torch.testing.assert_close(layer(x[None])[0], expected, rtol=1e-9, atol=1e-9)


def test_hope_attention_is_its_equation() -> None:
    layer = moved(MIXING["hope-all"])
    x, T, K = tokens(1, 10)[0], 10, D // H
    q, k, v = attention_parts(layer, x)
    n = torch.arange(T, dtype=torch.float64)
    d = (n[:, None] - n)[..., None] * theta()  # [T,T,K/2]
    (q1, q2), (k1, k2) = (t[:, 1].unflatten(-1, (-1, 2)).unbind(-1) for t in (q, k))
    same = q1[:, None] * k1 + q2[:, None] * k2
    crossed = q1[:, None] * k2 + q2[:, None] * k1
    decay = torch.exp(-d.abs() - (n[:, None] - n).abs()[..., None] * layer.damping.abs())
    hyperbolic = (decay * (same * d.cosh() + crossed * d.sinh())).sum(-1) / math.sqrt(K)
    rotated = turned(q, theta())[:, 0] @ turned(k, theta())[:, 0].T / math.sqrt(K)
    rows = []
    for h, logits in enumerate((rotated, hyperbolic)):
        logits = torch.cat([q[:, h] @ layer.prefix_k[:, h].T / math.sqrt(K), logits], 1)
        rows.append(logits.softmax(1) @ torch.cat([layer.prefix_v[:, h], v[:, h]]))
    expected = linear(torch.cat(rows, 1), layer.out.weight)
    torch.testing.assert_close(layer(x[None])[0], expected, rtol=1e-9, atol=1e-9)


def test_moe_is_a_loop_over_experts() -> None:
    layer = moved(lambda **k: layers.MoE(D, 16, 4, 2, bias=True, **k))
    x = tokens(7)
    p = linear(x, layer.router.weight).softmax(-1)
    expected, counts = torch.zeros_like(x), torch.zeros(4, dtype=torch.long)
    for t in range(7):
        best = p[t].argsort(descending=True)[:2]
        for e in best.tolist():
            h = silu(layer.w_in[e] @ x[t] + layer.b_in[e])
            expected[t] += p[t, e] / p[t, best].sum() * (layer.w_out[e] @ h + layer.b_out[e])
            counts[e] += 1
    y, stats = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    assert stats.counts.tolist() == counts.tolist()
    torch.testing.assert_close(layer.balance_loss(stats), 4 * (counts / 14 * p.mean(0)).sum(), rtol=1e-6, atol=0)


def test_moe_selection_bias_moves_towards_the_mean_load() -> None:
    layer = layers.MoE(D, 16, 3, balance_bias=True)
    layer.update_select_bias(torch.tensor([9, 3, 0]), rate=0.5)  # the mean is 4
    assert layer.select_bias.tolist() == [-0.5, 0.5, 0.5]
    layers.MoE(D, 16, 3).update_select_bias(torch.tensor([9, 3, 0]))  # nothing to move


def test_norms_are_their_equations() -> None:
    x, r = tokens(5), tokens(5, seed=2)
    dyt, derf, norm = (moved(TOKENWISE[name]) for name in ("dyt", "derf", "rms_norm"))
    torch.testing.assert_close(dyt(x), dyt.weight * torch.tanh(dyt.alpha * x) + dyt.bias)
    torch.testing.assert_close(derf(x), derf.weight * torch.erf(derf.alpha * x + derf.shift) + derf.bias)
    torch.testing.assert_close(norm(x), rms(x, norm.weight))
    for layer in (dyt, derf):
        y, s = layer(x, r)
        assert torch.equal(s, x + r) and torch.equal(y, layer(x + r))


def test_initial_values() -> None:
    torch.manual_seed(0)
    assert layers.DyT(4).alpha.item() == layers.Derf(4).alpha.item() == 0.5
    assert layers.Derf(4).shift.item() == 0 and layers.DyT(4).weight.tolist() == [1] * 4
    layer = layers.Retention(256, 4, layers=8)
    assert layer.qkvg.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert layer.qkvg.weight.abs().max().item() <= 0.06
    assert layer.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert layers.Retention(256, 4).out.weight.std().item() == pytest.approx(0.02, rel=0.02)
    mamba = layers.Mamba(64)
    dt = softplus(mamba.dt_bias)
    assert 1e-3 <= dt.min() < 1.5e-3 and 0.07 < dt.max() <= 0.1
    assert dt.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.3)
    torch.testing.assert_close(mamba.A_log[1, 5].exp(), torch.arange(1.0, 17))


# ---- BitLinear


def test_bitlinear_is_a_drop_in_for_linear() -> None:
    plain, layer = torch.nn.Linear(D, 10), layers.BitLinear(D, 10)
    layer.load_state_dict(plain.state_dict())
    assert isinstance(layer, torch.nn.Linear) and set(layer.state_dict()) == set(plain.state_dict())
    x = tokens(6).float()
    gamma = plain.weight.abs().mean()
    codes = (plain.weight / (gamma + 1e-5)).round().clamp(-1, 1)
    step = x.abs().amax(-1, keepdim=True) / 127
    expected = linear((x / step).round() * step, codes * gamma, plain.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    median = layers.BitLinear(D, 10, scale="median")
    median.load_state_dict(plain.state_dict())
    assert not torch.allclose(median(x), layer(x))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_bitlinear_is_the_trained_layer(norm: bool, bias: bool, tmp_path) -> None:
    layer = moved(lambda **k: layers.BitLinear(D, 10, bias, norm=norm, **k), dtype=torch.float32)
    packed = layer.pack()
    x = tokens(2, 5).float()
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)
    assert packed.codes.shape == (1, -(-D // 16), 64) and not any(p.requires_grad for p in packed.parameters())
    other = layers.BitLinear(D, 10, bias, norm=norm).pack()
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(x), packed(x))
    half = packed.bfloat16()
    assert half.scale.dtype == torch.float32 and half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [
    {}, {"gated": True, "bias": True, "sub_norm": True, "balance_bias": True, "activation": "gelu"},
    {"top_k": 1, "bitnet_scale": "median"}, {"top_k": 2, "normalize_gates": False, "sub_norm": True},
], ids=["plain", "all", "one-median", "unnormalised"])  # fmt: skip
def test_packed_moe_is_the_trained_layer(options: dict) -> None:
    def make(**k):
        return layers.MoE(D, 40, 4, bitnet=True, **options, **k)

    layer = moved(make, dtype=torch.float32)
    if layer.select_bias is not None:
        layer.select_bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1]))
    packed, x = layer.pack(), tokens(2, 30).float()
    with torch.no_grad():
        (y, stats), (packed_y, packed_stats) = layer(x), packed(x)
    # float32 products of 24 and 40 terms of order 1; a rounding that falls the other way moves a whole 8-bit step
    torch.testing.assert_close(packed_y, y, rtol=1e-5, atol=1e-5 * y.abs().max().item())
    assert torch.equal(packed_stats.counts, stats.counts) and int(stats.counts.min()) > 0
    torch.testing.assert_close(packed_stats.mean_prob, stats.mean_prob)
    assert not any(p.requires_grad for p in packed.parameters()) and not packed_y.requires_grad
    shell = make(device="meta").pack()
    assert all(t.is_meta for t in shell.state_dict().values())
    shell.to_empty(device="cpu").load_state_dict(packed.state_dict())
    assert torch.equal(shell(x)[0], packed_y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x)[0], packed_y)
    assert shell(x[:, :0])[0].shape == (2, 0, D)


def test_packed_moe_gives_an_expert_its_own_tokens_alone(monkeypatch) -> None:
    layer = moved(lambda **k: layers.MoE(D, 16, 4, bitnet=True, **k), dtype=torch.float32)
    calls: list[tuple[int, torch.Tensor]] = []
    real = layers.grouped_ternary_linear

    def record(x, *rest):
        calls.append((len(x), rest[-2]))
        return real(x, *rest)

    monkeypatch.setattr(layers, "grouped_ternary_linear", record)
    _, stats = layer.pack()(tokens(1, 30).float())
    assert int(stats.counts.sum()) == 60 and [rows for rows, _ in calls] == [60, 60]
    assert all(torch.equal(ends, stats.counts.cumsum(0)) for _, ends in calls)


def test_packed_experts_keep_their_scales_in_float32() -> None:
    layer = moved(lambda **k: layers.MoE(D, 16, 4, bitnet=True, bias=True, **k), dtype=torch.float32).pack().bfloat16()
    for part in (layer.w_in, layer.w_out):
        assert part.scale.dtype == torch.float32 and part.codes.dtype == torch.uint8
        assert part.bias.dtype == torch.bfloat16 and part.codes.shape[0] == len(part.scale) == 4
    assert layer(tokens(1, 9).bfloat16())[0].dtype == torch.bfloat16


def test_a_float_moe_is_not_packed() -> None:
    with pytest.raises(ValueError, match="bitnet=True"):
        layers.MoE(D, 16, 4).pack()


def test_projections_can_be_ternary() -> None:
    torch.manual_seed(0)
    layer = layers.Retention(D, H, linear=layers.BitLinear)
    assert isinstance(layer.qkvg, layers.BitLinear) and isinstance(layer.out, layers.BitLinear)
    exact = layers.Retention(D, H)
    exact.load_state_dict(layer.state_dict())
    x = tokens(1, 6).float()
    assert not torch.allclose(exact(x), layer(x))


# ---- the trainer's components with the same weights

SMALL = dict(vocab_size=40, hidden_size=D, num_layers=1, num_heads=H, retention_heads=H, layer_pattern=("retnet",))
TWINS = {
    "retention": ("retnet", {}, {}),
    "mamba": ("mamba", {"mamba_d_state": 4}, {}),
    "mamba-causal": ("mamba", {"mamba_d_state": 4, "mamba_bidirectional": "none"}, {}),
    "sigmoid": ("sigmoid_attn", {}, {}),
    "hope-all": (
        "titan_attn",
        {"hope_learnable_damping": True, "titan_persistent_tokens": 3, "hope_rope_fraction": 0.5, "qk_norm": True},
        {"persistent.keys": "prefix_k", "persistent.values": "prefix_v"},
    ),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_mixers_weights_load(name: str) -> None:
    mixer_name, fields, renamed = TWINS[name]
    torch.manual_seed(0)
    mixer = MIXERS[mixer_name](UltraConfig(**SMALL, **fields))
    layer = MIXING[name]()
    layer.load_state_dict({renamed.get(key, key): value for key, value in mixer.state_dict().items()})
    x = tokens(2, 17).float()
    expected = mixer(x, Sequences.dense(17, x.device))
    # the tables of angles and decays differ by float32 rounding
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-8)


# ---- as modules


@pytest.mark.parametrize("name", MIXING)
def test_packed_is_each_sequence_alone(name: str) -> None:
    layer = moved(MIXING[name])
    x = tokens(1, 18)
    cu = torch.tensor([0, 5, 5, 6, 15, 18], dtype=torch.int32)
    alone = torch.cat([layer(x[:, a:b]) for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True) if a < b], 1)
    torch.testing.assert_close(layer(x, cu_seqlens=cu), alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_gradient_reaches_every_parameter(name: str) -> None:
    layer = moved(ALL[name], dtype=torch.float32)
    x = tokens(2, 9).float().requires_grad_()
    first(layer(x)).square().sum().backward()
    dead = [n for n, p in layer.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert not dead and bool(x.grad.isfinite().all())


@pytest.mark.parametrize("name", ALL)
def test_meta_device_then_reset_is_the_constructor(name: str) -> None:
    built = ALL[name]()
    layer = ALL[name](device="meta")
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    layer = layer.to_empty(device="cpu")
    for module in [*layer.modules()][::-1]:  # the layer itself last
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    tensors = dict(layer.state_dict()) | dict(layer.named_buffers())
    for key, value in (dict(built.state_dict()) | dict(built.named_buffers())).items():
        assert value.shape == tensors[key].shape and value.dtype == tensors[key].dtype, key
        want, got = value.float(), tensors[key].float()
        assert got.std(correction=0).item() == pytest.approx(want.std(correction=0).item(), rel=0.5, abs=1e-6), key
        assert got.mean().item() == pytest.approx(want.mean().item(), rel=0.2, abs=0.1), key


def assert_rounded(y: torch.Tensor, want: torch.Tensor) -> None:
    """Sixteen roundings to bfloat16 on the longest path, of 2^-9 each, add as squares; cancellation may double it."""
    assert float((y.float() - want).norm()) <= 2 * 16**0.5 * 2**-9 * float(want.norm())


@pytest.mark.parametrize("name", ALL)
def test_half_precision_layer(name: str) -> None:
    exact = moved(ALL[name], dtype=torch.float32)
    half = ALL[name](dtype=torch.bfloat16)
    half.load_state_dict(exact.state_dict())
    x = tokens(2, 9).float()
    y, want = first(half(x.bfloat16())), first(exact(x))
    assert y.dtype == torch.bfloat16
    if "moe" not in name:  # a token may go to another expert
        assert_rounded(y, want)
    cast = moved(ALL[name], dtype=torch.float32).bfloat16()
    for buffer, own in zip(cast.buffers(), exact.buffers(), strict=True):
        if own.dtype == torch.float32 and "moe" not in name:
            assert torch.equal(buffer, own), "tables keep float32"
    first(cast(x.bfloat16()))


@pytest.mark.parametrize("name", [n for n in ALL if "moe" not in n and n != "bitlinear"])
def test_autocast_is_close(name: str) -> None:
    layer = moved(ALL[name], dtype=torch.float32)
    x = tokens(2, 9).float()
    want = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert_rounded(y, want)
    y.float().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())


@pytest.mark.parametrize(
    "name", ["retention", "mamba", "mamba-causal", "sigmoid", "hope-all", "moe", "bitlinear", "dyt"]
)
def test_compiles_without_a_graph_break(name: str) -> None:
    layer = moved(ALL[name], dtype=torch.float32)
    x = tokens(2, 9).float()
    want = first(layer(x))
    wanted = torch.autograd.grad(want.square().sum(), list(layer.parameters()))
    got = first(torch.compile(layer, fullgraph=True, backend="aot_eager")(x))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(got.square().sum(), list(layer.parameters())), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_says_what_it_is(name: str) -> None:
    layer = ALL[name]()
    assert str(D) in layer.extra_repr() and layer.extra_repr() in repr(layer)
    assert type(layer).__name__ in layers.__all__


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers.Retention(D, 5), "num_heads=5 must divide embed_dim=24"),
        (lambda: layers.Retention(D, 8), "24|odd"),
        (lambda: layers.Retention(D, H, window=(0.5, 9)), "ascending lengths above 1"),
        (lambda: layers.Retention(D, H)(torch.zeros(4, D)), r"must be \[B, T, 24\]"),
        (lambda: layers.Retention(D, H, direction="sideways")(torch.zeros(1, 4, D)), "sideways"),
        (lambda: layers.Mamba(D, d_conv=4), "3, 5 or 7"),
        (lambda: layers.Mamba(D, d_conv=9, direction="forward"), "from 2 to 8"),
        (lambda: layers.Mamba(D, direction="both"), "both"),
        (lambda: layers.Mamba(D)(torch.zeros(1, 4, D + 1)), r"must be \[B, T, 24\]"),
        (lambda: layers.SigmoidAttention(D, H, normalize=True, logit_bias=0.0), "leave one of the two out"),
        (lambda: layers.HopeAttention(D, H, rotary_heads=3), r"0\.\.2"),
        (lambda: layers.HopeAttention(D, H, damping=-1.0), "at least 0"),
        (lambda: layers.HopeAttention(D, 8), "odd"),
        (lambda: layers.HopeAttention(D, H)(torch.zeros(2, 4, D), torch.zeros(2, dtype=torch.int32)), "batch size"),
        (lambda: layers.MoE(D, 8, 4, 5), "between 1 and num_experts, 4"),
        (lambda: layers.MoE(D, 8, 4)(torch.zeros(3, D + 1)), r"must be floats \[\.\.\., 24\]"),
        (lambda: layers.MoE(D, 8, 4, bitnet=True).pack()(torch.zeros(3, 1)), r"PackedMoE: x .* floats \[\.\.\., 24\]"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("packed", [False, True])
def test_a_selection_bias_is_not_rounded_with_its_layer(packed: bool) -> None:
    layer = layers.MoE(D, 8, 4, balance_bias=True, bitnet=True)
    layer.update_select_bias(torch.tensor([0, 1, 2, 99]), rate=0.12345)
    want = layer.select_bias.clone()
    layer = (layer.pack() if packed else layer).bfloat16()
    assert layer.select_bias.dtype == torch.float32 and torch.equal(layer.select_bias, want)
    assert layer.router.weight.dtype == torch.bfloat16
    assert layer.to("meta").select_bias.is_meta and not layer.to_empty(device="cpu").select_bias.is_meta


def test_experts_on_the_meta_device() -> None:
    layer = layers.MoE(D, 8, 4, device="meta")
    y, stats = layer(torch.zeros(2, 3, D, device="meta"))
    assert y.shape == (2, 3, D) and stats.counts.is_meta


def test_importing_the_ops_does_not_import_the_layers() -> None:
    code = "import sys, ultra_kernels; sys.exit('ultra_kernels.nn' in sys.modules or 'ultra' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    code = "import sys, ultra_kernels.nn; sys.exit('ultra' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
