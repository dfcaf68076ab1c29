"""Every field of `model` acts as it is defined: one entry a field, on a real encoder of width 16.

An entry builds encoders that differ in its field alone, from one seed, and asserts the difference that the field's
definition promises; where the definition is "changes the cost, not the result", it asserts both.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import yaml
from pydantic import ValidationError
from torch import Tensor, nn

import ultra.ffn.dense
import ultra.layers.attention
import ultra.mixers.retnet
import ultra.mixers.titan_attn
from ultra.config import RunConfig, UltraConfig
from ultra.ffn import FFNS
from ultra.layers.sequences import Sequences
from ultra.mixers import MIXERS
from ultra.model import Encoder, build_model
from ultra.norms import NORMS
from ultra_kernels.nn import BitLinear

from .conftest import SAMPLE
from .runs import run

D, T = 16, 12
SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": D, "num_layers": 1, "num_heads": 2, "retention_heads": 2, "ffn_hidden_size": 32,
    "use_moe": False, "dropout": 0.0, "ode_steps": 1,
}  # fmt: skip
IDS = torch.arange(5, 5 + T)[None]
CHECKS: dict[str, Callable[[], None]] = {}


def acts(check: Callable[[], None]) -> Callable[[], None]:
    """Enters a function into the table under the name of its field."""
    CHECKS[check.__name__] = check
    return check


# What the entries are made of


def encoder(**fields: Any) -> Encoder:
    """In evaluation mode, from seed 0, moved off the special values of the initialisation (zero biases, unit gains)."""
    torch.manual_seed(0)
    model = build_model(UltraConfig(**{**SMALL, **fields})).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if not name.endswith("damping"):
                noise = torch.randn(param.shape, generator=generator, dtype=param.dtype)
                param.add_(0.1 * noise * (param.abs().mean() + 0.1))
    return model


def fresh(**fields: Any) -> Encoder:
    """As training makes it."""
    torch.manual_seed(0)
    return build_model(UltraConfig(**{**SMALL, **fields}))


def hidden(ids: Tensor = IDS, **fields: Any) -> Tensor:
    return encoder(**fields)(ids).last_hidden_state.detach()


def shape(name: str, **fields: Any) -> tuple[int, ...]:
    return tuple(fresh(**fields).get_parameter(name).shape)


def has(name: str, **fields: Any) -> bool:
    return name in dict(fresh(**fields).named_parameters())


def differs(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Equal weights, another function."""
    a, b = encoder(**one), encoder(**other)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    return not torch.allclose(a(IDS).last_hidden_state, b(IDS).last_hidden_state, rtol=1e-6, atol=1e-9)


def sees(reader: int, changed: int, **fields: Any) -> bool:
    """Whether the output at one place depends on the token at another."""
    model, ids = encoder(**fields), IDS.clone()
    ids[0, changed] = 30
    before, after = (model(x).last_hidden_state[0, reader] for x in (IDS, ids))
    return bool((before - after).abs().max() > 1e-12)


@contextlib.contextmanager
def spy(owner: Any, name: str) -> Iterator[list[SimpleNamespace]]:
    """The arguments of every call of owner.name, which does its work as before."""
    calls: list[SimpleNamespace] = []
    original = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(SimpleNamespace(args=args, kwargs=kwargs))
        return original(*args, **kwargs)

    with mock.patch.object(owner, name, noted):
        yield calls


