"""The real model on real text: what the fakes of the other files cannot show."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file

from ultra.config.run import RunConfig
from ultra.mixers import MIXERS
from ultra.train import checkpoint, train, trainer
from ultra.train.metrics import read_rows


def config(folder: Path) -> RunConfig:
    text = [f"line {i}: the quick brown fox no {i * 37 % 101} jumps over the lazy dog {i % 7}\n" for i in range(400)]
    (folder / "text").mkdir(exist_ok=True)
    for part in range(8):
        (folder / "text" / f"{part}.txt").write_text("".join(text[part * 50 : part * 50 + 50]))
    model = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_layers": len(MIXERS),
        "num_loops": 2,
        "num_heads": 2,
        "retention_heads": 2,
        "layer_pattern": list(MIXERS),
        "ffn_hidden_size": 32,
        "dropout": 0.1,
        "use_moe": True,
        "moe_balance": "both",
        "norm_type": "derf",
        "use_bitnet": True,
        "gradient_checkpointing": True,
    }
    training = {
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_length": 32,
        "val_fraction": 0.2,
        "eval_samples": 4,
        "dataloader_workers": 0,
        "num_workers": 0,
        "cache_dir": str(folder / "cache"),
        "local_parquet_dir": str(folder / "text"),
        "scheduler_total_steps": 4,
        "checkpoint_every_n_steps": 2,
        "val_interval": 2,
        "gradient_log_interval": 1,
        "use_galore": True,
        "galore_rank": 8,
        "device": "cpu",
    }
    return RunConfig.model_validate({"model": model, "training": training})


def test_every_mixer_trains_and_resumes_bit_equal(tmp_path: Path, monkeypatch) -> None:
    cfg = config(tmp_path)
    assert train(cfg, run_dir=tmp_path / "whole") == 0
    original = trainer.Trainer.backward

    def backward(self, micro_batches):
        if self.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "backward", backward)
        assert train(cfg, run_dir=tmp_path / "parts") == 75
    torch.manual_seed(99)
    assert train(cfg, run_dir=tmp_path / "parts") == 0

    whole, parts = checkpoint.latest(tmp_path / "whole"), checkpoint.latest(tmp_path / "parts")
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = load_file(whole / name), load_file(parts / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    times = {"tokens_per_s", "data_wait_ms", "eval_seconds"}
    a, b = (
        [{k: v for k, v in row.items() if k not in times} for row in read_rows(tmp_path / run / "metrics.jsonl")]
        for run in ("whole", "parts")
    )
    assert a == b
    assert len(a[1]["moe_load"]) == len(MIXERS)  # one per layer, its loops together
    for group in ("embeddings", "norms", "ode", "retnet", "mamba", "attention", "other"):
        assert a[1][f"grad_norm_{group}"] > 0

    state = load_file(parts / "optimizer.safetensors")
    projected = {key.rpartition(".")[0] for key in state if key.endswith(".projection")}
    assert projected
    for forbidden in ("embedding", "router", "conv", "dt_proj", "head.", "norm"):
        assert not [name for name in projected if forbidden in name], forbidden
