"""Text to masked batches: source, token ids, shards in cache_dir, windows, batches."""

from __future__ import annotations

from ultra.data.cache import Interrupted
from ultra.data.loader import Batch, CorpusData, open_data

__all__ = ["Batch", "CorpusData", "Interrupted", "open_data"]
