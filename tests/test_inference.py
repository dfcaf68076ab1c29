from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import ultra
from ultra.data import open_data
from ultra.errors import UserError
from ultra.inference import EMBED_TOKENS, Pipeline, batches_by_length, unigram_loss

TEXT = "The function returns a [MASK] of strings."


@pytest.fixture(scope="module")
def pipeline(tiny_run: Path) -> Pipeline:
    return ultra.load(tiny_run)


@pytest.fixture
def run_copy(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


# Which checkpoint


def test_a_run_and_its_newest_checkpoint_are_the_same_model(tiny_run: Path, pipeline: Pipeline) -> None:
    newest = tiny_run / "checkpoints" / "step-00000006"
    assert pipeline.folder == newest
    assert ultra.load(newest).fill_mask(TEXT) == pipeline.fill_mask(TEXT)
    older = ultra.load(tiny_run / "checkpoints" / "step-00000003")
    assert older.fill_mask(TEXT) != pipeline.fill_mask(TEXT)


def test_loading_leaves_the_random_stream_alone(tiny_run: Path) -> None:
    before = torch.get_rng_state()
    ultra.load(tiny_run)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_damaged_newest_checkpoint_is_passed_over(run_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip_byte(run_copy / "checkpoints" / "step-00000006" / "model.safetensors")
    assert ultra.load(run_copy).folder.name == "step-00000003"
    assert "step-00000006 is damaged" in caplog.text


def test_best_is_the_lowest_held_out_loss(run_copy: Path) -> None:
    newest = run_copy / "checkpoints" / "step-00000006"
    state = json.loads((newest / "state.json").read_text())
    assert {step for _, step in state["best"]} == {3, 6}
    state["best"] = [[1.0, 3], [2.0, 6]]
    (newest / "state.json").write_text(json.dumps(state))
    manifest = json.loads((newest / "manifest.json").read_text())
    content = (newest / "state.json").read_bytes()
    manifest["files"]["state.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (newest / "manifest.json").write_text(json.dumps(manifest, indent=1))

    assert ultra.load(run_copy).folder == newest
    assert ultra.load(run_copy, "best").folder.name == "step-00000003"
    flip_byte(run_copy / "checkpoints" / "step-00000003" / "model.safetensors")
    assert ultra.load(run_copy, "best").folder == newest  # the second best is whole


def test_no_best_checkpoint_was_kept(run_copy: Path) -> None:
    for name in ("step-00000006", "step-00000003"):
        flip_byte(run_copy / "checkpoints" / name / "config.yaml")
    with pytest.raises(UserError, match="no whole checkpoint"):
        ultra.load(run_copy, "best")


# Fill-mask


def test_fill_mask_ranks_the_tokens_of_each_mask(pipeline: Pipeline) -> None:
    v = pipeline.vocabulary
    text = "a [MASK] of [MASK]"
    masks = pipeline.fill_mask(text, top_k=10**6)
    ids = [v.cls_id, *v.encode_prompt(text), v.sep_id]
    with torch.inference_mode():
        logits = pipeline.model(torch.tensor([ids])).logits[0]
    places = [i for i, token in enumerate(ids) if token == v.mask_id]
    assert len(masks) == len(places) == 2
    for ranked, place in zip(masks, places, strict=True):
        assert len(ranked) == (~v.special).sum()  # every token but the special ones, and no unused row of the table
        values = [p for _, p in ranked]
        assert values == sorted(values, reverse=True)
        assert math.isclose(sum(values), 1, rel_tol=1e-5)
        row = logits[place, : v.size].masked_fill(torch.from_numpy(v.special), -torch.inf)
        assert ranked[0][0] == v.tokenizer.decode([int(row.argmax())])
        # float32 softmax of two ways to compute one row: a few units in the last place
        np.testing.assert_allclose(values[0], row.softmax(-1).max(), rtol=1e-5)
    assert pipeline.fill_mask(text, top_k=3) == [ranked[:3] for ranked in masks]


def test_the_mask_stands_for_a_word_with_its_space(pipeline: Pipeline) -> None:
    v = pipeline.vocabulary
    tokens = [v.tokenizer.decode([i]) for i in v.encode_prompt("a [MASK] of") if i != v.mask_id]
    assert tokens == ["a", " of"]


def test_fill_mask_up_to_the_trained_length(pipeline: Pipeline) -> None:
    limit = pipeline.cfg.training.max_length - 2
    assert pipeline.max_tokens == limit
    filler = "(" * (limit - 1)
    assert len(pipeline.vocabulary.encode_prompt(f"{filler}[MASK]")) <= limit
    pipeline.fill_mask(f"{filler}[MASK]")
    with pytest.raises(UserError, match=rf"takes {limit} \(training\.max_length={limit + 2}"):
        pipeline.fill_mask("é ö " * limit + "[MASK]")


@pytest.mark.parametrize("text", ["", "no mask here", "[mask]"])
def test_fill_mask_needs_a_mask(pipeline: Pipeline, text: str) -> None:
    with pytest.raises(UserError, match=r"write \[MASK\]"):
        pipeline.fill_mask(text)


def test_fill_mask_top_k_is_positive(pipeline: Pipeline) -> None:
    with pytest.raises(UserError, match="top_k=0"):
        pipeline.fill_mask(TEXT, top_k=0)


# Embeddings


def test_embedding_is_the_mean_of_the_last_hidden_states(pipeline: Pipeline) -> None:
    texts = ["one", "two words and then some more", "x"]
    vectors = pipeline.embed(texts)
    assert vectors.dtype == np.float32
    assert vectors.shape == (3, pipeline.cfg.model.hidden_size)
    v = pipeline.vocabulary
    for text, vector, first in zip(texts, vectors, pipeline.embed(texts, pooling="cls"), strict=True):
        ids = torch.tensor([[v.cls_id, *v.encode_documents([text])[0].tolist(), v.sep_id]])
        with torch.inference_mode():
            hidden = pipeline.model(ids).last_hidden_state[0].numpy()
        # entries are of order 1 and sums of at most some ten terms: 1e-5 is a hundred float32 roundings
        np.testing.assert_allclose(vector, hidden.mean(0), atol=1e-5)
        np.testing.assert_allclose(first, hidden[0], atol=1e-5)


def test_a_text_does_not_depend_on_its_neighbours(pipeline: Pipeline) -> None:
    texts = ["word " * n for n in (1, 9, 3, 9, 30)]
    together, alone = pipeline.embed(texts), np.stack([pipeline.embed(text)[0] for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(pipeline.embed(texts[::-1])[::-1], together, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_a_long_text_is_cut_and_said_so(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    long = "(a" * 200
    cut = pipeline.embed(["short", long])[1]
    assert "1 of 2 texts are cut to the first 62 tokens" in caplog.text
    np.testing.assert_allclose(cut, pipeline.embed(long + "and other words")[0], atol=1e-6)


def test_special_tokens_in_a_text_to_embed_are_characters(pipeline: Pipeline) -> None:
    assert pipeline.vocabulary.mask_id not in pipeline.vocabulary.encode_documents(["a [MASK] b"])[0]
    assert np.abs(pipeline.embed("a [MASK] b") - pipeline.embed("a b")).max() > 1e-4


def test_what_cannot_be_embedded(pipeline: Pipeline) -> None:
    assert pipeline.embed([]).shape == (0, 32)
    for texts in ("", ["fine", " \n"]):
        with pytest.raises(UserError, match="empty"):
            pipeline.embed(texts)
    with pytest.raises(UserError, match="pooling='max'"):
        pipeline.embed("text", pooling="max")  # type: ignore[arg-type]


def test_batches_by_length_hold_every_text_once_and_respect_the_limit() -> None:
    lengths = [1 + 37 * i % 500 for i in range(300)] + [EMBED_TOKENS + 1]
    batches = batches_by_length(lengths)
    assert sorted(i for batch in batches for i in batch) == list(range(301))
    assert all(len(b) == 1 or sum(lengths[i] for i in b) <= EMBED_TOKENS for b in batches)
    assert len(batches) <= 2 + 2 * sum(lengths) / EMBED_TOKENS
    assert batches_by_length([]) == []


# Evaluation


def test_evaluate_repeats_the_numbers_of_training(tiny_run: Path, pipeline: Pipeline) -> None:
    trained = json.loads((tiny_run / "metrics.jsonl").read_text().splitlines()[-1])
    found = pipeline.evaluate()
    assert trained["step"] == 6
    for key in ("eval_loss", "eval_mask_loss", "eval_accuracy", "eval_tokens"):
        assert found[key] == pytest.approx(trained[key], rel=1e-6), key
    assert found["perplexity"] == pytest.approx(math.exp(trained["eval_loss"]))
    assert (found["windows"], found["tokens"]) == (10, 10 * 64)
    fewer = pipeline.evaluate(samples=3)
    assert (fewer["windows"], fewer["tokens"]) == (3, 3 * 64)
    assert fewer["eval_loss"] != found["eval_loss"]
    with pytest.raises(UserError, match="samples=0"):
        pipeline.evaluate(samples=0)


def test_unigram_loss_against_counting_one_by_one(pipeline: Pipeline) -> None:
    data = open_data(pipeline.cfg)
    counts = data.train_token_counts().astype(float)
    size = int((~data.vocabulary.special).sum())
    cost = []
    for batch in data.eval_batches():
        for shown, label in zip(batch.input_ids[0].tolist(), batch.labels[0].tolist(), strict=True):
            if label != -100 and shown == data.mask_id:
                cost.append(-math.log((counts[label] + 1) / (counts.sum() + size)))
    data.close()
    assert pipeline.evaluate()["unigram_loss"] == pytest.approx(sum(cost) / len(cost), rel=1e-9)


def test_unigram_loss_without_masks_is_nan() -> None:
    assert math.isnan(unigram_loss([], np.ones(3), np.ones(3, dtype=bool), mask_id=0))
