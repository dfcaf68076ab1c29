"""Device and mixed precision of a run."""

from __future__ import annotations

import contextlib
import logging
import platform

import torch
from torch import Tensor

from ultra.config.training import TrainingConfig
from ultra.errors import UserError

log = logging.getLogger(__name__)

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


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 numbers itself.

    Elsewhere torch's products of them take 8 times as long as those of float32, with their gradients 55 times.
    """
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def amp_dtype(cfg: TrainingConfig, device: torch.device) -> torch.dtype | None:
    """The autocast type; None is float32, without use_amp or where nothing narrower is faster.

    auto is bf16 where there is hardware for it, else fp16 on a GPU and float32 on a CPU.
    """
    if not cfg.use_amp:
        return None
    if device.type != "cpu":
        has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if cfg.amp_dtype == "bf16" or (cfg.amp_dtype == "auto" and has_bf16) else torch.float16
    if cfg.amp_dtype == "fp16":
        raise UserError("training.amp_dtype: fp16 needs a GPU; on the CPU use bf16 or auto")
    if cpu_has_bf16():
        return torch.bfloat16
    if cfg.amp_dtype == "auto":
        log.info("training.amp_dtype: this processor has no products of bfloat16, so auto is float32")
        return None
    log.warning(
        "training.amp_dtype: this processor has no products of bfloat16; auto, in float32, is many times faster"
    )
    return torch.bfloat16


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
