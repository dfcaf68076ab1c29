"""training.compile: the encoder's training step as one compiled graph."""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager

import torch
from torch import nn

from ultra.config.run import RunConfig
from ultra.train.precision import autocast

log = logging.getLogger(__name__)

BACKEND = "inductor"
DYNAMIC = ("input_ids", "labels", "cu_seqlens", "max_seqlen")


def compile_encoder(model: nn.Module, cfg: RunConfig, device: torch.device, dtype: torch.dtype | None) -> bool:
    """Compiles `model` in place, on a made-up batch of the run's size; parameter names stay. False when it failed.

    A compiler that fails (there is none on the PATH, say) is logged with its reason, and the model stays eager.
    """
    started = time.perf_counter()
    log.info("compiling the encoder: one graph for forward and backward, a minute or more")
    model.compile(fullgraph=True, backend=BACKEND)
    was_training = model.training
    model.train()
    try:
        with any_size():
            longest = cfg.training.max_length
            batch = made_up_batch(cfg.training.batch_size * longest, longest, device)
            with autocast(device, dtype):
                out = model(**batch)
            (out.loss_sum.float() + out.aux_loss.float()).backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler can raise; a fault of the model itself shows in the first step
        model._compiled_call_impl = None  # type: ignore[assignment]  # torch has no way back from Module.compile
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        log.warning(
            "training.compile: the compiler failed after %.0f s, training goes on without it: %s. On the CPU it needs "
            "g++ or clang++; training.compile=false skips the attempt",
            time.perf_counter() - started, reason,
        )  # fmt: skip
        return False
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    log.info("compiled in %.1f s", time.perf_counter() - started)
    return True


def any_size() -> AbstractContextManager[None]:
    """A block in which a graph is compiled for all lengths and numbers of sequences, not for its first batch's."""
    patch: AbstractContextManager[None] = torch.compiler.config.patch(  # type: ignore[attr-defined]
        dynamic_sources=",".join(f"L['{name}']" for name in DYNAMIC)
    )
    return patch


def made_up_batch(tokens: int, longest: int, device: torch.device) -> dict[str, torch.Tensor | int]:
    """Packed rows of `tokens` ids, cut after `longest` - 1 and then every `longest`; every seventh token is labelled.

    The generated code's loops are cut for about this size.
    """
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    labels = torch.full_like(ids, -100)
    labels[:, ::7] = 0
    borders = [0, *range(longest - 1, tokens, longest), tokens]
    cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=device)
    return {"input_ids": ids, "labels": labels, "cu_seqlens": cu_seqlens, "max_seqlen": longest}
