"""Steps that must not move the weights: found on the device, diagnosed on the host."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ultra.data import Batch
from ultra.train.precision import autocast
from ultra_kernels import use_backend

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

    def bad(self, loss: Tensor, norm: Tensor) -> Tensor:
        """0-d bool; `norm` is the global norm before clipping."""
        spike = (norm > self.threshold) & (norm > SPIKE * self.norms.nanmedian())
        return ~(torch.isfinite(loss) & torch.isfinite(norm)) | spike

    def __call__(self, loss: Tensor, norm: Tensor, step: int) -> Tensor:
        """As `bad`; a good norm enters the history."""
        bad = self.bad(loss, norm)
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


@dataclasses.dataclass(frozen=True)
class Rerun:
    """A step made again without moving anything: its loss, gradient norm, and what of it is not finite."""

    loss: Tensor
    norm: Tensor
    found: list[str]


def rerun(
    model: nn.Module, batches: list[Batch], seeds: list[int], device: torch.device, dtype: torch.dtype | None
) -> Rerun:
    """The step as it was: the same micro-batches, dropout masks, backends and precision, the present weights.

    found: the innermost module whose output is the first that is not finite, or else the parameters whose
    gradients are not. Leaves the gradients cleared.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(f"{name} ({type(module).__name__})")

        return hook

    labelled = sum(batch.num_labelled for batch in batches)
    loss = torch.zeros((), device=device)
    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        for batch, seed in zip(batches, seeds, strict=True):
            torch.manual_seed(seed)
            loss = loss + accumulate(model, batch.to(device), dtype, labelled, len(batches))
    finally:
        for handle in handles:
            handle.remove()
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    norm = nn.utils.get_total_norm(list(grads.values()))
    if not found:
        found = [f"gradient of {name}" for name, grad in grads.items() if not bool(torch.isfinite(grad).all())]
    model.zero_grad(set_to_none=True)
    return Rerun(loss, norm, found)


def rerun_on_reference(model: nn.Module, batches: list[Batch], device: torch.device) -> Rerun:
    """The step in fp32 on the reference ops, one document at a time.

    found: the documents whose loss or gradient is not finite. None of them: data and weights are sound. Leaves the
    gradients cleared.
    """
    labelled = sum(batch.num_labelled for batch in batches)
    parts = [(batch.first_sample, n, part) for batch in batches for n, part in enumerate(documents(batch))]
    found: list[str] = []
    loss = norm = torch.zeros((), device=device)
    for first_sample, number, document in parts:
        with use_backend("reference"):
            part_loss = accumulate(model, document.to(device), None, labelled, len(parts))
        total = nn.utils.get_total_norm([param.grad for param in model.parameters() if param.grad is not None])
        if torch.isfinite(part_loss) & torch.isfinite(total):
            loss, norm = loss + part_loss, total
        else:
            found.append(f"document {number} of the micro-batch that begins at sample {first_sample}")
            model.zero_grad(set_to_none=True)
    model.zero_grad(set_to_none=True)
    return Rerun(loss, torch.full_like(norm, torch.nan) if found else norm, found)


def accumulate(model: nn.Module, batch: Batch, dtype: torch.dtype | None, labelled: int, parts: int) -> Tensor:
    """Add the gradient of one of `parts` pieces of a step with `labelled` labels; its share of the loss, detached."""
    with autocast(batch.input_ids.device, dtype):
        out = model(batch.input_ids, labels=batch.labels, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
    loss: Tensor = out.loss_sum.float() / labelled + out.aux_loss.float() / parts
    loss.backward()
    return loss.detach()


def dump(path: Path, model: nn.Module, batches: list[Batch], device: torch.device, dtype: torch.dtype | None) -> None:
    """To look into a run that was stopped: the bad batches, and figures per layer and per parameter.

    batches.safetensors: input_ids, labels and cu_seqlens of each micro-batch. layers.jsonl: every module's output in
    the forward pass of these batches. parameters.jsonl: every weight and its gradient.
    """
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{i}.{name}": getattr(batch, name).contiguous()
        for i, batch in enumerate(batches)
        for name in ("input_ids", "labels", "cu_seqlens")
    }
    save_file(tensors, path / "batches.safetensors")
    layers: list[dict[str, Any]] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor):
                layers.append({"name": name, "type": type(module).__name__, **figures(output)})

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        for batch in batches:
            accumulate(model, batch.to(device), dtype, batch.num_labelled, len(batches))
    finally:
        for handle in handles:
            handle.remove()
    parameters = [
        {"name": name, **figures(param)}
        | ({} if param.grad is None else {f"gradient_{key}": value for key, value in figures(param.grad).items()})
        for name, param in model.named_parameters()
    ]
    model.zero_grad(set_to_none=True)
    for name, rows in (("layers", layers), ("parameters", parameters)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (path / f"{name}.jsonl").write_text(text, encoding="utf-8")


@torch.no_grad()
def figures(tensor: Tensor) -> dict[str, float | int]:
    """Root mean square and largest magnitude of the finite values, and how many are not finite."""
    finite = torch.isfinite(tensor)
    values = torch.where(finite, tensor, 0).cpu().double()
    count = max(int(finite.sum()), 1)
    return {
        "rms": math.sqrt(values.square().sum().item() / count),
        "largest": values.abs().max().item() if values.numel() else 0.0,
        "not_finite": int((~finite).sum()),
    }
