"""Fixtures of several ops' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ultra_kernels import _native


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the C++ library in turn, as far as this CPU has it."""
    C = _native.load()
    if request.param not in C.isas():
        pytest.skip(f"this CPU has {C.isas()}")
    best = C.isa()
    C.set_isa(request.param)
    yield request.param
    C.set_isa(best)
