from __future__ import annotations

import logging
from itertools import pairwise

import pytest
import torch
from torch import nn

from ultra.config.training import GROUPS, TrainingConfig
from ultra.errors import UserError
from ultra.train.galore import GaLore, projection
from ultra.train.optim import (
    GroupedOptimizer,
    collect_groups,
    state_shapes,
    table,
    warn_if_rates_cannot_train,
)

GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)


# Groups


def test_every_parameter_is_in_exactly_one_torch_group_with_its_own_settings(tiny) -> None:
    model, cfg = (
        tiny.Model(),
        TrainingConfig(lr_norms=0.5, wd_norms=0.25, betas_norms=(0.1, 0.2), eps_norms=1e-3),
    )
    optimizer = GroupedOptimizer(collect_groups(model, cfg), cfg)
    assert sorted(map(id, optimizer.params)) == sorted(map(id, model.parameters()))
    groups = optimizer.parts[0].param_groups
    weight = next(g for g in groups if any(p is model.norm.weight for p in g["params"]))
    bias = next(g for g in groups if any(p is model.norm.bias for p in g["params"]))
    assert (weight["lr"], weight["weight_decay"], weight["betas"], weight["eps"]) == (
        0.5,
        0.25,
        (0.1, 0.2),
        1e-3,
    )
    assert (bias["lr"], bias["weight_decay"]) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda groups: groups["other"].pop(), "in no group"),
        (lambda groups: groups["norms"].append(groups["other"][0]), "in two groups"),
        (lambda groups: groups["norms"].append(("x", nn.Parameter(torch.ones(1)), True)), "does not have"),
        (lambda groups: groups.update(typo=[]), "typo"),
    ],
)
def test_what_is_not_a_partition_is_refused(tiny, spoil, message: str) -> None:
    model = tiny.Model()
    groups = model.param_groups()
    spoil(groups)
    model.param_groups = lambda: groups
    with pytest.raises(ValueError, match=message):
        collect_groups(model, TrainingConfig())


def test_table_counts_and_shows_absent_groups(tiny) -> None:
    lines = table(collect_groups(tiny.Model(), TrainingConfig())).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(GROUPS)
    assert lines[0].split() == ["group", "tensors", "parameters", "lr", "wd", "betas", "eps"]
    assert next(line for line in lines if line.startswith("mamba")).split() == ["mamba", "absent"]
    assert next(line for line in lines if line.startswith("attention")).split()[1:3] == ["2", "272"]


def test_rates_that_cannot_move_the_weights_warn_for_present_groups_alone(tiny, caplog) -> None:
    cfg = TrainingConfig(lr_other=1e-6, lr_mamba=1e-6, scheduler_total_steps=100)
    with caplog.at_level(logging.WARNING):
        warn_if_rates_cannot_train(collect_groups(tiny.Model(), cfg), 100, cfg, 0.02)
    assert len(caplog.records) == 1
    assert "lr_other=1e-06 (moves 5.1e-05)" in caplog.text  # 100 steps of warm-up and cosine: 51 full steps
    for absent_or_fast in ("mamba", "norms", "embeddings"):
        assert f"lr_{absent_or_fast}" not in caplog.text


def test_steps_beyond_a_schedule_that_ended_at_zero_warn(tiny, caplog) -> None:
    for fields, expected in (
        ({}, True),
        ({"min_lr_ratio": 0.1}, False),
        ({"scheduler_type": "constant"}, False),
    ):
        cfg = TrainingConfig(scheduler_total_steps=1000, **fields)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            warn_if_rates_cannot_train(collect_groups(tiny.Model(), cfg), 1001, cfg, 0.02)
        assert ("train nothing" in caplog.text) == expected


def test_skipped_step_moves_nothing_and_the_next_one_counts_as_the_first(tiny) -> None:
    def stepped(skips: list[torch.Tensor], grads: list[float]) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = tiny.Model()
        cfg = TrainingConfig(use_galore=True, galore_rank=4)
        optimizer = GroupedOptimizer(collect_groups(model, cfg), cfg)
        for skip, value in zip(skips, grads, strict=True):
            for param in model.parameters():
                param.grad = torch.full_like(param, value)
            optimizer.step(skip)
        return dict(model.state_dict())

    once = stepped([GOOD], [0.1])
    after_bad = stepped([BAD, GOOD], [float("nan"), 0.1])
    torch.manual_seed(0)
    start = tiny.Model().state_dict()
    bad = stepped([BAD], [float("nan")])
    assert all(torch.equal(bad[k], start[k]) for k in start)
    assert all(torch.equal(once[k], after_bad[k]) for k in start)


