"""Every mixer, norm and FFN learns two small languages: a masked token is told by its neighbours, or by its place.

    local  x[t+1] = x[t] + 1 mod 24, and one token in ten is drawn anew
    copy8  x[t] = x[t-8] from eight tokens drawn at the start

A network that guesses has a loss of ln 24 = 3.18 on masked tokens; one without positions learns no more of copy8 than
which symbols occur. Two layers of width 64, batches of 32 sequences of 32, 15 % masked, 250 steps: 5 to 15 s
of one core. `python tests/model/test_learns.py [variant ...]` prints the table for three seeds.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from ultra.config import UltraConfig
from ultra.config.training import GROUPS, TrainingConfig
from ultra.mixers import MIXERS
from ultra.model import build_model
from ultra.train.optim import GroupedOptimizer, collect_groups
from ultra.train.schedule import lr_factor

SYMBOLS, FIRST, MASK, T, B = 24, 5, 4, 32, 32
LANGUAGES = ("local", "copy8")


def sentences(language: str, count: int, g: torch.Generator) -> torch.Tensor:
    """`[count,T]` ids."""
    if language == "copy8":
        return torch.randint(FIRST, FIRST + SYMBOLS, (count, 8), generator=g).repeat(1, T // 8)
    x = torch.randint(0, SYMBOLS, (count, T), generator=g)
    anew = torch.rand(count, T, generator=g) < 0.1
    for t in range(1, T):
        x[:, t] = torch.where(anew[:, t], x[:, t], (x[:, t - 1] + 1) % SYMBOLS)
    return x + FIRST


def loss_after(steps: int, language: str, seed: int = 0, **model: Any) -> float:
    """Mean loss on the masked tokens of 256 new sentences."""
    sizes = dict(
        vocab_size=FIRST + SYMBOLS, hidden_size=64, num_layers=2, num_heads=4, retention_heads=2, ffn_hidden_size=128,
        use_moe=False, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    network = build_model(UltraConfig(**{**sizes, **model}))
    cfg = TrainingConfig(scheduler_total_steps=steps, scheduler_type="wsd", **{f"lr_{g}": 3e-3 for g in GROUPS})
    optimizer = GroupedOptimizer(collect_groups(network, cfg), cfg)
    g = torch.Generator().manual_seed(seed + 1)

    def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = sentences(language, count, g)
        masked = torch.rand(count, T, generator=g) < 0.15
        return torch.where(masked, MASK, ids), torch.where(masked, ids, -100)

    for step in range(steps):
        optimizer.set_rates(lr_factor(step, cfg))
        ids, labels = batch(B)
        network(ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.params, 1.0)
        optimizer.step(torch.tensor(0.0))
        optimizer.zero_grad()
    with torch.no_grad():
        ids, labels = batch(256)
        out = network(ids, labels=labels)
        return float(out.loss_sum / out.num_labelled)


VARIANTS: dict[str, dict[str, Any]] = {
    **{name: dict(layer_pattern=(name,)) for name in MIXERS},
    "ode": dict(layer_pattern=("ode",), ode_steps=1, ode_checkpoint="none"),
    "dynamic_tanh": dict(norm_type="dynamic_tanh"),
    "derf": dict(norm_type="derf"),
    "moe": dict(use_moe=True),
    "bitnet": dict(use_bitnet=True),
    "pure_hope": dict(layer_pattern=("titan_attn",), hope_rope_fraction=0.0),
}
# Mamba has no positions but what its scan forgets: it finds a token by its neighbours, and begins to after 400 steps.
STEPS = {("mamba", "copy8"): 750}
# A score that only falls with distance cannot mean "eight back": HoPE alone is left with which symbols occur.
LIMITS = {("pure_hope", "copy8"): 3.0}
ALL = [(variant, language) for variant in VARIANTS for language in LANGUAGES]
QUICK = [
    ("retnet", "copy8"), ("mamba", "local"), ("ode", "copy8"), ("titan_attn", "copy8"), ("sigmoid_attn", "copy8"),
    ("derf", "copy8"), ("bitnet", "copy8"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "language"),
    [pytest.param(*c, id="-".join(c), marks=() if c in QUICK else pytest.mark.slow) for c in ALL],
)
def test_learns(variant: str, language: str) -> None:
    loss = loss_after(STEPS.get((variant, language), 250), language, **VARIANTS[variant])
    assert loss < LIMITS.get((variant, language), 1.0)


@pytest.mark.slow
def test_hope_is_better_than_no_positions() -> None:
    hope = loss_after(250, "local", **VARIANTS["pure_hope"])
    assert hope < loss_after(250, "local", layer_pattern=("titan_attn",), position_encoding="none") - 1


def table(variants: list[str]) -> None:
    for variant, language in ALL:
        if variant in variants:
            steps = STEPS.get((variant, language), 250)
            found = [loss_after(steps, language, seed, **VARIANTS[variant]) for seed in range(3)]
            print(f"| {variant} | {language} | {steps} | " + " | ".join(f"{x:.2f}" for x in found) + " |", flush=True)


if __name__ == "__main__":
    table(sys.argv[1:] or list(VARIANTS))
