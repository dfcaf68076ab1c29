"""Where a norm stands in the encoder; its initial values may depend on it."""

from __future__ import annotations

from typing import Literal

Site = Literal["mixer", "ffn", "final", "head"]
