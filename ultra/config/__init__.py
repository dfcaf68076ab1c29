"""The YAML configuration: `load_config(path_or_preset, overrides)` and the models it returns.

The names below are imported on first use: the mixers import `ultra.config.fields`, and the models here import
the mixers, so an eager import would go round in a circle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultra.config.load import load_config, presets
    from ultra.config.model import UltraConfig
    from ultra.config.run import RunConfig
    from ultra.config.training import TrainingConfig
    from ultra.config.yaml12 import ConfigError

__all__ = ["ConfigError", "RunConfig", "TrainingConfig", "UltraConfig", "load_config", "presets"]

_HOME = {
    "ConfigError": "yaml12",
    "RunConfig": "run",
    "TrainingConfig": "training",
    "UltraConfig": "model",
    "load_config": "load",
    "presets": "load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ultra.config' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"ultra.config.{_HOME[name]}"), name)
