"""The feed-forward networks; `use_moe` picks."""

from __future__ import annotations

from typing import Any

from ultra.ffn.dense import DenseFFN
from ultra.ffn.moe import MoEFFN

FFNS: dict[str, Any] = {"dense": DenseFFN, "moe": MoEFFN}