@contextlib.contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Bytes that the forward passes in the block keep for their backward pass."""
    total = [0]

    def keep(tensor: Tensor) -> Tensor:
        total[0] += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total


def trained(**fields: Any) -> SimpleNamespace:
    """One forward and backward pass: loss, gradients, bytes kept for the backward pass, calls of layers and of f."""
    model, f_calls, layer_calls = encoder(**fields), [0], [0]
    for module in model.modules():
        if isinstance(module, MIXERS["ode"]):
            module.attention.out.register_forward_pre_hook(lambda *_: f_calls.__setitem__(0, f_calls[0] + 1))
    for layer in model.layers:
        layer.ffn.register_forward_pre_hook(lambda *_: layer_calls.__setitem__(0, layer_calls[0] + 1))

    with saved_bytes() as kept:
        out = model(IDS, labels=IDS)
    forward_f = f_calls[0]
    out.loss.backward()
    grads = [param.grad for param in model.parameters()]
    return SimpleNamespace(
        loss=out.loss.detach(), grads=grads, kept=kept[0], f_forward=forward_f, f=f_calls[0], layers=layer_calls[0]
    )


def assert_same_gradients(a: SimpleNamespace, b: SimpleNamespace) -> None:
    torch.testing.assert_close(a.loss, b.loss)
    for x, y in zip(a.grads, b.grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def mixer(name: str, **fields: Any) -> nn.Module:
    return encoder(layer_pattern=(name,), **fields).layers[0].mixer


def dense(length: int) -> Sequences:
    return Sequences.dense(length, torch.device("cpu"))


# Sizes and stack


@acts
def vocab_size() -> None:
    assert shape("embedding.table.weight", vocab_size=60) == (60, D) != shape("embedding.table.weight")


@acts
def hidden_size() -> None:
    assert (hidden().shape[-1], hidden(hidden_size=24).shape[-1]) == (D, 24)


@acts
def num_layers() -> None:
    assert (trained(num_layers=1).layers, trained(num_layers=3).layers) == (1, 3)


@acts
def num_loops() -> None:
    one, two = fresh(num_layers=2), fresh(num_layers=2, num_loops=3, loop_embedding=False, loop_injection="none")
    assert [p.shape for p in one.parameters()] == [p.shape for p in two.parameters()]  # the same layers
    assert trained(num_layers=2, num_loops=3).layers == 6


@acts
def num_heads() -> None:
    for heads in (2, 4):
        with spy(ultra.layers.attention, "scaled_dot_product_attention") as calls:
            hidden(num_heads=heads)
        assert calls[0].args[0].shape == (1, heads, T, D // heads)


@acts
def dropout() -> None:
    for rate in (0.0, 0.5):
        model, seen = fresh(dropout=rate).train(), []
        model.layers[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model(torch.randint(5, 40, (1, 400)))
        share = float((seen[0] == 0).float().mean())
        assert abs(share - rate) < 4 * (rate * (1 - rate) / seen[0].numel()) ** 0.5 + 1e-9  # 4 sigma
        assert not bool((model.eval()(IDS).last_hidden_state == 0).any())


@acts
def layer_pattern() -> None:
    model = fresh(num_layers=5, layer_pattern=("retnet", "mamba"))
    assert [type(layer.mixer) for layer in model.layers] == [
        MIXERS[n] for n in "retnet mamba retnet mamba retnet".split()
    ]


@acts
def norm_type() -> None:
    for name, norm in NORMS.items():
        assert {type(m) for n, m in fresh(norm_type=name).named_modules() if n.endswith("norm")} == {norm}


@acts
def norm_eps() -> None:
    x = 1e-3 * torch.randn(4, D, dtype=torch.float64)  # so small that eps counts
    for eps in (1e-5, 1e-2):
        norm = encoder(norm_eps=eps).final_norm
        torch.testing.assert_close(norm(x), F.layer_norm(x, (D,), norm.weight, norm.bias, eps))


@acts
def norm_alpha_init() -> None:
    for name in ("derf", "dynamic_tanh"):
        alphas = {
            alpha: fresh(norm_type=name, norm_alpha_init=alpha).final_norm.alpha.item() for alpha in ("auto", 0.25)
        }
        assert alphas == {"auto": 1.0, 0.25: 0.25}


@acts
def position_encoding() -> None:
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    for encoding, positions_count in (("none", False), ("rope", True)):
        moved = hidden(IDS[:, order], position_encoding=encoding)
        assert torch.allclose(hidden(position_encoding=encoding)[:, order], moved) != positions_count
    assert differs({"layer_pattern": ("titan_attn",)}, {"layer_pattern": ("titan_attn",), "position_encoding": "rope"})


@acts
def rope_theta() -> None:
    assert differs({}, {"rope_theta": 100.0})
    assert not differs({"position_encoding": "none"}, {"position_encoding": "none", "rope_theta": 100.0})


@acts
def qk_norm() -> None:
    norm = "layers.0.mixer.q_norm.weight"
    assert [has(norm), has(norm, qk_norm=True)] == [False, True]
    sigmoid = ("sigmoid_attn",)
    assert [has(norm, layer_pattern=sigmoid), has(norm, layer_pattern=sigmoid, qk_norm=False)] == [True, False]


@acts
def init_std() -> None:
    for std in (0.02, 0.1):
        table = fresh(init_std=std, vocab_size=400).embedding.table.weight.detach()
        assert float(table.std()) == pytest.approx(std, rel=0.05)  # 6400 draws: 1 %
    auto = fresh(norm_type="derf", vocab_size=400).embedding.table.weight.detach()
    assert float(auto.std()) == pytest.approx(0.02 * (768 / D) ** 0.5, rel=0.05)


# BitNet


def levels(**fields: Any) -> Tensor:
    """Magnitudes that the entries of an FFN's first matrix take in effect, largest first."""
    up = fresh(**fields).layers[0].ffn.up
    return up(torch.eye(D)).detach().abs().mul(1e5).round().div(1e5).unique().flip(0)


