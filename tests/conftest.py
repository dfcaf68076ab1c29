"""A real run, trained once for all tests that use one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

STEPS = 6


@pytest.fixture(scope="session")
def bench_module() -> Callable[[str], ModuleType]:
    """bench_module("table") is bench/table.py, which is not installed; the packages stay those that pytest found."""

    def load(name: str) -> ModuleType:
        if str(ROOT) not in sys.path:
            sys.path.append(str(ROOT))
        return importlib.import_module(f"bench.{name}")

    return load


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder: two mixers, width 32, vocabulary 512, STEPS steps on some built-in text.

    Shared: copy it before changing it.
    """
    from ultra.config import load_config
    from ultra.train import train

    run = tmp_path_factory.mktemp("tiny") / "run"
    sizes = "vocab_size=512 hidden_size=32 num_layers=2 num_heads=2 retention_heads=2 ffn_hidden_size=64"
    training = (
        f"max_samples=300 max_length=64 batch_size=4 dataloader_workers=0 eval_samples=10 val_interval=3 "
        f"device=cpu scheduler_total_steps={STEPS} checkpoint_every_n_steps=3 cache_dir={run.parent / 'cache'}"
    )
    overrides = ["model.layer_pattern=[retnet, standard_attn]"]
    overrides += [f"model.{field}" for field in sizes.split()]
    overrides += [f"training.{field}" for field in training.split()]
    assert train(load_config("quickstart", overrides), run_dir=run) == 0
    return run
