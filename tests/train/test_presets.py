"""Every preset trains at its own size on the built-in corpus, with small batches (minutes: marked slow)."""

from __future__ import annotations

import json
import math
import resource
import sys

import pytest
import torch

from ultra.config import load_config, presets
from ultra.config.training import GROUPS
from ultra.train import train
from ultra.train.optim import Group, warn_if_rates_cannot_train

SMALL_BATCHES = [
    "training.batch_size=2", "training.max_length=64", "training.gradient_accumulation_steps=1",
    "training.max_steps=3", "training.eval_samples=4", "training.dataloader_workers=0", "training.max_samples=300",
]  # fmt: skip


@pytest.mark.parametrize("preset", presets())
def test_rates_can_move_the_weights(preset: str, caplog) -> None:
    cfg = load_config(preset)
    weight = torch.nn.Parameter(torch.zeros(1))
    groups = [Group(name, [("weight", weight, True)], cfg.training.optim(name)) for name in GROUPS]
    warn_if_rates_cannot_train(groups, cfg.training.steps, cfg.training, cfg.model.initial_std)
    assert not caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["frankenstein", "mini", "standard", "standard_hope", "tinybert", "embbert"])
def test_preset_trains(preset: str, tmp_path) -> None:
    cfg = load_config(preset, [*SMALL_BATCHES, f"training.cache_dir={tmp_path / 'cache'}"])
    assert train(cfg, run_dir=tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    # three warm-up steps stay near the uniform distribution over 50000 tokens, 10.8 nats
    assert len(losses) == 3 and all(abs(loss - math.log(50000)) < 0.7 for loss in losses)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert peak < 24e9
