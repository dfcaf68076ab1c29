"""The quickstart's criterion is sharp: a network that cannot look at the context does not meet it."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch

import ultra
from ultra.config import load_config
from ultra.mixers import MIXERS
from ultra.train import train

shortfalls = runpy.run_path(str(Path(__file__).parents[1] / "quickstart_criterion.py"))["shortfalls"]


@pytest.mark.slow
def test_quickstart_without_mixers_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mixer in MIXERS.values():
        monkeypatch.setattr(mixer, "forward", lambda self, x, seqs: torch.zeros_like(x))
    overrides = [
        f"training.cache_dir={tmp_path / 'cache'}",
        "training.device=cpu",
        "training.dataloader_workers=0",
    ]
    cfg = load_config("quickstart", overrides)
    assert train(cfg, run_dir=tmp_path / "run") == 0
    found = ultra.load(tmp_path / "run").evaluate()
    # It has trained as far as it can: on [MASK] it is as good as the counts, and it copies what it is shown.
    assert found["eval_mask_loss"] == pytest.approx(found["unigram_loss"], abs=0.3)
    assert found["eval_loss"] < found["eval_mask_loss"]
    wrong = shortfalls(found["eval_loss"], found["eval_mask_loss"], found["unigram_loss"])
    assert len(wrong) == 2, (found, wrong)


def test_the_criterion_takes_what_is_asked_for_and_no_less() -> None:
    assert shortfalls(5.9, 6.0, 6.61) == []
    assert len(shortfalls(5.91, 6.0, 6.61)) == 1
    assert len(shortfalls(5.9, 6.0, 6.59)) == 1
    assert len(shortfalls(math.nan, math.nan, 6.6)) == 2
