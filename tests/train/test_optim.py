from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from ultra.config.training import GROUPS, TrainingConfig
from ultra.errors import UserError
from ultra.train.optim import (
    GroupedOptimizer,
    collect_groups,
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