def test_state_round_trip_does_not_depend_on_group_order(tiny) -> None:
    def make(reverse: bool):
        torch.manual_seed(0)
        model = tiny.Model()
        cfg = TrainingConfig(use_galore=True, galore_rank=4)
        groups = collect_groups(model, cfg)
        return model, GroupedOptimizer(groups[::-1] if reverse else groups, cfg)

    def step(model, optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step(GOOD)

    model, optimizer = make(False)
    step(model, optimizer, 1)
    saved = {k: v.clone() for k, v in optimizer.state_tensors().items()}
    other, reversed_optimizer = make(True)
    step(other, reversed_optimizer, 1)
    other.load_state_dict(model.state_dict())
    reversed_optimizer.load_state_tensors(saved)
    for seed in (2, 3):
        step(model, optimizer, seed)
        step(other, reversed_optimizer, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_state_of_another_optimizer_is_refused(tiny) -> None:
    model, plain = tiny.Model(), TrainingConfig()
    optimizer = GroupedOptimizer(collect_groups(model, plain), plain)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step(GOOD)
    low_rank = TrainingConfig(use_galore=True, galore_rank=4)
    with pytest.raises(UserError, match="use_galore"):
        GroupedOptimizer(collect_groups(model, low_rank), low_rank).load_state_tensors(optimizer.state_tensors())
    with pytest.raises(UserError, match=r"'gone'"):
        optimizer.load_state_tensors({"gone.step": torch.zeros(())})


# GaLore


def galore(
    param: nn.Parameter,
    *,
    rank: int,
    lr=1e-2,
    interval=1,
    eps=1e-8,
    wd=0.0,
    rotate=True,
    scale=1.0,
    method="svd",
):
    group = {"params": [param], "lr": lr, "weight_decay": wd, "betas": (0.9, 0.95), "eps": eps}
    return GaLore([group], rank=rank, interval=interval, scale=scale, rotate=rotate, method=method)


def test_eligible_matrices(tiny) -> None:
    model = tiny.Model()
    cfg = TrainingConfig(use_galore=True, galore_rank=4)
    optimizer = GroupedOptimizer(collect_groups(model, cfg), cfg)
    chosen = {optimizer.names[id(p)] for g in optimizer.parts[1].param_groups for p in g["params"]}
    assert chosen == {"left.weight", "right.weight"}  # not the tied table, the flagged router, norms, biases
    for settings in ({"galore_rank": 16}, {"galore_max_dim": 15}):
        cfg = TrainingConfig(use_galore=True, **{"galore_rank": 4, **settings})
        assert len(GroupedOptimizer(collect_groups(model, cfg), cfg).parts) == 1


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12)])
def test_full_rank_is_adamw_where_the_update_is_linear_in_the_gradient(shape: tuple[int, int]) -> None:
    # With eps far above sqrt(V) the update is M / eps, and P Pᵀ = I: rotation drops out.
    torch.manual_seed(0)
    start = torch.randn(shape, dtype=torch.float32)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = galore(ours, rank=12, eps=1e4, lr=1.0, wd=0.1)
    b = torch.optim.AdamW([theirs], lr=1.0, betas=(0.9, 0.95), eps=1e4, weight_decay=0.1)
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    moved = (theirs.detach() - start).abs().max()
    # 5 steps of products of length 12 in float32; sqrt(V) beside eps is a 1e-4 share of the update.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=float(moved) * 1e-5 + 5 * 1e-4 * 5e-4)


def test_state_lives_in_the_subspace() -> None:
    param = nn.Parameter(torch.randn(10, 30))
    optimizer = galore(param, rank=3)
    param.grad = torch.randn(10, 30)
    optimizer.step()
    state = optimizer.state[param]
    assert state["exp_avg"].numel() + state["exp_avg_sq"].numel() == 2 * 3 * 30
    assert {k: v.shape for k, v in state.items()} == state_shapes(param, 3)
    assert all(type(value) is torch.Tensor for value in state.values())


