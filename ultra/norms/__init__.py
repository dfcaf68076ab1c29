"""The norms by their name in `norm_type`. Adding one: its file, and its line here."""

from __future__ import annotations

from typing import Any

from ultra.norms.derf import Derf
from ultra.norms.dynamic_tanh import DynamicTanh
from ultra.norms.layer_norm import LayerNorm

NORMS: dict[str, Any] = {"layer_norm": LayerNorm, "dynamic_tanh": DynamicTanh, "derf": Derf}
