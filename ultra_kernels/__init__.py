"""Kernels for hybrid masked-language-model encoders: one public function per op, each with a PyTorch reference.

>>> from ultra_kernels import dyt
"""

from ._dispatch import BackendUnavailable, available, use_backend
from ._version import __version__
from .bidirectional_scan import bidirectional_scan
from .causal_conv1d import causal_conv1d
from .dyt import dyt
from .hope_attention import hope_attention
from .retention import retention, retention_step
from .rotary import rotary
from .selective_scan import selective_scan
from .sigmoid_attention import sigmoid_attention

__all__ = [
    "BackendUnavailable",
    "__version__",
    "available",
    "bidirectional_scan",
    "causal_conv1d",
    "dyt",
    "hope_attention",
    "retention",
    "retention_step",
    "rotary",
    "selective_scan",
    "sigmoid_attention",
    "use_backend",
]
