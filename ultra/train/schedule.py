"""The learning-rate schedule: one pure function of the step."""

from __future__ import annotations

import math

from ultra.config.training import TrainingConfig

WSD_DECAY = 0.2  # share of the run that decays; 10 to 20 % suffice (arXiv:2405.18392)
SECOND_PEAK = 0.25  # of the first stage's: "significantly lower" (arXiv:2504.12285)


def lr_factor(step: int, cfg: TrainingConfig, two_stage: bool = False) -> float:
    """What multiplies every group's rate in the optimizer step made after `step` finished ones, in (0, 1].

    With n = scheduler_total_steps, w = ceil(scheduler_warmup_ratio · n), p = (step − w) / (n − w):
      constant                     1, no warm-up
      linear_warmup_then_constant  (step + 1) / w below w, then 1
      cosine                       the same warm-up, then m + (1 − m) (1 + cos πp) / 2
      linear                       the same warm-up, then 1 − (1 − m) p
      wsd                          the same warm-up, then 1, and linear to m over the last fifth
    m = min_lr_ratio. From step n on a decaying schedule stays at m.

    two_stage (model.bitnet_two_stage): from step h = max(ceil(n / 2), w) on, 1/4 of the same schedule begun anew at h,
    without warm-up: p = (step − h) / (n − h). After Ma et al. 2025 (arXiv:2504.12285), who end weight decay at h too.
    """
    kind, total, floor = cfg.scheduler_type, cfg.scheduler_total_steps, cfg.min_lr_ratio
    begin, peak = warmup_steps(cfg), 1.0
    if step < begin:
        return (step + 1) / begin
    if two_stage and step >= second_stage(cfg):
        begin, peak = second_stage(cfg), SECOND_PEAK
    if kind in ("constant", "linear_warmup_then_constant"):
        return peak
    if step >= total:
        return peak * floor
    if kind == "cosine":
        progress = (step - begin) / (total - begin)
        return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
    if kind == "wsd":
        begin = max(begin, total - math.ceil(WSD_DECAY * total))
    return peak * (1 - (1 - floor) * max(step - begin, 0) / (total - begin))


def warmup_steps(cfg: TrainingConfig) -> int:
    """Steps over which the rates rise."""
    total = cfg.scheduler_total_steps
    return 0 if cfg.scheduler_type == "constant" else min(math.ceil(cfg.scheduler_warmup_ratio * total), total)


def second_stage(cfg: TrainingConfig) -> int:
    """The first step of the second stage of a run in two."""
    return max(math.ceil(cfg.scheduler_total_steps / 2), warmup_steps(cfg))


def travel(steps: int, cfg: TrainingConfig, two_stage: bool = False) -> float:
    """Sum of lr_factor over a run: times a rate, about how far Adam can move one weight."""
    return sum(lr_factor(step, cfg, two_stage) for step in range(steps))