@acts
def use_bitnet() -> None:
    assert len(levels()) > 100
    assert len(levels(use_bitnet=True)) == 2 and levels(use_bitnet=True)[1] == 0  # {-s, 0, s}


@acts
def bitnet_scale() -> None:
    weight = fresh(use_bitnet=True).layers[0].ffn.up.weight.detach().abs()
    for scale, value in (("mean", weight.mean()), ("median", weight.median())):
        torch.testing.assert_close(levels(use_bitnet=True, bitnet_scale=scale)[0], value, rtol=0, atol=2e-5)


@acts
def bitnet_head() -> None:
    for on in (False, True):
        assert isinstance(fresh(use_bitnet=True, bitnet_head=on).head.dense, BitLinear) == on


# Embedding


@acts
def use_factorized_embedding() -> None:
    assert [has("embedding.projection.weight", use_factorized_embedding=on) for on in (False, True)] == [False, True]


@acts
def factorized_embedding_dim() -> None:
    for width in (4, 8):
        sizes = {"use_factorized_embedding": True, "factorized_embedding_dim": width}
        assert shape("embedding.table.weight", **sizes) == (40, width)
        assert shape("embedding.projection.weight", **sizes) == (D, width)


CONV: dict[str, Any] = {"use_embedding_conv": True, "embedding_conv_kernel": 5, "position_encoding": "none"}


def window(**fields: Any) -> list[int]:
    """Offsets of the tokens that the embedding at place 6 depends on."""
    embedding, found = encoder(**{**CONV, **fields}).embedding, []
    for place in range(T):
        ids = IDS.clone()
        ids[0, place] = 30
        if not torch.equal(embedding(IDS, dense(T))[0, 6], embedding(ids, dense(T))[0, 6]):
            found.append(place - 6)
    return found


@acts
def use_embedding_conv() -> None:
    assert window() == [-2, -1, 0, 1, 2]
    assert window(use_embedding_conv=False) == [0]


@acts
def embedding_conv_kernel() -> None:
    assert window(embedding_conv_kernel=3) == [-1, 0, 1]


@acts
def embedding_conv_causal() -> None:
    assert window(embedding_conv_causal=True) == [-4, -3, -2, -1, 0]


@acts
def embedding_conv_residual() -> None:
    x = torch.randn(1, T, D, dtype=torch.float64)
    outputs = [encoder(**CONV, embedding_conv_residual=on).embedding.conv(x, dense(T)) for on in (False, True)]
    torch.testing.assert_close(outputs[1], x + outputs[0])


@acts
def embedding_conv_depthwise() -> None:
    x = torch.zeros(1, T, D, dtype=torch.float64)
    x[0, 6, 3] = 1.0  # one channel
    touched = [
        int(encoder(**CONV, embedding_conv_depthwise=on).embedding.conv(x, dense(T)).any(1).sum())
        for on in (True, False)
    ]
    assert touched == [1, D]


@acts
def embedding_scale() -> None:
    for on in (False, True):
        rms = fresh(embedding_scale=on).embedding(IDS, dense(T)).square().mean().sqrt().item()
        assert rms == pytest.approx(0.02 * (D**0.5 if on else 1), rel=0.15)  # 192 draws


