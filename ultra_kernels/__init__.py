"""Kernels for hybrid masked-language-model encoders: one public function per op, each with a PyTorch reference.

>>> from ultra_kernels import dyt
"""

from ._dispatch import BackendUnavailable, available, use_backend
from ._version import __version__
from .bidirectional_scan import bidirectional_scan
from .bitlinear import bitlinear
from .causal_conv1d import causal_conv1d
from .derf import derf
from .dyt import dyt
from .hope_attention import hope_attention
from .layer_norm import layer_norm
from .masked_linear_cross_entropy import masked_linear_cross_entropy
from .moe_ffn import MoEStats, moe_ffn
from .retention import retention, retention_step
from .rotary import rotary
from .selective_scan import selective_scan
from .sigmoid_attention import sigmoid_attention
from .ternary import (
    PackedTernary,
    pack_ternary,
    quantize_ternary,
    ternary_linear,
    ternary_matmul,
    unpack_ternary,
)

__all__ = [
    "BackendUnavailable",
    "MoEStats",
    "PackedTernary",
    "__version__",
    "available",
    "bidirectional_scan",
    "bitlinear",
    "causal_conv1d",
    "derf",
    "dyt",
    "hope_attention",
    "layer_norm",
    "masked_linear_cross_entropy",
    "moe_ffn",
    "pack_ternary",
    "quantize_ternary",
    "retention",
    "retention_step",
    "rotary",
    "selective_scan",
    "sigmoid_attention",
    "ternary_linear",
    "ternary_matmul",
    "unpack_ternary",
    "use_backend",
]
