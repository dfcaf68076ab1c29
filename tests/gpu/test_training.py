"""Twenty steps in bfloat16 of two shrunken presets with all six mixers, a checkpoint, and a resume from it.

Written once for any device; on the CPU it runs at a smaller size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

for module in ("pydantic", "tokenizers", "safetensors", "filelock", "tqdm"):
    pytest.importorskip(module)

from ultra.config import load_config  # noqa: E402
from ultra.mixers import MIXERS  # noqa: E402
from ultra.train import checkpoint, train  # noqa: E402

STEPS, HALF = 20, 10
COMMON = [
    f"model.layer_pattern=[{', '.join(MIXERS)}]", f"model.num_layers={len(MIXERS)}", "model.dropout=0.0",
    "training.use_amp=true", "training.amp_dtype=bf16", "training.dataloader_workers=0", "training.num_workers=1",
    f"training.scheduler_total_steps={STEPS}", "training.scheduler_warmup_ratio=0.1",
    f"training.checkpoint_every_n_steps={HALF}", f"training.val_interval={STEPS}", "training.eval_samples=16",
    "training.gradient_accumulation_steps=1", "training.nan_check_interval=1", "training.mlm_probability=0.3",
]  # fmt: skip
# Rates at which twenty steps move the loss by far more than its noise.
RATES = [f"training.lr_{g}=3e-3" for g in ("embeddings", "norms", "ode", "retnet", "mamba", "attention", "other")]
PRESETS = {
    "quickstart": [],
    # BitNet, mixture of experts, dynamic tanh, HoPE, RK4 and two loops stay as the preset has them
    "frankenstein": [
        "model.hidden_size=128", "model.num_heads=4", "model.retention_heads=4", "model.ffn_hidden_size=256",
    ],
}  # fmt: skip
SIZES = {
    "cpu": [
        "model.vocab_size=512", "model.hidden_size=32", "model.num_heads=2", "model.retention_heads=2",
        "model.ffn_hidden_size=64", "model.ode_steps=1", "training.batch_size=4", "training.max_length=32",
        "training.max_samples=300",
    ],
    "cuda": [
        "model.vocab_size=8192", "training.batch_size=16", "training.max_length=128", "training.max_samples=3000",
    ],
}  # fmt: skip


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def first_step_after(run: Path, step: int) -> dict:
    return next(row for row in rows(run) if row["step"] == step + 1 and "loss" in row)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("preset", PRESETS)
def test_twenty_steps_in_bfloat16(
    preset: str, device: str, cache: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    overrides = [*COMMON, *RATES, *PRESETS[preset], *SIZES[device]]
    cfg = load_config(preset, [*overrides, f"training.device={device}", f"training.cache_dir={cache}"])
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train(cfg, run_dir=whole) == 0

    made = [row for row in rows(whole) if "loss" in row]
    losses = torch.tensor([row["loss"] for row in made])
    record_property("preset", preset)
    record_property("steps", STEPS)
    record_property("first_loss", float(losses[0]))
    record_property("last_loss", float(losses[-1]))
    assert [row["step"] for row in made] == list(range(1, STEPS + 1))
    assert losses.isfinite().all() and not any(row["skipped"] for row in made)
    assert losses[-5:].mean() < losses[:5].mean() - 4 * losses[-5:].std() / 5**0.5
    last = checkpoint.latest(whole)
    assert last.name == checkpoint.folder(whole, STEPS).name
    assert checkpoint.read_state(last)["reference_ops"] is False, "the trainer fell back to the reference ops"
    assert [row for row in rows(whole) if "eval_loss" in row][-1]["step"] == STEPS

    shutil.copytree(whole, resumed)
    shutil.rmtree(checkpoint.folder(resumed, STEPS))
    assert train(cfg, run_dir=resumed) == 0
    again, before = first_step_after(resumed, HALF), first_step_after(whole, HALF)
    if device == "cpu":
        assert again["loss"] == before["loss"] and again["grad_norm"] == before["grad_norm"]
        ends = [checkpoint.latest(run) / "model.safetensors" for run in (whole, resumed)]
        assert ends[0].read_bytes() == ends[1].read_bytes()
    else:
        # The same weights and batch; a GPU may add in another order, and bfloat16 rounds what comes out to 2^-8.
        assert again["loss"] == pytest.approx(before["loss"], rel=2**-8)
    assert {row["step"] for row in rows(resumed) if "loss" in row} == set(range(1, STEPS + 1))