# FFN


@acts
def ffn_hidden_size() -> None:
    assert shape("layers.0.ffn.up.weight", ffn_hidden_size=48) == (48, D)


@acts
def ffn_activation() -> None:
    x = torch.randn(3, D, dtype=torch.float64)
    for name, activation in (("silu", F.silu), ("gelu", F.gelu)):
        ffn = encoder(ffn_activation=name).layers[0].ffn
        torch.testing.assert_close(ffn(x)[0], ffn.down(activation(ffn.up(x))))


@acts
def ffn_gated() -> None:
    x = torch.randn(3, D, dtype=torch.float64)
    ffn = encoder(ffn_gated=True, ffn_hidden_size=24).layers[0].ffn  # inner width 2/3 · 24
    assert (ffn.up.weight.shape, ffn.down.weight.shape) == ((32, D), (D, 16))
    gate, value = ffn.up(x).chunk(2, -1)
    torch.testing.assert_close(ffn(x)[0], ffn.down(F.silu(gate) * value))


MOE: dict[str, Any] = {"use_moe": True, "num_experts": 4, "top_k_experts": 2}


@acts
def use_moe() -> None:
    for on, ffn in ((False, "dense"), (True, "moe")):
        model = fresh(use_moe=on)
        assert isinstance(model.layers[0].ffn, FFNS[ffn])
        assert len(model(IDS).moe_stats) == on


@acts
def num_experts() -> None:
    for experts in (3, 5):
        assert fresh(**{**MOE, "num_experts": experts})(IDS).moe_stats[0].counts.shape == (experts,)


@acts
def top_k_experts() -> None:
    for k in (1, 3):
        assert fresh(**{**MOE, "top_k_experts": k})(IDS).moe_stats[0].counts.sum() == k * T


@acts
def moe_norm_topk() -> None:
    x = torch.randn(5, D, dtype=torch.float64)
    ratios = []
    for normalise in (True, False):
        ffn = encoder(**MOE, moe_norm_topk=normalise).layers[0].ffn
        with torch.no_grad():
            ffn.w_in.copy_(ffn.w_in[:1].expand_as(ffn.w_in)), ffn.w_out.copy_(ffn.w_out[:1].expand_as(ffn.w_out))
            alone = F.silu(x @ ffn.w_in[0].T) @ ffn.w_out[0].T  # all experts are this one
            ratios.append((ffn(x)[0] / alone).detach())
    torch.testing.assert_close(ratios[0], torch.ones_like(ratios[0]))  # the two gates sum to 1
    assert bool((ratios[1] < 0.999).all())


def aux(**fields: Any) -> float:
    return float(encoder(**MOE, **fields)(IDS, labels=IDS).aux_loss.detach())


@acts
def moe_aux_loss() -> None:
    none, one, two = (aux(moe_z_loss=0.0, moe_aux_loss=weight) for weight in (0.0, 0.1, 0.2))
    assert none == 0 and two == pytest.approx(2 * one) and one >= 0.1  # E Σ f P is 1 for equal loads


@acts
def moe_z_loss() -> None:
    none, one, two = (aux(moe_aux_loss=0.0, moe_z_loss=weight) for weight in (0.0, 0.1, 0.2))
    assert none == 0 < one and two == pytest.approx(2 * one)


def bias_step(**fields: Any) -> Tensor | None:
    model = encoder(**MOE, **fields)
    model.update_moe_bias(model.expert_loads(model(IDS).moe_stats))
    return model.layers[0].ffn.select_bias


@acts
def moe_balance() -> None:
    zero = {"moe_z_loss": 0.0}
    assert [aux(moe_balance=by, **zero) > 0 for by in ("aux", "bias", "both")] == [True, False, True]
    assert bias_step(moe_balance="aux") is None
    assert all(bool(bias_step(moe_balance=by).any()) for by in ("bias", "both"))


@acts
def moe_bias_rate() -> None:
    for rate in (0.01, 0.02):
        assert bias_step(moe_balance="bias", moe_bias_rate=rate).abs().max().item() == pytest.approx(rate)


# retnet

RET: dict[str, Any] = {"layer_pattern": ("retnet",)}


