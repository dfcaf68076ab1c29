"""Steps that must not move the weights: found on the device, diagnosed on the host."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ultra.data import Batch
from ultra.train.precision import autocast
from ultra_kernels import use_backend

log = logging.getLogger(__name__)

HISTORY = 128  # steps of the running median
SPIKE = 10.0  # a norm this many times the median is a spike, if it also exceeds inf_post_clip_threshold


class Gate:
    """Whether a step is bad: loss or gradient norm not finite, or the norm a spike.

    A spike exceeds both `threshold` and SPIKE times the running median. Decided on the device without a host
    sync. Only good norms enter the median: a NaN in it would make every later comparison false. The history
    is part of the checkpoint, so that a resumed run decides alike.
    """

    def __init__(self, threshold: float, device: torch.device) -> None:
        self.threshold = threshold
        self.norms = torch.full((HISTORY,), torch.nan, device=device)

    def __call__(self, loss: Tensor, norm: Tensor, step: int) -> Tensor:
        """0-d bool; `norm` is the global norm before clipping."""
        spike = (norm > self.threshold) & (norm > SPIKE * self.norms.nanmedian())
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm)) | spike
        slot = step % HISTORY
        self.norms[slot] = torch.where(bad, self.norms[slot], norm)
        return bad

    def state(self) -> list[float | None]:
        return [None if norm != norm else norm for norm in self.norms.tolist()]

    def load_state(self, norms: list[float | None]) -> None:
        values = [torch.nan if norm is None else norm for norm in norms]
        self.norms.copy_(torch.tensor(values, dtype=self.norms.dtype))


def documents(batch: Batch) -> Iterator[Batch]:
    """The labelled documents of a packed batch, one at a time."""
    borders = batch.cu_seqlens.tolist()
    for begin, end in pairwise(borders):
        labels = batch.labels[:, begin:end]
        labelled = int((labels != -100).sum())
        if labelled:
            yield dataclasses.replace(
                batch,
                input_ids=batch.input_ids[:, begin:end],
                labels=labels,
                cu_seqlens=torch.tensor([0, end - begin], dtype=torch.int32),
                max_seqlen=end - begin,
                num_labelled=labelled,
            )


def non_finite_documents(model: nn.Module, batches: list[Batch], device: torch.device) -> list[str]:
    """Where loss or gradient are not finite in fp32 on the reference ops, one document at a time.

    Leaves the gradients cleared. An empty answer means that data and weights are sound: a kernel or the mixed
    precision is at fault.
    """
    found = []
    for batch in batches:
        for number, document in enumerate(documents(batch)):
            moved = document.to(device)
            with use_backend("reference"), autocast(device, None):
                out = model(
                    moved.input_ids,
                    labels=moved.labels,
                    cu_seqlens=moved.cu_seqlens,
                    max_seqlen=moved.max_seqlen,
                )
                (out.loss_sum / moved.num_labelled + out.aux_loss).backward()
            grads = [param.grad for param in model.parameters() if param.grad is not None]
            if not (torch.isfinite(out.loss_sum) & torch.isfinite(torch.nn.utils.get_total_norm(grads))):
                found.append(f"document {number} of the micro-batch that begins at sample {batch.first_sample}")
            model.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def first_non_finite_module(
    model: nn.Module, batches: list[Batch], device: torch.device, dtype: torch.dtype | None
) -> str | None:
    """Name of the innermost module whose output is the first not finite one under the run's own backends."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(f"{name} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        for batch in batches:
            moved = batch.to(device)
            with autocast(device, dtype):
                model(
                    moved.input_ids,
                    labels=moved.labels,
                    cu_seqlens=moved.cu_seqlens,
                    max_seqlen=moved.max_seqlen,
                )
            if found:
                return found[0]
    finally:
        for handle in handles:
            handle.remove()
    return None


def dump(path: Path, model: nn.Module, batches: list[Batch]) -> None:
    """To look into a run that was stopped: the bad batches, and one line of numbers per parameter."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{i}.{name}": getattr(batch, name).contiguous()
        for i, batch in enumerate(batches)
        for name in ("input_ids", "labels", "cu_seqlens")
    }
    save_file(tensors, path / "batches.safetensors")
    with (path / "parameters.jsonl").open("w", encoding="utf-8") as file:
        for name, param in model.named_parameters():
            finite = torch.isfinite(param)
            largest = torch.where(finite, param, 0).abs().max().item() if param.numel() else 0.0
            row = {"name": name, "largest": largest, "not_finite": int((~finite).sum())}
            file.write(json.dumps(row) + "\n")
