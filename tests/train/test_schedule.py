from __future__ import annotations

import math

import pytest

from ultra.config.training import TrainingConfig
from ultra.train.schedule import lr_factor, second_stage, travel


def cfg(kind: str, **fields) -> TrainingConfig:
    return TrainingConfig(
        **{"scheduler_type": kind, "scheduler_total_steps": 20, "scheduler_warmup_ratio": 0.1, **fields}
    )


def test_constant_has_no_warm_up() -> None:
    assert [lr_factor(s, cfg("constant")) for s in (0, 1, 19, 50)] == [1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "linear_warmup_then_constant"])
def test_warm_up_rises_to_the_peak_and_the_first_rate_is_above_zero(kind: str) -> None:
    factors = [lr_factor(s, cfg(kind, scheduler_warmup_ratio=0.23)) for s in range(20)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]  # ceil(0.23 * 20) = 5
    assert max(factors) == 1.0
    assert min(factors) > 0


def test_cosine() -> None:
    c = cfg("cosine", min_lr_ratio=0.1)
    assert lr_factor(2, c) == 1.0
    assert lr_factor(11, c) == pytest.approx(0.1 + 0.9 * 0.5)  # half-way between 2 and 20
    assert lr_factor(20, c) == lr_factor(100, c) == 0.1


def test_linear_and_wsd() -> None:
    assert lr_factor(11, cfg("linear")) == pytest.approx(0.5)
    wsd = cfg("wsd", min_lr_ratio=0.2)
    assert [lr_factor(s, wsd) for s in (2, 10, 15, 16)] == [1, 1, 1, 1]
    assert lr_factor(18, wsd) == pytest.approx(0.6)  # half of the last fifth
    assert lr_factor(20, wsd) == 0.2


def test_linear_warmup_then_constant_stays() -> None:
    assert lr_factor(1000, cfg("linear_warmup_then_constant")) == 1.0


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant", "linear_warmup_then_constant"])
@pytest.mark.parametrize("ratio", [0.0, 0.99])
def test_shortest_runs(kind: str, total: int, ratio: float) -> None:
    c = cfg(kind, scheduler_total_steps=total, scheduler_warmup_ratio=ratio)
    assert all(0 < lr_factor(s, c, two_stage) <= 1 for s in range(total) for two_stage in (False, True))


def test_travel_of_a_cosine_run_is_about_half_its_steps() -> None:
    c = cfg("cosine", scheduler_total_steps=1000, scheduler_warmup_ratio=0.0)
    assert travel(1000, c) == pytest.approx(500.5)  # sum of (1 + cos)/2, end excluded


# Two stages


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant", "linear_warmup_then_constant"])
def test_the_second_stage_is_a_quarter_of_the_schedule_begun_anew(kind: str) -> None:
    one, anew = cfg(kind, min_lr_ratio=0.2), cfg(kind, min_lr_ratio=0.2, scheduler_warmup_ratio=0.0)
    assert second_stage(one) == 10
    factors = [lr_factor(s, one, two_stage=True) for s in range(30)]
    assert factors[:10] == [lr_factor(s, one) for s in range(10)]
    half = anew.model_copy(update={"scheduler_total_steps": 10})
    if kind != "wsd":  # its fall is the last fifth of the whole run
        assert factors[10:] == pytest.approx([0.25 * lr_factor(s, half) for s in range(20)])
    assert factors[10] == 0.25 and factors[29] == (0.25 if "constant" in kind else 0.05)
    assert factors[9] > 0.5 > factors[10] >= factors[11]


def test_the_second_stage_of_a_cosine_in_numbers() -> None:
    factors = [lr_factor(s, cfg("cosine"), two_stage=True) for s in (9, 10, 15, 19, 20)]
    p = math.pi
    assert factors == pytest.approx(
        [(1 + math.cos(7 / 18 * p)) / 2, 0.25, 0.125, 0.25 * (1 + math.cos(0.9 * p)) / 2, 0.0]
    )


def test_the_second_stage_waits_for_the_warm_up_and_for_the_whole_first_half() -> None:
    assert second_stage(cfg("linear", scheduler_warmup_ratio=0.8)) == 16
    assert [lr_factor(s, cfg("linear", scheduler_warmup_ratio=0.8), True) for s in (15, 16)] == [1.0, 0.25]
    assert second_stage(cfg("constant", scheduler_warmup_ratio=0.8)) == 10
    assert second_stage(cfg("linear", scheduler_total_steps=7)) == 4


def test_travel_knows_the_stages() -> None:
    assert travel(20, cfg("constant"), two_stage=True) == 10 + 10 / 4
