from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ultra.config.training import TrainingConfig

WORDS = (
    "the a river house walks slowly over stone green light model of and to in which every small number "
    "window token order letter, morning. evening; never always begins ends reads writes Zürich naïve 12 345"
).split()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"a test of data opened a socket: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def texts() -> list[str]:
    """260 different documents of 1 to 80 words."""
    rng = random.Random(7)
    return [" ".join([f"n{i}"] + rng.choices(WORDS, k=rng.randint(1, 80))) for i in range(260)]


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for part in range(2):
        lines = [json.dumps({"body": t, "id": i}) for i, t in enumerate(texts[part * 130 : part * 130 + 130])]
        (folder / f"part-{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def make_cfg(tmp_path: Path, corpus: Path) -> Callable[..., Any]:
    """What open_data reads of a RunConfig; the training part is the real one."""

    def make(vocab_size: int = 400, **training: Any) -> Any:
        settings: dict[str, Any] = {
            "cache_dir": str(tmp_path / "cache"),
            "local_parquet_dir": str(corpus),
            "batch_size": 3,
            "gradient_accumulation_steps": 2,
            "max_length": 24,
            "dataset_batch_size": 100,
            "dataloader_workers": 0,
            "num_workers": 1,
            "val_fraction": 0.1,
            "seed": 11,
        }
        return SimpleNamespace(
            model=SimpleNamespace(vocab_size=vocab_size), training=TrainingConfig(**(settings | training))
        )

    return make
