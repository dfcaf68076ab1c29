"""The encoder: `build_model(cfg)`, and `model(input_ids, attention_mask, labels)`."""

from .encoder import Encoder, MLMOutput, build_model

__all__ = ["Encoder", "MLMOutput", "build_model"]
