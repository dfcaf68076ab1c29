"""The mixers by their name in `layer_pattern`. Adding one: its file, and its line here."""

from __future__ import annotations

from typing import Any

from ultra.mixers.mamba import Mamba
from ultra.mixers.ode import Ode
from ultra.mixers.retnet import RetNet
from ultra.mixers.sigmoid_attn import SigmoidAttention
from ultra.mixers.standard_attn import StandardAttention
from ultra.mixers.titan_attn import TitanAttention

MIXERS: dict[str, Any] = {
    "retnet": RetNet,
    "mamba": Mamba,
    "ode": Ode,
    "titan_attn": TitanAttention,
    "standard_attn": StandardAttention,
    "sigmoid_attn": SigmoidAttention,
}