@pytest.mark.parametrize("method", ["randomized", "svd"])
def test_projection_is_orthonormal_and_finds_the_subspace(method: str) -> None:
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(40, 40))[0], torch.linalg.qr(torch.randn(60, 60))[0]
    grad = u @ torch.diag(2.0 ** -torch.arange(40.0)) @ v[:40]
    basis = projection(grad, 6, None, method)
    again = projection(grad, 6, basis, method)
    for found in (basis, again):
        torch.testing.assert_close(found.T @ found, torch.eye(6), atol=1e-5, rtol=0)
        # Cosine of the largest angle to the true subspace.
        assert torch.linalg.svdvals(u[:, :6].T @ found).min() > 0.999
    assert torch.equal(projection(grad, 6, basis, method), again)


def least_squares(rotate: bool, interval: int) -> float:
    """Relative error after 400 steps of rank 4 on |A X - Y|², X [16, 24]."""
    torch.manual_seed(0)
    a, x = torch.randn(64, 16), torch.randn(16, 24)
    param = nn.Parameter(torch.zeros(16, 24))
    optimizer = galore(param, rank=4, interval=interval, rotate=rotate, lr=0.1, method="randomized")
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 400)
        param.grad = a.T @ (a @ param.detach() - a @ x) / 64
        optimizer.step()
    return float((param.detach() - x).norm() / x.norm())


def test_new_subspace_every_step_converges_with_rotated_moments_only() -> None:
    rotated, kept = least_squares(True, 1), least_squares(False, 1)
    assert rotated < 1e-3
    assert kept > 0.3


def test_update_interval_keeps_the_basis() -> None:
    param = nn.Parameter(torch.randn(10, 30))
    optimizer = galore(param, rank=3, interval=3)
    seen = []
    for _ in range(7):
        param.grad = torch.randn(10, 30)
        optimizer.step()
        seen.append(optimizer.state[param]["projection"].clone())
    same = [torch.equal(a, b) for a, b in pairwise(seen)]
    assert same == [True, True, False, True, True, False]


def test_scale_multiplies_the_update() -> None:
    moves = []
    for scale in (1.0, 0.25):
        torch.manual_seed(0)
        param = nn.Parameter(torch.zeros(10, 30))
        optimizer = galore(param, rank=3, scale=scale)
        param.grad = torch.randn(10, 30)
        optimizer.step()
        moves.append(param.detach().clone())
    torch.testing.assert_close(moves[1], moves[0] / 4)


def test_per_layer_update_in_backward_equals_the_update_after_it_and_frees_the_gradient() -> None:
    results = []
    for per_layer in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(12, 8, bias=False)
        optimizer = galore(layer.weight, rank=4)
        if per_layer:
            optimizer.update_in_backward(max_norm=0.5)
        x = torch.randn(6, 12)
        for _ in range(3):
            if per_layer:
                optimizer.arm(torch.tensor(False), torch.tensor(2.0))
            (layer(x).square().sum() * (2.0 if per_layer else 1.0)).backward()
            if per_layer:
                assert layer.weight.grad is None
            else:
                nn.utils.clip_grad_norm_([layer.weight], 0.5)
            optimizer.step()
            layer.weight.grad = None
        results.append(layer.weight.detach())
    # A few roundings apart: the loss scale enters the clip factor.
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_per_layer_update_skips_what_is_not_finite_and_passes_that_only_diagnose() -> None:
    layer = nn.Linear(12, 8, bias=False)
    start = layer.weight.detach().clone()
    optimizer = galore(layer.weight, rank=4)
    optimizer.update_in_backward(max_norm=0.5)
    layer(torch.ones(1, 12)).sum().backward()  # not armed
    assert layer.weight.grad is not None
    layer.weight.grad = None
    optimizer.arm(torch.tensor(False), torch.tensor(1.0))
    (layer(torch.ones(1, 12)).sum() * float("nan")).backward()
    optimizer.arm(torch.tensor(True), torch.tensor(1.0))
    layer(torch.ones(1, 12)).sum().backward()
    assert torch.equal(layer.weight, start)


def test_interval_of_one_warns(tiny, caplog) -> None:
    cfg = TrainingConfig(use_galore=True, galore_rank=4)
    with caplog.at_level(logging.WARNING):
        GroupedOptimizer(collect_groups(tiny.Model(), cfg), cfg)
    assert "galore_update_interval=1" in caplog.text
