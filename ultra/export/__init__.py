"""Trained models in other forms."""

from ultra.export.ternary import Exported, save_ternary

__all__ = ["Exported", "save_ternary"]
