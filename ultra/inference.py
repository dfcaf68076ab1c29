"""A trained model at work: fill-mask, embeddings, held-out evaluation."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ultra.config.load import load_config
from ultra.config.run import RunConfig
from ultra.data import Batch, open_data
from ultra.data.tokenizer import Vocabulary, load_tokenizer
from ultra.errors import UserError
from ultra.export.ternary import linear_bytes, read_model
from ultra.model import Encoder, build_model
from ultra.train import checkpoint
from ultra.train.evaluation import evaluate
from ultra.train.precision import amp_dtype, autocast, cpu_has_bf16, pick_device

log = logging.getLogger(__name__)

EMBED_TOKENS = 8192  # tokens per forward pass of `embed`: enough to fill a CPU or a small GPU

Which = Literal["latest", "best"]


def load(path: str | Path, which: Which = "latest", device: str = "auto") -> Pipeline:
    """The model of a run folder, of one checkpoint folder or of an export, ready for use.

    which: of a run folder, the newest whole checkpoint, or the one with the lowest held-out loss; damaged ones
    are passed over. device: auto, cpu, cuda or mps. Raises UserError where there is no whole checkpoint.
    """
    folder = find_checkpoint(Path(path), which)
    missing = [name for name in ("config.yaml", "tokenizer.json") if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: no {' and no '.join(missing)} beside the weights")
    cfg = load_config(folder / "config.yaml")
    vocabulary = load_tokenizer(folder)
    if checkpoint.is_ternary(folder):
        return Pipeline(read_model(folder, cfg), vocabulary, cfg, folder, pick_device(device))
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten: leave the caller's stream alone
        model = build_model(cfg)
    checkpoint.copy_into(model, checkpoint.read_tensors(folder, "model.safetensors"), folder)
    return Pipeline(model, vocabulary, cfg, folder, pick_device(device))


def load_ternary(path: str | Path, device: str = "auto") -> Pipeline:
    """The model of an export with ternary weights, as `load` gives it too, but nothing else.

    path: a folder that `ultra export --format ternary` or `ultra.export.save_ternary` wrote. device: auto, cpu, cuda
    or mps. The matrices stay at 2 bits a weight and are multiplied in integers, everything else is float32, whatever
    training.use_amp says. Raises UserError for a damaged folder, or another kind of one.
    """
    folder = find_checkpoint(Path(path), "latest")
    if not checkpoint.is_ternary(folder):
        raise UserError(
            f"{path}: its weights are not ternary; `ultra export {path} --format ternary OUT` makes them so, "
            "ultra.load takes them as they are"
        )
    return load(folder, device=device)


def find_checkpoint(path: Path, which: Which) -> Path:
    """The checkpoint folder that `path` means. Raises UserError."""
    if which not in ("latest", "best"):
        raise UserError(f"which={which!r}: it must be 'latest' or 'best'")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run folder or one of its checkpoints")
    newest = checkpoint.resolve(path, ternary=True)
    if which == "latest" or newest == path:
        return newest
    best = sorted(checkpoint.read_state(newest)["best"])
    for _, step in best:
        folder = checkpoint.folder(path, step)
        if folder == newest or (reason := checkpoint.damage(folder)) is None:
            return folder
        log.warning("checkpoint %s is damaged and passed over: %s", folder, reason)
    raise UserError(
        f"{path}: no whole checkpoint is among the best ({len(best)} recorded; "
        f"training.num_best_checkpoints keeps them); the latest is {newest}"
    )


class Pipeline:
    """A model, its vocabulary and its configuration."""

    def __init__(
        self, model: Encoder, vocabulary: Vocabulary, cfg: RunConfig, folder: Path, device: torch.device
    ) -> None:
        self.model = model.to(device).eval()
        self.vocabulary, self.cfg, self.folder, self.device = vocabulary, cfg, folder, device
        # As in training, except on a CPU without that type, and that integer products gain nothing from half precision.
        lacking = device.type == "cpu" and (cfg.training.amp_dtype == "fp16" or not cpu_has_bf16())
        packed = linear_bytes(model)[0] > 0
        self.dtype = None if lacking or packed else amp_dtype(cfg.training, device)

    @property
    def max_tokens(self) -> int:
        """Longest text in tokens, without [CLS] and [SEP]."""
        return self.cfg.training.max_length - 2

    def fill_mask(self, text: str, top_k: int = 5) -> list[list[tuple[str, float]]]:
        """For each mask token in `text`, in order: the `top_k` most probable (token, probability).

        A token is given as the text it stands for, with the space before it if it starts a word. Probabilities
        are over all tokens but the special ones, which are never predicted. Raises UserError for a text
        without a mask token or longer than the model was trained for.
        """
        if top_k < 1:
            raise UserError(f"top_k={top_k}: it must be at least 1")
        v = self.vocabulary
        ids = v.encode_prompt(text)
        if v.mask_id not in ids:
            mask = v.tokenizer.id_to_token(v.mask_id)
            raise UserError(f"the text has no mask token: write {mask} where a word is to be filled in")
        if len(ids) > self.max_tokens:
            raise UserError(
                f"the text has {len(ids)} tokens; this model takes {self.max_tokens} "
                f"(training.max_length={self.cfg.training.max_length} with [CLS] and [SEP]): shorten it "
                "around the mask"
            )
        row = torch.tensor([[v.cls_id, *ids, v.sep_id]], device=self.device)
        labels = torch.where(row == v.mask_id, row, -100)  # only the logits of labelled rows are computed
        with torch.inference_mode(), autocast(self.device, self.dtype):
            logits = self.model(row, labels=labels).logits[:, : v.size].float()
        special = torch.from_numpy(v.special).to(self.device)
        probabilities = logits.masked_fill(special, -math.inf).softmax(-1)
        best = probabilities.topk(min(top_k, int((~special).sum())), dim=-1)
        return [
            [(self._readable(token), p) for token, p in zip(tokens, values, strict=True)]
            for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def embed(self, texts: str | Iterable[str], pooling: Literal["mean", "cls"] = "mean") -> np.ndarray:
        """Embeddings float32 `[n, hidden_size]`, one row for each of `texts` (a string is one text).

        pooling mean: over the last hidden states of all the text's tokens, [CLS] and [SEP] included; cls: that of
        [CLS]. Special tokens in a text are plain characters here. A text longer than the model was trained for
        is cut, with a warning. Raises UserError for an empty text.
        """
        if pooling not in ("mean", "cls"):
            raise UserError(f"pooling={pooling!r}: it must be 'mean' or 'cls'")
        texts = [texts] if isinstance(texts, str) else list(texts)
        encoded = self.vocabulary.encode_documents(texts)
        if empty := [str(i) for i, ids in enumerate(encoded, start=1) if len(ids) == 0 or not texts[i - 1].strip()]:
            shown = ", ".join(empty[:8]) + (" ..." if len(empty) > 8 else "")
            raise UserError(f"nothing to embed: text {shown} of {len(texts)} is empty")
        if long := sum(len(ids) > self.max_tokens for ids in encoded):
            log.warning(
                "%d of %d texts are cut to the first %d tokens (training.max_length=%d)",
                long, len(texts), self.max_tokens, self.cfg.training.max_length,
            )  # fmt: skip
        cls, sep = [self.vocabulary.cls_id], [self.vocabulary.sep_id]
        rows = [np.concatenate((cls, ids[: self.max_tokens], sep)) for ids in encoded]
        out = np.empty((len(rows), self.cfg.model.hidden_size), dtype=np.float32)
        for numbers in batches_by_length([len(row) for row in rows]):
            lengths = torch.tensor([len(rows[i]) for i in numbers])
            ends = lengths.cumsum(0)
            ids = torch.from_numpy(np.concatenate([rows[i] for i in numbers]))[None].to(self.device)
            borders = torch.cat((ends.new_zeros(1), ends)).int().to(self.device)
            with torch.inference_mode(), autocast(self.device, self.dtype):
                states = self.model(ids, cu_seqlens=borders, max_seqlen=int(lengths.max())).last_hidden_state
            hidden = states[0].float()
            if pooling == "cls":
                vectors = hidden[borders[:-1].long()]
            else:
                owner = torch.repeat_interleave(torch.arange(len(numbers)), lengths).to(self.device)
                sums = hidden.new_zeros(len(numbers), hidden.shape[1]).index_add(0, owner, hidden)
                vectors = sums / lengths[:, None].to(self.device)
            out[numbers] = vectors.cpu().numpy()
        return out

    def evaluate(self, samples: int | None = None) -> dict[str, Any]:
        """Held-out numbers on `samples` windows (None: training.eval_samples) of the run's validation documents,
        masked as in training's own evaluation.

        eval_loss, eval_accuracy: over all labelled tokens (eval_tokens of them); perplexity = exp(eval_loss);
        eval_mask_loss: over those shown as [MASK]; unigram_loss: what these cost under the counts of the
        training tokens; windows and tokens read. Opens the run's data source, and fills its token cache where
        it is gone. Raises UserError.
        """
        if samples is not None and samples < 1:
            raise UserError(f"samples={samples}: it must be at least 1")
        t = self.cfg.training
        changes = {
            "eval_samples": samples or t.eval_samples,
            # the vocabulary that the weights know, whatever the source would give by now
            "tokenizer": str(self.folder / "tokenizer.json"),
            "prefer_local_cache": True,
        }
        data = open_data(self.cfg.model_copy(update={"training": t.model_copy(update=changes)}))
        try:
            windows, batches = data.eval_windows(), list(data.eval_batches())
            counts = data.train_token_counts(wait=False)
        finally:
            data.close()
        row = evaluate(self.model, batches, mask_id=data.mask_id, device=self.device, dtype=self.dtype)
        assert row is not None  # nothing stops it
        return {
            "eval_loss": row["eval_loss"],
            "eval_mask_loss": row["eval_mask_loss"],
            "eval_accuracy": row["eval_accuracy"],
            "perplexity": math.exp(min(row["eval_loss"], 700.0)),  # exp(710) is beyond float64
            "unigram_loss": unigram_loss(batches, counts, ~self.vocabulary.special, data.mask_id),
            "windows": windows,
            "tokens": sum(batch.input_ids.numel() for batch in batches),
            "eval_tokens": row["eval_tokens"],
        }

    def _readable(self, token: int) -> str:
        text = self.vocabulary.tokenizer.decode([token])
        # a byte that is no character by itself decodes to U+FFFD, and some tokens to nothing
        return str(self.vocabulary.tokenizer.id_to_token(token)) if text in ("", "\ufffd") else text


def batches_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """The numbers of the texts, longest first, in batches of at most EMBED_TOKENS tokens (or one text)."""
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or lengths[i] > room:
            batches.append([])
            room = EMBED_TOKENS
        batches[-1].append(i)
        room -= lengths[i]
    return batches


def unigram_loss(batches: Iterable[Batch], counts: np.ndarray, ordinary: np.ndarray, mask_id: int) -> float:
    """Mean of -ln p over the labels at [MASK] positions, p_i = (counts_i + 1) / Σ over ordinary ids.

    NaN without any. The added one gives a token that the training documents lack a chance.
    """
    smoothed = np.where(ordinary, counts + 1.0, 0.0)
    with np.errstate(divide="ignore"):
        cost = -np.log(smoothed / smoothed.sum())
    labels = [b.labels[(b.labels != -100) & (b.input_ids == mask_id)].numpy() for b in batches]
    hidden = np.concatenate(labels) if labels else np.empty(0, dtype=np.int64)
    return float(cost[hidden].mean()) if len(hidden) else math.nan
