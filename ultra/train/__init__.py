"""Training: `train(cfg, run_dir=...)`; trainer.py holds the loop."""

from ultra.train.trainer import train

__all__ = ["train"]
