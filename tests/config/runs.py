"""Runs of the real trainer on a real encoder of width 16 and a folder of text, for the tables of fields."""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ultra.config import RunConfig
from ultra.config.training import GROUPS
from ultra.train import checkpoint, trainer
from ultra.train.optim import GroupedOptimizer

MODEL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "retention_heads": 2, "ffn_hidden_size": 32,
    "use_moe": False, "dropout": 0.0, "layer_pattern": ["standard_attn"],
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "batch_size": 2, "gradient_accumulation_steps": 1, "max_length": 16, "val_fraction": 0.2, "eval_samples": 2,
    "val_interval": 1000, "checkpoint_every_n_steps": 1000, "scheduler_total_steps": 2, "scheduler_type": "constant",
    "dataloader_workers": 0, "num_workers": 0, "device": "cpu",
    **{f"lr_{group}": 1e-2 for group in GROUPS},
}  # fmt: skip
WORDS = "the a river house walks slowly over stone green light model of and to in which every small number".split()

_folder = tempfile.TemporaryDirectory(prefix="ultra-fields-")
FOLDER = Path(_folder.name)
TEXT = FOLDER / "text"


def documents(number: int = 60, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join([f"n{i}", *rng.choices(WORDS, k=12)]) for i in range(number)]


def write_text(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text, "reverse": text[::-1]}) for text in texts]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def new_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=FOLDER))


def config(*, model: dict[str, Any] | None = None, model_class: str = "frankenstein", **training: Any) -> RunConfig:
    if not TEXT.exists():
        write_text(TEXT, documents())
    source = {} if "dataset_name" in training or "sources" in training else {"local_parquet_dir": str(TEXT)}
    settings = {**TRAINING, "cache_dir": str(FOLDER / "cache"), **source, **training}
    return RunConfig.model_validate(
        {"model_class": model_class, "model": {**MODEL, **(model or {})}, "training": settings}
    )


@dataclass
class Run:
    """A run that ended: its exit code, folder, metrics, and its trainer's optimizer."""

    code: int
    folder: Path
    rows: list[dict[str, Any]]
    optimizer: GroupedOptimizer

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self.rows if name in row]

    @property
    def steps(self) -> list[int]:
        """Checkpoints on disk."""
        return checkpoint.steps(self.folder)

    @property
    def state(self) -> dict[str, Any]:
        return checkpoint.read_state(checkpoint.folder(self.folder, self.steps[-1]))

    def tensors(self, name: str = "model") -> dict[str, Tensor]:
        return load_file(checkpoint.folder(self.folder, self.steps[-1]) / f"{name}.safetensors")


def run(folder: Path | None = None, **fields: Any) -> Run:
    """Train to the end in a folder of its own; the fields as `config` takes them."""
    folder = folder or new_folder()
    seen: list[trainer.Trainer] = []
    original = trainer.Trainer.run

    def noted(self: trainer.Trainer) -> int:
        seen.append(self)
        return original(self)

    trainer.Trainer.run = noted  # type: ignore[method-assign]
    try:
        code = trainer.train(config(**fields), run_dir=folder)
    finally:
        trainer.Trainer.run = original  # type: ignore[method-assign]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return Run(code, folder, rows, seen[0].optimizer)


def moved(one: Run, other: Run) -> set[str]:
    """Names of the weights in which two runs end apart."""
    a, b = one.tensors(), other.tensors()
    return {name for name in a if not torch.equal(a[name], b[name])}