def retention_call(length: int = T, **fields: Any) -> SimpleNamespace:
    with spy(ultra.mixers.retnet, "retention") as calls, torch.no_grad():
        mixer("retnet", **fields)(torch.randn(1, length, D, dtype=torch.float64), dense(length))
    return calls[0]


@acts
def retention_heads() -> None:
    assert [retention_call(retention_heads=heads).args[0].shape[2] for heads in (2, 4)] == [2, 4]


@acts
def retention_bidirectional() -> None:
    assert sees(2, 9, **RET) and not sees(2, 9, **RET, retention_bidirectional=False)
    assert sees(9, 2, **RET, retention_bidirectional=False)


@acts
def retention_window() -> None:
    for first, last in ((4.0, 512.0), (8.0, 32.0)):
        decay = retention_call(retention_window=(first, last)).args[3].exp().double()
        torch.testing.assert_close(decay, torch.tensor([1 - 1 / first, 1 - 1 / last]).double(), rtol=1e-5, atol=0)
    assert differs(RET, {**RET, "retention_window": (8.0, 32.0)})


@acts
def retention_rotary() -> None:
    for on, rotations in ((True, 2), (False, 0)):
        with spy(ultra.mixers.retnet, "rotary") as calls:
            hidden(**RET, retention_rotary=on)
        assert len(calls) == rotations
    assert differs(RET, {**RET, "retention_rotary": False})


