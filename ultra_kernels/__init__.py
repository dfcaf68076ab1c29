"""Kernels for hybrid masked-language-model encoders: one public function per op, each with a PyTorch reference.

>>> from ultra_kernels import dyt
"""

from ._dispatch import BackendUnavailable, available, use_backend
from ._version import __version__
from .dyt import dyt

__all__ = ["BackendUnavailable", "__version__", "available", "dyt", "use_backend"]
