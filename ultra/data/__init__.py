"""Text to masked batches: source, token ids, shards in cache_dir, windows, batches.

The names below are imported on first use: the tokenising processes import modules of this package and must not wait
for torch, and neither must the commands that only fill or look at a cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultra.data.cache import Interrupted
    from ultra.data.loader import Batch, CorpusData, open_data

__all__ = ["Batch", "CorpusData", "Interrupted", "open_data"]

_HOME = {"Batch": "loader", "CorpusData": "loader", "Interrupted": "cache", "open_data": "loader"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ultra.data' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"ultra.data.{_HOME[name]}"), name)
