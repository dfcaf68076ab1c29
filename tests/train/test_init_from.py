"""Continued pre-training: weights and tokenizer of another run, everything else afresh."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from ultra.cli import main
from ultra.config import load_config
from ultra.config.training import GROUPS
from ultra.data.tokenizer import train_tokenizer
from ultra.errors import UserError
from ultra.train import checkpoint, train
from ultra.train.metrics import read_rows

SIZES = "vocab_size=512 hidden_size=32 num_layers=2 num_heads=2 retention_heads=2 ffn_hidden_size=64"
WORDS = "harbour lantern tide quay rope anchor gull storm mast keel captain morning silver north".split()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of the user's own text: words that the base run's corpus has not."""
    rng, folder = random.Random(5), tmp_path / "text"
    folder.mkdir()
    documents = "\n\n".join(" ".join(rng.choices(WORDS, k=30)) for _ in range(120))
    (folder / "own.txt").write_text(documents, encoding="utf-8")
    return folder


@pytest.fixture
def config(text: Path, tmp_path: Path):
    """The configuration of `tiny_run` (tests/conftest.py) on that text, from `init_from`."""

    def make(init_from: Path, *overrides: str):
        training = (
            f"max_length=64 batch_size=4 dataloader_workers=0 num_workers=1 eval_samples=4 val_fraction=0.1 device=cpu "
            f"scheduler_total_steps=4 scheduler_warmup_ratio=0.5 cache_dir={tmp_path / 'cache'} "
            f"local_parquet_dir={text} init_from={init_from}"
        )
        fields = [f"model.{field}" for field in SIZES.split()] + [f"training.{field}" for field in training.split()]
        return load_config("quickstart", ["model.layer_pattern=[retnet, standard_attn]", *fields, *overrides])

    return make


FROZEN = [f"training.lr_{group}=0" for group in GROUPS]


@pytest.mark.parametrize("form", ["run", "checkpoint", "exported"])
def test_weights_and_tokenizer_are_taken_and_the_rest_starts_anew(
    tiny_run: Path, config, tmp_path: Path, form: str
) -> None:
    base = checkpoint.latest(tiny_run)
    if form == "exported":
        source = tmp_path / "exported"
        source.mkdir()
        for name in ("model.safetensors", "tokenizer.json"):
            shutil.copy(base / name, source / name)
    else:
        source = tiny_run if form == "run" else base
    run = tmp_path / "run"
    assert train(config(source, *FROZEN, "training.max_steps=2"), run_dir=run) == 0
    end = checkpoint.latest(run)
    first, last = load_file(base / "model.safetensors"), load_file(end / "model.safetensors")
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert (end / "tokenizer.json").read_text() == (base / "tokenizer.json").read_text()
    state = checkpoint.read_state(end)
    assert (state["step"], state["data_step"]) == (2, 2)
    steps = [value for name, value in load_file(end / "optimizer.safetensors").items() if name.endswith(".step")]
    assert steps and all(value == 2 for value in steps)
    rows = [row for row in read_rows(run / "metrics.jsonl") if "lr_factor" in row]
    assert [(row["step"], row["lr_factor"]) for row in rows] == [(1, 0.5), (2, 1.0)]
    assert not list((tmp_path / "cache").glob("tokenizers/*"))  # none was trained on the new text