@acts
def retention_value_factor() -> None:
    assert [retention_call(retention_value_factor=n).args[2].shape[-1] for n in (1, 2)] == [D // 2, D]


@acts
def retention_chunk() -> None:
    """Cost: longer chunks keep more scores for the backward pass. The result stays. auto leaves it to the op."""
    assert retention_call().kwargs["chunk_size"] is None and retention_call(retention_chunk=8).kwargs["chunk_size"] == 8
    results, kept = [], []
    x = torch.randn(1, 80, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for chunk in (8, 40):
        with saved_bytes() as saved:
            results.append(mixer("retnet", retention_chunk=chunk)(x, dense(80)))
        kept.append(saved[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)
    assert kept[1] > 1.1 * kept[0]


# mamba

MAMBA: dict[str, Any] = {"layer_pattern": ("mamba",)}


@acts
def mamba_d_state() -> None:
    assert shape("layers.0.mixer.A_log", **MAMBA, mamba_d_state=4) == (2, 2 * D, 4)


@acts
def mamba_d_conv() -> None:
    assert shape("layers.0.mixer.conv_weight", **MAMBA, mamba_d_conv=3) == (2 * D, 3)
    causal = {**MAMBA, "mamba_bidirectional": "none"}
    assert [shape("layers.0.mixer.conv_weight", **f)[1] for f in (MAMBA, causal)] == [5, 4]  # auto


@acts
def mamba_expand() -> None:
    assert shape("layers.0.mixer.out_proj.weight", **MAMBA, mamba_expand=3) == (D, 3 * D)


@acts
def mamba_dt_rank() -> None:
    assert [shape("layers.0.mixer.dt_weight", **MAMBA, mamba_dt_rank=r)[2] for r in ("auto", 3)] == [1, 3]


@acts
def mamba_bc_norm() -> None:
    assert differs({**MAMBA, "mamba_bc_norm": False}, {**MAMBA, "mamba_bc_norm": True})


@acts
def mamba_bidirectional() -> None:
    assert sees(2, 9, **MAMBA) and not sees(2, 9, **MAMBA, mamba_bidirectional="none")
    assert differs({**MAMBA, "mamba_bidirectional": "add"}, {**MAMBA, "mamba_bidirectional": "quasi"})


# ode

ODE: dict[str, Any] = {"layer_pattern": ("ode",)}


@acts
def ode_solver() -> None:
    assert [trained(**ODE, ode_solver=solver).f_forward for solver in ("euler", "rk4")] == [1, 4]


@acts
def ode_steps() -> None:
    steps = [trained(**{**ODE, "ode_steps": steps, "ode_solver": "euler"}).f_forward for steps in (1, 3)]
    assert steps == [1, 3]


@acts
def ode_checkpoint() -> None:
    """Cost: f is evaluated again in the backward pass, and less is kept for it. The gradients stay."""
    kept, again = (trained(**{**ODE, "ode_steps": 3}, ode_checkpoint=mode) for mode in ("none", "step"))
    assert_same_gradients(kept, again)
    assert (kept.f, again.f) == (12, 24)
    assert again.kept < kept.kept / 2


@acts
def ode_time() -> None:
    time = "layers.0.mixer.time"
    assert [has(time, **ODE, ode_time=mode) for mode in ("none", "additive")] == [False, True]
    z = torch.randn(1, T, D, dtype=torch.float64)
    timed, plain = (mixer("ode", ode_time=mode) for mode in ("additive", "none"))
    assert not torch.equal(timed.f(z, 0.0, dense(T)), timed.f(z, 1.0, dense(T)))
    assert torch.equal(plain.f(z, 0.0, dense(T)), plain.f(z, 1.0, dense(T)))


# titan_attn

TITAN: dict[str, Any] = {"layer_pattern": ("titan_attn",), "hope_rope_fraction": 0.0}


@acts
def use_hope() -> None:
    for on in (True, False):
        with spy(ultra.mixers.titan_attn, "hope_attention") as hope, spy(ultra.layers.attention, "rotary") as rotary:
            hidden(**TITAN, use_hope=on)
        assert (len(hope), len(rotary)) == ((1, 0) if on else (0, 2))


@acts
def hope_base() -> None:
    assert differs(TITAN, {**TITAN, "hope_base": 10.0})
    assert not differs({**TITAN, "use_hope": False}, {**TITAN, "use_hope": False, "hope_base": 10.0})


@acts
def hope_damping() -> None:
    """A key far away is damped to logit 0: which of the far tokens stands where then no longer matters."""
    swapped = IDS.clone()
    swapped[0, [7, 11]] = IDS[0, [11, 7]]
    for damping, far_order_counts in ((0.0, True), (20.0, False)):
        a, b = (hidden(ids, **TITAN, hope_damping=damping)[0, 0] for ids in (IDS, swapped))
        assert torch.allclose(a, b, rtol=0, atol=1e-12) != far_order_counts


@acts
def hope_mode() -> None:
    assert differs(TITAN, {**TITAN, "hope_mode": "global"})


@acts
def hope_rope_fraction() -> None:
    for fraction, heads in ((0.0, 0), (0.5, 1), (1.0, 2), ("auto", 1)):
        with spy(ultra.mixers.titan_attn, "hope_attention") as calls:
            hidden(**{**TITAN, "hope_rope_fraction": fraction})
        assert calls[0].kwargs["rotary_heads"] == heads
    assert differs(TITAN, {**TITAN, "hope_rope_fraction": 1.0})


@acts
def hope_learnable_damping() -> None:
    damping = "layers.0.mixer.damping"
    assert [has(damping, **TITAN, hope_learnable_damping=on) for on in (False, True)] == [False, True]
    model = encoder(**TITAN, hope_learnable_damping=True)
    model(IDS, labels=IDS).loss.backward()
    assert float(model.get_parameter(damping).grad.abs()) > 0


@acts
def titan_persistent_tokens() -> None:
    with spy(ultra.mixers.titan_attn, "hope_attention") as calls:
        for tokens in (0, 3):
            hidden(**TITAN, titan_persistent_tokens=tokens)
    assert calls[0].kwargs["prefix_k"] is None and calls[1].kwargs["prefix_k"].shape == (3, 2, D // 2)


@acts
def titan_memory() -> None:
    model, x = encoder(**TITAN, titan_memory="linear"), torch.randn(1, T, D, dtype=torch.float64)
    module = model.layers[0].mixer
    with_memory, memory = module(x, dense(T)), module.memory(x, dense(T))
    module.memory = None
    torch.testing.assert_close(with_memory, module(x, dense(T)) + memory)
    assert memory.abs().max() > 1e-6 and mixer("titan_attn", titan_memory="none").memory is None


# sigmoid_attn


def attended(**fields: Any) -> Tensor:
    """Sigmoid attention over values of 1: the sums of its rows."""
    q, k = torch.randn(2, 1, T, 2, D // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return mixer("sigmoid_attn", **fields).attend(q, k, torch.ones_like(q), dense(T))


@acts
def sigmoid_bias() -> None:
    assert float(attended(sigmoid_bias=-30.0).max()) < 1e-8
    assert 0.5 < float(attended().mean()) < 2  # auto: -ln n
    assert float(attended(sigmoid_bias=30.0).min()) == pytest.approx(T)


@acts
def sigmoid_normalize() -> None:
    assert float((attended(sigmoid_normalize=True) - 1).abs().max()) < 1e-4
    assert float((attended() - 1).abs().max()) > 0.05


# Head, loops, the rest


@acts
def tie_embeddings() -> None:
    model = fresh()
    assert model.head.vocabulary is model.embedding.table.weight
    assert has("head.decoder", tie_embeddings=False) and not has("head.decoder")


@acts
def head_bias() -> None:
    assert [has("head.bias", head_bias=on) for on in (False, True)] == [False, True]


@acts
def mlm_head() -> None:
    model = encoder(mlm_head="none", head_bias=False)
    out = model(IDS)
    torch.testing.assert_close(out.logits, out.last_hidden_state @ model.embedding.table.weight.T)
    assert has("head.dense.weight") and not has("head.dense.weight", mlm_head="none")


@acts
def loop_embedding() -> None:
    loops = {"num_loops": 3, "loop_injection": "none"}
    assert shape("loops.token", **loops) == (2, D) and not has("loops.token", **loops, loop_embedding=False)
    x, model = torch.zeros(1, T, D, dtype=torch.float64), encoder(**loops)
    torch.testing.assert_close(model.loops(x, x, 2)[0, 0], model.loops.token[1])


@acts
def loop_injection() -> None:
    loops = {"num_loops": 3, "loop_embedding": False}
    assert shape("loops.gate", **loops) == (2, D) and not has("loops.gate", **loops, loop_injection="none")
    x, model = torch.ones(1, T, D, dtype=torch.float64), encoder(**loops)
    torch.testing.assert_close(model.loops(0 * x, x, 2)[0, 0], model.loops.gate[1])


@acts
def layerscale_init() -> None:
    x = torch.randn(1, T, D)
    moved = []
    for scale in (1e-2, 1e-4):
        model = fresh(layerscale_init=scale)
        moved.append(float((model.layers[0](x, dense(T))[0] - x).norm()))
    assert moved[0] / moved[1] == pytest.approx(100, rel=0.05)  # the FFN reads x plus a little
    assert not has("layers.0.mixer_scale.gain")


@acts
def bitnet_two_stage() -> None:
    training = {"scheduler_total_steps": 4, "scheduler_type": "constant"}
    for on, factors in ((False, [1, 1, 1, 1]), (True, [1, 1, 0.25, 0.25])):
        one = run(model={"use_bitnet": True, "bitnet_two_stage": on}, **training)
        assert one.column("lr_factor") == factors
        assert bool(one.optimizer.parts[0].param_groups[0]["weight_decay"]) != on  # 0 at the end
    with pytest.raises(ValidationError, match="set use_bitnet: true"):
        UltraConfig(bitnet_two_stage=True)


@acts
def gradient_checkpointing() -> None:
    """Cost: every layer is computed again in the backward pass, and less is kept for it. The gradients stay."""
    kept, again = (trained(num_layers=3, gradient_checkpointing=on) for on in (False, True))
    assert_same_gradients(kept, again)
    assert (kept.layers, again.layers) == (3, 6)
    assert again.kept < kept.kept / 2


@acts
def model_class() -> None:
    for name, factorised in (("frankenstein", False), ("mini", True)):
        torch.manual_seed(0)
        model = build_model(RunConfig(model_class=name, model=UltraConfig(**SMALL)))
        assert (model.embedding.projection is not None) == factorised


# The table itself


def test_the_table_has_every_field_of_model() -> None:
    assert CHECKS.keys() == {*UltraConfig.model_fields, "model_class"}
    documented = yaml.safe_load(re.sub(r"(\w+)(\|\w+)+", r"\1", SAMPLE))
    assert {*documented["model"], "model_class"} <= CHECKS.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_field_acts(name: str) -> None:
    CHECKS[name]()
