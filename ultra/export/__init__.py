"""Trained models in other forms."""

from ultra.export.ternary import Exported, save_ternary
from ultra.export.weights import save_weights

__all__ = ["Exported", "save_ternary", "save_weights"]
