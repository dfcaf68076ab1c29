"""Device and mixed precision of a run."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ultra.config.training import TrainingConfig
from ultra.errors import UserError

GROWTH_INTERVAL = 2000  # overflow-free steps before the scale doubles, torch.amp.GradScaler's default


def pick_device(name: str) -> torch.device:
    """The torch device of training.device; auto takes cuda, then mps, then cpu. Raises UserError."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, present in there.items() if present)
    if not there[name]:
        usable = ", ".join(device for device, present in there.items() if present)
        raise UserError(f"training.device: {name} is not available here; use auto or one of: {usable}")
    return torch.device(name)


def amp_dtype(cfg: TrainingConfig, device: torch.device) -> torch.dtype | None:
    """The autocast type, or None without use_amp. auto: bf16 on a CPU and on GPUs that have it, else fp16."""
    if not cfg.use_amp:
        return None
    if cfg.amp_dtype == "fp16" and device.type == "cpu":
        raise UserError("training.amp_dtype: fp16 needs a GPU; on the CPU use bf16 or auto")
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    use_bf16 = cfg.amp_dtype == "bf16" or (cfg.amp_dtype == "auto" and has_bf16)
    return torch.bfloat16 if use_bf16 else torch.float16


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[None]:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


class LossScale:
    """Dynamic loss scale for fp16, kept on the device so that no step waits for the host; 1 for other types.

    Halves on overflow, doubles after GROWTH_INTERVAL steps without one.
    """

    def __init__(self, dtype: torch.dtype | None, device: torch.device) -> None:
        self.active = dtype is torch.float16
        self.value = torch.tensor(65536.0 if self.active else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, overflow: Tensor) -> None:
        if not self.active:
            return
        good = torch.where(overflow, 0.0, self.good_steps + 1)
        grow = good >= GROWTH_INTERVAL
        self.value = torch.where(overflow, self.value / 2, torch.where(grow, self.value * 2, self.value))
        self.good_steps = torch.where(grow, 0.0, good)
