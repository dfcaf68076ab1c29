"""Held-out evaluation: fixed windows and fixed masks, so that numbers of different steps and runs compare."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ultra.data import Batch
from ultra.errors import UserError
from ultra.train.precision import autocast
from ultra.train.processes import Processes

ALONE = Processes()
ROWS = 4096  # labelled rows per cross-entropy call: bounds the fp32 copy of their logits


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    mask_id: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    processes: Processes = ALONE,
) -> dict[str, Any] | None:
    """Mean over labelled tokens: eval_loss (cross-entropy, nats), eval_accuracy (of the most probable token),
    and eval_mask_loss over those of them that the input shows as [MASK] (NaN if there is none).

    Returns None when `should_stop` turned true on the way. The model's training mode is restored. Several processes
    share the batches, and return the same.
    """
    if should_stop():
        return None
    batches = itertools.islice(batches, processes.rank, None, processes.world_size)
    started, was_training = time.perf_counter(), model.training
    loss = mask_loss = 0.0
    tokens = masked = correct = 0.0
    model.eval()
    try:
        for batch in batches:
            if should_stop():
                return None
            batch = batch.to(device, non_blocking=True)
            with autocast(device, dtype):
                out = model(
                    batch.input_ids,
                    labels=batch.labels,
                    cu_seqlens=batch.cu_seqlens,
                    max_seqlen=batch.max_seqlen,
                )
                logits = out.logits  # [M, V]
            chosen = batch.labels != -100
            labels, is_mask = batch.labels[chosen], batch.input_ids[chosen] == mask_id
            for rows, target, hidden in zip(*(t.split(ROWS) for t in (logits, labels, is_mask)), strict=True):
                losses = F.cross_entropy(rows.float(), target, reduction="none")
                loss += losses.sum().item()
                mask_loss += losses[hidden].sum().item()
                correct += int((rows.argmax(-1) == target).sum())
            tokens += labels.numel()
            masked += int(is_mask.sum())
    finally:
        model.train(was_training)
    loss, mask_loss, tokens, masked, correct = processes.total(loss, mask_loss, tokens, masked, correct)
    if tokens == 0:
        raise UserError("there is no held-out document to evaluate on; raise training.val_fraction, or bring more text")
    return {
        "eval_loss": loss / tokens,
        "eval_mask_loss": mask_loss / masked if masked else float("nan"),
        "eval_accuracy": correct / tokens,
        "eval_tokens": int(tokens),
        "eval_seconds": round(time.perf_counter() - started, 3),
    }
