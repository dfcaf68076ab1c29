"""The learning-rate schedule: one pure function of the step."""

from __future__ import annotations

import math

from ultra.config.training import TrainingConfig

WSD_DECAY = 0.2  # share of the run that decays; 10 to 20 % suffice (arXiv:2405.18392)


def lr_factor(step: int, cfg: TrainingConfig) -> float:
    """What multiplies every group's rate in the optimizer step made after `step` finished ones, in (0, 1].

    With n = scheduler_total_steps, w = ceil(scheduler_warmup_ratio · n), p = (step − w) / (n − w):
      constant                     1, no warm-up
      linear_warmup_then_constant  (step + 1) / w below w, then 1
      cosine                       the same warm-up, then m + (1 − m) (1 + cos πp) / 2
      linear                       the same warm-up, then 1 − (1 − m) p
      wsd                          the same warm-up, then 1, and linear to m over the last fifth
    m = min_lr_ratio. From step n on a decaying schedule stays at m.
    """
    kind, total, floor = cfg.scheduler_type, cfg.scheduler_total_steps, cfg.min_lr_ratio
    if kind == "constant":
        return 1.0
    warmup = min(math.ceil(cfg.scheduler_warmup_ratio * total), total)
    if step < warmup:
        return (step + 1) / warmup
    if kind == "linear_warmup_then_constant":
        return 1.0
    if step >= total:
        return floor
    if kind == "cosine":
        progress = (step - warmup) / (total - warmup)
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
    begin = warmup if kind == "linear" else max(warmup, total - math.ceil(WSD_DECAY * total))
    if step < begin:
        return 1.0
    return 1 - (1 - floor) * (step - begin) / (total - begin)


def travel(steps: int, cfg: TrainingConfig) -> float:
    """Sum of lr_factor over a run: times a rate, about how far Adam can move one weight."""
    return sum(lr_factor(step, cfg) for step in range(steps))
