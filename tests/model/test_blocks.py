"""What each block's paper says, one property a test."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

from ultra.config import load_config
from ultra.layers.linear import BitLinear
from ultra.layers.linear_memory import linear_memory
from ultra.layers.module import GROUPS
from ultra.layers.sequences import Sequences
from ultra.mixers import MIXERS
from ultra.model import build_model

_spec = importlib.util.spec_from_file_location("invariants", Path(__file__).with_name("test_invariants.py"))
invariants = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(invariants)
small, model_of = invariants.small, invariants.model_of
IDS = torch.arange(5, 14)[None]


def mixer_of(name: str, seed: int = 0, **changes):
    torch.manual_seed(seed)
    return MIXERS[name](small(layer_pattern=(name,), **changes)).double()


def dense(T: int) -> Sequences:
    return Sequences.dense(T, torch.device("cpu"))


# ---- ode ------------------------------------------------------------------------------------------------------------
def test_one_euler_step_is_a_plain_attention_block() -> None:
    ode = mixer_of("ode", ode_solver="euler", ode_steps=1)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    assert torch.equal(ode(x, dense(7)), ode.attention(ode.norm(x), dense(7)))


def test_rk4_has_order_four() -> None:
    def solve(steps: int) -> torch.Tensor:
        ode = mixer_of("ode", ode_steps=steps, ode_checkpoint="none", init_std=0.02)
        with torch.no_grad():
            ode.attention.out.weight.mul_(60)  # a curved field, so that the error is above rounding
        return ode(torch.randn(1, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), dense(5))

    exact = solve(64)
    errors = [float((solve(n) - exact).detach().norm()) for n in (2, 4, 8)]
    assert all(10 < a / b < 24 for a, b in itertools.pairwise(errors)), errors  # 2^4 = 16


@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_checkpointing_the_solver_keeps_the_gradients(solver: str) -> None:
    grads = []
    for mode in ("none", "step"):
        ode = mixer_of("ode", ode_solver=solver, ode_steps=3, ode_checkpoint=mode)
        x = torch.randn(1, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        ode(x, dense(5)).square().sum().backward()
        grads.append([x.grad] + [p.grad for p in ode.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_zero_field_is_the_identity() -> None:
    model = model_of(layer_pattern=("ode",))
    block = model.layers[0]
    with torch.no_grad():
        block.mixer.attention.out.weight.zero_()
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    y, _ = block.ffn(block.ffn_norm(x))
    torch.testing.assert_close(block(x, dense(5))[0], x + y)


def test_time_conditioning_starts_at_nothing_and_acts() -> None:
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    plain, timed = mixer_of("ode"), mixer_of("ode", ode_time="additive")
    assert torch.equal(plain(x, dense(5)), timed(x, dense(5)))
    with torch.no_grad():
        timed.time.copy_(torch.linspace(-1, 1, 24))
    assert not torch.allclose(plain(x, dense(5)), timed(x, dense(5)))


# ---- attention ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mixer", ["standard_attn", "sigmoid_attn", "titan_attn", "ode"])
def test_permutation_equivariant_exactly_without_positions(mixer: str) -> None:
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    for encoding, equivariant in (("none", True), ("auto", False)):
        m = mixer_of(mixer, position_encoding=encoding)
        same = torch.allclose(m(x, dense(9))[:, order], m(x[:, order], dense(9)), atol=1e-10)
        assert same == equivariant


@pytest.mark.parametrize("mixer", ["standard_attn", "sigmoid_attn", "titan_attn", "ode", "retnet"])
def test_only_position_differences_count(mixer: str) -> None:
    m = mixer_of(mixer)
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    shifted = Sequences(None, 9, torch.arange(9) + 1000)
    torch.testing.assert_close(m(x, dense(9)), m(x, shifted), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("n", [4, 64, 500])
def test_sigmoid_rows_sum_to_about_one_at_initialisation(n: int) -> None:
    torch.manual_seed(0)
    m = MIXERS["sigmoid_attn"](small(hidden_size=64, layer_pattern=("sigmoid_attn",)))
    ones = torch.ones(1, n, 2, 32)
    q, k = (torch.randn(1, n, 2, 32) for _ in range(2))
    q, k = m.q_norm(q), m.k_norm(k)
    rows = m.attend(q, k, ones, dense(n)).detach().mean()
    assert 0.7 < float(rows) < 2.0  # E[e^l] of unit-variance logits is 1.65; without the bias it would be n/2


def test_hope_share_of_rotary_heads() -> None:
    assert mixer_of("titan_attn").rotary_heads == 1  # titan_attn alone: half of 2 heads
    torch.manual_seed(0)
    mixed = MIXERS["titan_attn"](small(layer_pattern=("titan_attn", "retnet")))
    assert mixed.rotary_heads == 0


def test_learned_damping_gets_a_gradient() -> None:
    m = mixer_of("titan_attn", hope_learnable_damping=True, hope_rope_fraction=0.0)
    m(torch.randn(1, 9, 24, dtype=torch.float64), dense(9)).square().sum().backward()
    assert float(m.damping.grad.abs()) > 0


# ---- retention, mamba, memory ---------------------------------------------------------------------------------------
def test_retention_window_sets_the_decays() -> None:
    m = mixer_of("retnet", retention_heads=3, retention_window=(4.0, 64.0))
    torch.testing.assert_close(m.log_decay.exp().float(), torch.tensor([1 - 1 / 4, 1 - 1 / 16, 1 - 1 / 64]))


def test_retention_chunk_changes_nothing_but_the_path() -> None:
    x = torch.randn(1, 700, 24, dtype=torch.float64)
    a, b = mixer_of("retnet", retention_chunk=16), mixer_of("retnet", retention_chunk=128)
    torch.testing.assert_close(a(x, dense(700)), b(x, dense(700)), rtol=1e-9, atol=1e-11)


def test_mamba_swapping_directions_mirrors_the_output() -> None:
    m, mirrored = mixer_of("mamba"), mixer_of("mamba")
    with torch.no_grad():
        for name in ("dt_weight", "dt_bias", "A_log"):
            getattr(mirrored, name).copy_(getattr(m, name).flip(0))
        w = m.x_proj.weight
        mirrored.x_proj.weight.copy_(w.view(2, -1, w.shape[1]).flip(0).reshape(w.shape))
        mirrored.conv_weight.copy_(m.conv_weight.flip(1))
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    torch.testing.assert_close(m(x, dense(9)).flip(1), mirrored(x.flip(1), dense(9)))


def test_mamba_initial_time_steps_span_the_papers_range() -> None:
    dt = torch.nn.functional.softplus(mixer_of("mamba", mamba_expand=8).dt_bias.detach())
    assert 1e-3 <= float(dt.min()) < 3e-3 and 3e-2 < float(dt.max()) <= 1.001e-1


@pytest.mark.parametrize(("chunk", "T"), [(1, 11), (4, 11), (16, 11), (5, 10)])
def test_linear_memory_is_the_literal_recurrence(chunk: int, T: int) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, T, 3, dtype=torch.float64, generator=g) for _ in range(3))
    eta, theta, alpha = (torch.rand(1, 2, T, dtype=torch.float64, generator=g) for _ in range(3))
    M = S = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    expected = []
    for t in range(T):
        if t % chunk == 0:
            start = M
        error = start @ k[:, :, t, :, None] - v[:, :, t, :, None]
        S = eta[:, :, t, None, None] * S - 2 * theta[:, :, t, None, None] * error @ k[:, :, t, None, :]
        M = (1 - alpha[:, :, t, None, None]) * M + S
        expected.append((M @ q[:, :, t, :, None]).squeeze(-1))
    got = linear_memory(q, k, v, eta, theta, alpha, chunk)
    torch.testing.assert_close(got, torch.stack(expected, 2))


# ---- embedding, head, loops -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kernel", range(1, 34))
@pytest.mark.parametrize("causal", [False, True])
def test_embedding_conv_keeps_the_length_and_its_window(kernel: int, causal: bool) -> None:
    m = model_of(use_embedding_conv=True, embedding_conv_kernel=kernel, embedding_conv_causal=causal).embedding.conv
    x = torch.zeros(1, 80, 24, dtype=torch.float64)
    x[0, 40] = 1.0
    y = m(x, dense(80))
    assert y.shape == x.shape
    hit = y[0].abs().sum(-1).nonzero().squeeze(1)
    left, right = (kernel - 1, 0) if causal else ((kernel - 1) // 2, kernel // 2)
    assert (int(hit.min()), int(hit.max())) == (40 - right, 40 + left)


def test_zero_embedding_conv_is_none() -> None:
    a, b = model_of(), model_of(use_embedding_conv=True)
    b.load_state_dict(a.state_dict(), strict=False)
    with torch.no_grad():
        b.embedding.conv.weight.zero_()
    torch.testing.assert_close(a(IDS).last_hidden_state, b(IDS).last_hidden_state)


def test_depthwise_and_plain_convolution_options() -> None:
    depthwise = model_of(use_embedding_conv=True, embedding_conv_depthwise=True).embedding.conv
    assert depthwise.weight.shape == (24, 1, 3)
    alone = model_of(use_embedding_conv=True, embedding_conv_residual=False).embedding.conv
    with torch.no_grad():
        alone.weight.zero_()
    assert not bool(alone(torch.ones(1, 4, 24, dtype=torch.float64), dense(4)).any())


def test_factorised_with_identity_projection_is_plain() -> None:
    a = model_of()
    b = model_of(use_factorized_embedding=True, factorized_embedding_dim=24)
    b.load_state_dict(a.state_dict(), strict=False)
    with torch.no_grad():
        b.embedding.projection.weight.copy_(torch.eye(24))
    torch.testing.assert_close(a(IDS).logits, b(IDS).logits)


def test_tied_head_shares_the_table() -> None:
    model = build_model(small())
    names = [n for n, p in model.named_parameters() if p.dim() == 2 and p.shape[0] == 40]
    assert names == ["embedding.table.weight"] and model.head.vocabulary is model.embedding.table.weight
    untied = build_model(small(tie_embeddings=False, head_bias=False, mlm_head="none"))
    assert {n for n, _ in untied.named_parameters() if n.startswith("head")} == {"head.decoder"}


def test_one_loop_has_no_loop_parameters_and_two_start_as_a_repeated_stack() -> None:
    assert not any("loops" in n for n, _ in build_model(small(num_loops=1)).named_parameters())
    torch.manual_seed(0)
    twice = build_model(small(num_loops=2, layer_pattern=("retnet", "standard_attn"), num_layers=2)).double().eval()
    x, seqs = twice.embedding(IDS, dense(9)), dense(9)
    for _ in range(2):
        for layer in twice.layers:
            x, _ = layer(x, seqs)
    torch.testing.assert_close(twice(IDS).last_hidden_state, twice.final_norm(x))
    with torch.no_grad():
        twice.loops.gate.fill_(0.3)
    assert not torch.allclose(twice(IDS).last_hidden_state, twice.final_norm(x))


def test_layerscale_starts_at_its_value() -> None:
    model = build_model(small(layerscale_init=1e-3))
    assert all(
        float(m.gain.unique()) == pytest.approx(1e-3) for m in (model.layers[0].mixer_scale, model.layers[0].ffn_scale)
    )


# ---- initialisation, dropout ----------------------------------------------------------------------------------------
def test_initial_spread() -> None:
    torch.manual_seed(0)
    model = build_model(small(hidden_size=128, num_layers=8, ffn_hidden_size=512, init_std=0.05))
    ffn = model.layers[0].ffn
    assert float(ffn.up.weight.std()) == pytest.approx(0.05, rel=0.05)
    assert float(ffn.down.weight.std()) == pytest.approx(0.05 / 4, rel=0.05)  # 1 / sqrt(2 · 8)
    assert float(ffn.up.weight.abs().max()) <= 0.15


def test_first_loss_is_near_the_uniform_one() -> None:
    for norm in ("layer_norm", "dynamic_tanh", "derf"):
        torch.manual_seed(0)
        model = build_model(
            small(vocab_size=1000, hidden_size=64, norm_type=norm, layer_pattern=tuple(MIXERS), num_layers=6)
        )
        ids = torch.randint(5, 1000, (4, 32))
        loss = model(ids, None, torch.randint(5, 1000, (4, 32))).loss
        assert abs(float(loss) - 6.908) < 0.5  # ln 1000


def test_dropout_acts_in_training_only() -> None:
    model = model_of(dropout=0.5)
    assert torch.equal(model(IDS).last_hidden_state, model(IDS).last_hidden_state)
    model.train()
    assert not torch.equal(model(IDS).last_hidden_state, model(IDS).last_hidden_state)


# ---- MoE, BitNet, groups --------------------------------------------------------------------------------------------
def test_auxiliary_loss_is_the_mean_over_logical_layers() -> None:
    model = model_of(use_moe=True, num_loops=2, moe_aux_loss=0.5, moe_z_loss=0.25)
    out = model(IDS, None, IDS)
    assert len(out.moe_stats) == 2
    expected = 0.0
    for s in out.moe_stats:
        share = s.counts.double() / s.counts.sum()
        expected += (0.5 * 4 * (share * s.mean_prob).sum() + 0.25 * s.z) / 2
    torch.testing.assert_close(out.aux_loss.double(), torch.as_tensor(expected).double())
    torch.testing.assert_close(out.loss, out.loss_sum / 9 + out.aux_loss)


def test_bias_balancing_moves_towards_the_idle_expert() -> None:
    model = model_of(use_moe=True, moe_balance="bias", moe_bias_rate=0.01)
    ffn = model.layers[0].ffn
    out = model(IDS, None, IDS)
    load = out.moe_stats[0].counts.float()
    model.update_moe_bias(model.expert_loads(out.moe_stats))
    torch.testing.assert_close(ffn.select_bias.float(), 0.01 * torch.sign(load.mean() - load))
    assert "select_bias" in {n.rpartition(".")[2] for n in model.state_dict()}
    assert float(out.aux_loss) == pytest.approx(0.001 * float(out.moe_stats[0].z), rel=1e-6)  # no balance term


def test_expert_loads_are_of_a_layer_in_all_its_loops() -> None:
    model = model_of(use_moe=True, moe_balance="bias", num_layers=2, num_loops=3)
    stats = model(IDS).moe_stats
    loads = model.expert_loads(stats)
    assert loads.shape == (2, 4) and int(loads.sum()) == 2 * 3 * 2 * IDS.numel()
    for layer in range(2):
        assert torch.equal(loads[layer], sum(stats[2 * loop + layer].counts for loop in range(3)))
    model.update_moe_bias(torch.tensor([[1, 2, 3, 2], [8, 0, 8, 8]]))
    assert [layer.ffn.select_bias.sign().tolist() for layer in model.layers] == [[1, 0, -1, 0], [-1, 1, -1, -1]]
    dense = model_of()
    assert dense.expert_loads(dense(IDS).moe_stats).shape == (0, 0)


def test_bitnet_quantises_the_blocks_maps_and_nothing_else() -> None:
    cfg = dict(
        use_bitnet=True,
        layer_pattern=tuple(MIXERS),
        num_layers=6,
        use_factorized_embedding=True,
        factorized_embedding_dim=8,
    )
    model = build_model(small(**cfg))
    quantised = {n for n, m in model.named_modules() if isinstance(m, BitLinear)}
    plain = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - quantised
    assert all(n.startswith("layers.") for n in quantised)
    assert plain == {"embedding.projection", "head.dense", "layers.1.mixer.x_proj"}
    full = build_model(small(**{**cfg, "use_bitnet": False}))
    added = {n for n, _ in model.named_parameters()} ^ {n for n, _ in full.named_parameters()}
    assert added and all(n.endswith("norm.weight") for n in added)


def test_groups_follow_module_types() -> None:
    model = build_model(small(layer_pattern=tuple(MIXERS), num_layers=6, use_moe=True, num_loops=2, norm_type="derf"))
    groups = model.param_groups()
    assert tuple(groups) == GROUPS
    listed = [n for members in groups.values() for n, _, _ in members]
    assert sorted(listed) == sorted(n for n, _ in model.named_parameters())
    name_of = {n: g for g, members in groups.items() for n, _, _ in members}
    assert name_of["layers.0.mixer.qkvg.weight"] == "retnet"
    assert name_of["layers.1.mixer.A_log"] == name_of["layers.1.mixer.in_proj.weight"] == "mamba"
    assert name_of["layers.2.mixer.attention.qkv.weight"] == "ode"
    assert {name_of[f"layers.{i}.mixer.qkv.weight"] for i in (3, 4, 5)} == {"attention"}
    assert name_of["layers.2.mixer.norm.alpha"] == name_of["final_norm.weight"] == "norms"
    assert name_of["embedding.table.weight"] == name_of["loops.gate"] == "embeddings"
    assert name_of["layers.0.ffn.w_in"] == name_of["head.dense.weight"] == "other"
    undecayed = {n.rpartition(".")[2] for members in groups.values() for n, _, decay in members if not decay}
    assert undecayed == {"bias", "alpha", "shift", "A_log", "D", "dt_bias", "conv_bias", "scale"}


def test_presets_build_with_their_documented_size() -> None:
    with torch.device("meta"):
        mini = build_model(load_config("mini"))
        tiny = build_model(load_config("tinybert"))
    assert mini.embedding.projection is not None and mini.embedding.table.weight.shape == (50000, 128)
    # 6 layers of 12·768² and a 50k table: TinyBERT's 67M with a larger vocabulary
    assert 80e6 < sum(p.numel() for p in tiny.parameters()) < 84e6
