"""Fixtures of several ops' tests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from ultra_kernels import _native

try:
    import triton
    from triton.runtime import interpreter
except ImportError:
    triton = None

if triton and triton.knobs.runtime.interpret:
    # Half of the interpreter's time, in scans: at every call of a function within a kernel it looks through all of
    # triton.language for what to replace, replaced or not, and it takes each sum of integers twice.
    tl = triton.language

    @functools.cache
    def languages(fn: Callable[..., object]) -> list[ModuleType]:
        return [module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())]

    def call(self: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
        if any(tl.core.is_builtin(module.load) for module in languages(self.fn)):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


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