def test_it_learns_the_new_text(tiny_run: Path, config, tmp_path: Path) -> None:
    rates = [f"training.lr_{group}=5e-3" for group in GROUPS]
    assert train(config(tiny_run, "training.scheduler_total_steps=40", *rates), run_dir=tmp_path / "run") == 0
    losses = [row["eval_loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in row]
    assert losses[-1] < losses[0] - 1  # 14 words of about 4 tokens; 40 steps take it from 6.1 to 3.6 nats


def test_it_resumes_with_the_same_bits_when_the_base_is_gone(
    tiny_run: Path, config, tmp_path: Path, monkeypatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_run, base)
    cfg = config(base)
    assert train(cfg, run_dir=tmp_path / "whole") == 0
    short = config(base, "training.max_steps=2")
    assert train(short, run_dir=tmp_path / "parts") == 0
    shutil.rmtree(base)
    assert train(cfg, run_dir=tmp_path / "parts") == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, two = (load_file(checkpoint.latest(tmp_path / run) / name) for run in ("whole", "parts"))
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_another_vocabulary_is_refused_before_any_text_is_read(tiny_run: Path, config, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(train_tokenizer(["some other text"] * 3, 300).to_json(), encoding="utf-8")
    with pytest.raises(UserError, match=r"another vocabulary; set training\.tokenizer=.*tokenizer\.json"):
        train(config(tiny_run, f"training.tokenizer={other}"), run_dir=tmp_path / "run")
    assert not (tmp_path / "cache").exists()
    same = checkpoint.latest(tiny_run) / "tokenizer.json"
    assert train(config(tiny_run, f"training.tokenizer={same}", "training.max_steps=1"), run_dir=tmp_path / "run") == 0


def test_balancing_by_a_bias_may_begin_on_weights_without_one_and_not_end(config, tmp_path: Path) -> None:
    def start(run: str, balance: str, steps: int, init_from: Path | str = "null") -> int:
        moe = "model.use_moe=true", "model.num_experts=2", "model.top_k_experts=1", f"model.moe_balance={balance}"
        return train(config(init_from, *moe, f"training.max_steps={steps}"), run_dir=tmp_path / run)

    assert start("first", "aux", 1) == 0
    assert start("second", "bias", 1, tmp_path / "first") == 0
    assert start("first", "bias", 3) == 0
    for run in ("first", "second"):
        weights = load_file(checkpoint.latest(tmp_path / run) / "model.safetensors")
        assert any(tensor.any() for name, tensor in weights.items() if name.endswith("select_bias"))
    assert start("first", "both", 4) == 0
    with pytest.raises(UserError, match=r"model\.moe_balance: both in the checkpoint, now aux, .* both keeps it"):
        start("first", "aux", 5)


def test_another_architecture_is_refused_with_names_and_shapes(tiny_run: Path, config, tmp_path: Path) -> None:
    changes = ["model.ffn_hidden_size=48", "model.layer_pattern=[retnet, mamba]"]
    with pytest.raises(UserError) as error:
        train(config(tiny_run, *changes), run_dir=tmp_path / "run")
    for part in (
        "holds another model",
        "layers.0.ffn.up.weight is [64, 32], the model's is [48, 32]",
        "layers.1.mixer.conv_weight is missing",
        "layers.1.mixer.qkv.weight is unknown",
        f"The model section that fits is in {checkpoint.latest(tiny_run) / 'config.yaml'}",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_another_function_of_the_same_shapes_is_named(tiny_run: Path, config, tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        assert train(config(tiny_run, "model.num_heads=4", "training.max_steps=1"), run_dir=tmp_path / "run") == 0
    assert "init_from: model.num_heads: 2 in the checkpoint, now 4" in caplog.text
    assert "model.hidden_size" not in caplog.text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "neither a run folder (checkpoints/) nor"),
        (lambda folder: (folder / "model.safetensors").unlink(), "neither a run folder (checkpoints/) nor"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"{}"), "model.safetensors: "),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json; put the one"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "is not a tokenizer.json"),
    ],
    ids=["no folder", "no weights", "weights cut short", "no tokenizer", "tokenizer cut short"],
)
def test_what_is_wrong_with_the_folder_is_said(
    tiny_run: Path, config, tmp_path: Path, spoil, message: str, capsys
) -> None:
    source = tmp_path / "exported"
    source.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copy(checkpoint.latest(tiny_run) / name, source / name)
    spoil(source)
    path = tmp_path / "cfg.yaml"
    path.write_text(config(source).to_yaml(), encoding="utf-8")
    assert main(["train", str(path), "--run-dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert message in err and str(source) in err and "Traceback" not in err


def test_the_story_of_the_readme(text: Path, tmp_path: Path, capsys) -> None:
    """ultra train mini; ultra train mini training.init_from=RUN training.local_parquet_dir=TEXT; ultra eval."""
    small = [f"model.{field}" for field in f"{SIZES} num_experts=2 ode_steps=1 factorized_embedding_dim=16".split()]
    small += [f"training.cache_dir={tmp_path / 'cache'}", "training.max_steps=2", "training.max_length=32"]
    small += ["training.eval_samples=4", "training.batch_size=2", "training.dataloader_workers=0"]
    base, run = tmp_path / "runs" / "base", tmp_path / "runs" / "own"
    assert main(["train", "mini", *small, "training.max_samples=200", "--run-dir", str(base)]) == 0
    own = [f"training.init_from={base}", f"training.local_parquet_dir={text}"]
    assert main(["train", "mini", *small, *own, "--run-dir", str(run)]) == 0
    end = [json.loads(line) for line in (base / "metrics.jsonl").read_text().splitlines()][-1]
    assert end["step"] == 2
    vocabularies = [Tokenizer.from_file(str(checkpoint.latest(r) / "tokenizer.json")).get_vocab() for r in (base, run)]
    assert vocabularies[0] == vocabularies[1]
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    assert json.loads(capsys.readouterr().out)["eval_loss"] > 0
