"""What the op suite (tests/ops) and bench share: the description of a case, and derived tolerances."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from ._dispatch import OPS

Inputs = dict[str, Any]  # keyword arguments of the public op; float tensors in float64


@dataclass(frozen=True)
class Case:
    """One shape of one op.

    make: seeded inputs as keyword arguments of the public function, float tensors in float64, any layout.
    small: names of parameters that stay float32 beside half-precision inputs.
    constant: names of float tensors that get no gradient.
    reduction: the longest sum behind any output or gradient element; tolerances grow with its square root.
    scales: for gradients that are one number, a sum of signed terms that may cancel: the sum's root mean square.
        Errors are measured against at least this, since the value says nothing of the size of the terms.
    roundings: intermediates on the way to a result that are rounded to a half-precision dtype under test.
    through_half: float32 results (outputs by name, gradients as d<name>) computed from intermediates that are rounded
        to the dtype under test, such as operands of a half-precision matrix product.
    elements: input and output elements that must cross memory once (bytes = elements × item size).
    bytes_at: those bytes for an item size, where some elements have another one.
    int8: the forward's product may be one of int8, the backward's not.
    exps: exponentials that the forward cannot do without.
    large: for the bench on a GPU alone; a comparison with float64 on the CPU would take minutes.
    slow: for the bench alone; it would take many seconds for each backend.
    refused_by: backends that do not take such a shape.
    """

    name: str
    make: Callable[[torch.Generator], Inputs]
    reduction: int
    elements: int
    flops: int
    exps: int = 0
    small: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    bench: bool = False
    large: bool = False
    slow: bool = False
    refused_by: tuple[str, ...] = ()
    scales: dict[str, float] = field(default_factory=dict)
    roundings: int = 1
    through_half: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = field(default=(torch.float32, torch.bfloat16, torch.float16))
    bytes_at: Callable[[int], int] | None = None
    int8: bool = False

    def nbytes(self, dtype: torch.dtype) -> int:
        return self.elements * dtype.itemsize if self.bytes_at is None else self.bytes_at(dtype.itemsize)

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
        """The inputs at `dtype`, leaves with requires_grad, strides kept."""
        raw = self.make(torch.Generator().manual_seed(seed))
        out: Inputs = {}
        for name, value in raw.items():
            if isinstance(value, torch.Tensor):
                if value.is_floating_point():
                    half = dtype in (torch.bfloat16, torch.float16)
                    value = value.to(device, torch.float32 if half and name in self.small else dtype)
                    value.requires_grad_(name not in self.constant)
                else:
                    value = value.to(device)
            elif hasattr(value, "to"):  # a dataclass of tensors, such as PackedTernary
                value = value.to(device)
            out[name] = value
        return out


def cases(name: str, *, large: bool = False, slow: bool = False) -> list[Case]:
    """The cases of one op: CASES in its folder's cases.py, a dict by op name where a folder holds several ops."""
    found = importlib.import_module(f"{OPS[name].package}.cases").CASES
    listed = found[name] if isinstance(found, dict) else found
    return [c for c in listed if (large or not c.large) and (slow or not c.slow)]


def widened(inputs: Inputs) -> Inputs:
    """The same numbers in float64 on the CPU: what the reference is given, so that rounding of inputs cancels."""
    out: Inputs = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value.detach().to("cpu", torch.float64).requires_grad_(value.requires_grad)
        elif hasattr(value, "to"):
            value = value.to("cpu")
        out[name] = value
    return out


def flat(result: Any) -> list[torch.Tensor]:
    """The tensors of nested tuples, in order."""
    if isinstance(result, tuple):
        return [t for part in result for t in flat(part)]
    return [result] if isinstance(result, torch.Tensor) else []


def run(
    function: Callable[..., Any], inputs: Inputs, backend: str, dtype: torch.dtype, seed: int = 1
) -> dict[str, torch.Tensor]:
    """Outputs and gradients of one call, as name -> tensor.

    The cotangents are seeded and rounded to `dtype`, the dtype under test, so that two backends get the same numbers.
    """
    outputs = flat(function(**inputs, backend=backend))
    named = {f"out{i}": o for i, o in enumerate(outputs)}
    leaves = {n: v for n, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    differentiable = [o for o in outputs if o.requires_grad]
    if leaves and differentiable:
        g = torch.Generator().manual_seed(seed)
        cotangents = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(dtype).to(o) for o in differentiable]
        grads = torch.autograd.grad(differentiable, list(leaves.values()), cotangents, allow_unused=True)
        named |= {f"d{n}": g for n, g in zip(leaves, grads, strict=True) if g is not None}
    return {n: t.detach() for n, t in named.items()}


def tolerance(
    expected: torch.Tensor, dtype: torch.dtype, reduction: int, least_scale: float = 0.0, roundings: int = 1
) -> float:
    """Largest accepted absolute error: rounding to `dtype` of the result and of intermediates, plus float32 sums.

    A sum of n terms of one size, rounded at every step, errs by about eps·sqrt(n); 4 covers the spread of the maximum
    over many elements.
    """
    scale = max(least_scale, float(expected.abs().max()) if expected.numel() else 0.0)
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    halves = (1 + roundings) * eps if dtype != torch.float32 else 0.0
    return max(scale, 1e-30) * (halves + 4 * eps32 * max(reduction, 1) ** 0.5)


def errors(
    got: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    reduction: int,
    scales: Mapping[str, float] = MappingProxyType({}),
    rounded: Mapping[str, torch.dtype] = MappingProxyType({}),
    roundings: int = 1,
) -> dict[str, tuple[float, float]]:
    """Name -> (largest absolute error, its tolerance) of the floating-point tensors; NaN where one is not finite."""
    return {
        name: (
            float((value.cpu().double() - expected[name]).abs().max()) if value.numel() else 0.0,
            tolerance(expected[name], rounded.get(name, value.dtype), reduction, scales.get(name, 0.0), roundings),
        )
        for name, value in got.items()
        if value.is_floating_point() and value.shape == expected[name].shape
    }


def compare(
    got: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    reduction: int,
    scales: Mapping[str, float] = MappingProxyType({}),
    rounded: Mapping[str, torch.dtype] = MappingProxyType({}),
    roundings: int = 1,
) -> list[str]:
    """One line per tensor that is missing, misshapen, not finite, or further off than its tolerance.

    `rounded`: for results whose intermediates have a narrower dtype than they have themselves, that dtype.
    """
    wrong = [f"{n}: missing" for n in expected if n not in got]
    found = errors(got, expected, reduction, scales, rounded, roundings)
    for name, value in got.items():
        want = expected[name]
        if value.shape != want.shape:
            wrong.append(f"{name}: shape {tuple(value.shape)}, expected {tuple(want.shape)}")
        elif name not in found:
            wrong += [] if torch.equal(value.cpu(), want) else [f"{name}: integers differ"]
        else:
            error, limit = found[name]
            if not error <= limit:
                wrong.append(f"{name}: error {error:.3g} > {limit:.3g} (values up to {float(want.abs().max()):.3g})")
    return wrong
