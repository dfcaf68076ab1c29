"""Which implementation of an op runs, and how ops are registered with torch.

An op names its backends per device in order of preference. The order of choice is: the `backend=` argument,
`use_backend(...)`, the environment variable ULTRA_BACKEND, then the first backend whose `why_not(...)` is None.
A backend asked for by name that cannot run raises `BackendUnavailable`; automatic fallback is logged once per reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, Literal, TypeVar, get_args

import torch

Backend = Literal["cuda", "triton", "native", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)
_Function = TypeVar("_Function", bound=Callable[..., Any])
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what kernels compute with, in float32
# The file of an op's folder that holds each backend.
_FILES = {"cuda": "cuda", "triton": "triton_kernels", "native": "native", "reference": "reference"}

log = logging.getLogger("ultra_kernels")
_forced: list[str] = []
_logged: set[tuple[str, str, str]] = set()
OPS: dict[str, Op] = {}


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run this call; the message says why and what would."""


class Op:
    """The backend table of one public op.

    `order` maps a device type to backend names, best first; "reference" ends every list and serves unlisted devices.
    `why_not` maps every backend but the reference to a function of the tensors and options that `choose` is given; it
    returns None when the backend can run such a call, otherwise the reason. It looks at metadata alone and imports
    nothing: torch.compile traces it. The backend's own file is imported when it first runs. `kernels` is the package of
    these files, where another op has them.
    """

    def __init__(
        self,
        name: str,
        package: str,
        order: Mapping[str, tuple[str, ...]],
        why_not: dict[str, Callable[..., str | None]],
        kernels: str | None = None,
    ) -> None:
        self.name, self.package, self.order, self._why_not = name, package, order, why_not
        self.kernels = kernels or package
        self._modules: dict[str, ModuleType] = {}
        self.names: tuple[str, ...] = tuple(dict.fromkeys(b for names in order.values() for b in names))
        OPS[name] = self

    def module(self, backend: str) -> ModuleType:
        """The file that holds `backend`."""
        found = self._modules.get(backend)
        if found is None:
            found = self._modules[backend] = importlib.import_module(f"{self.kernels}.{_FILES[backend]}")
        return found

    def why_not(self, backend: str, *args: Any) -> str | None:
        """None when `backend` can run a call with these arguments, otherwise the reason."""
        return None if backend == "reference" else self._why_not[backend](*args)

    def choose(self, backend: str | None, tensor: torch.Tensor, *args: Any) -> str:
        """The backend that runs a call whose first tensor is `tensor`. Raises BackendUnavailable, ValueError."""
        asked = backend or (_forced[-1] if _forced else None) or os.environ.get("ULTRA_BACKEND") or None
        if asked is not None and (backend is not None or asked in self.names):
            if asked not in BACKENDS:
                raise ValueError(f"{self.name}: unknown backend {asked!r}; known are {', '.join(BACKENDS)}")
            reason = (
                f"{self.name} has no such backend; it has {', '.join(self.names)}"
                if asked not in self.names
                else self.why_not(asked, tensor, *args)
            )
            if reason is not None:
                raise BackendUnavailable(f"{self.name}: backend {asked!r} cannot run this call: {reason}")
            return asked
        if asked is not None and asked not in BACKENDS:
            raise ValueError(f"ULTRA_BACKEND={asked!r} is unknown; known are {', '.join(BACKENDS)}")
        for name in self.order.get(tensor.device.type, ()):
            reason = self.why_not(name, tensor, *args)
            if reason is None:
                return name
            if not torch.compiler.is_compiling():
                _log_once(self.name, name, reason)
        return "reference"


def of_all(why_not: Callable[[torch.Tensor], str | None]) -> Callable[..., str | None]:
    """`why_not` of an op whose kernels read all of its tensors in place: the first reason that one of them gives."""

    def first_reason(*args: object) -> str | None:
        reasons = (why_not(t) for t in args if isinstance(t, torch.Tensor))
        return next((why for why in reasons if why is not None), None)

    return first_reason


def _log_once(op: str, backend: str, reason: str) -> None:
    if (op, backend, reason) not in _logged:
        _logged.add((op, backend, reason))
        log.info("%s: not on backend '%s': %s", op, backend, reason)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def triton_why_not(tensor: torch.Tensor, *args: Any, dtypes: tuple[torch.dtype, ...] = FLOATS) -> str | None:
    """The reasons common to all Triton backends: they need a CUDA tensor, or the interpreter on a CPU tensor, of one of
    `dtypes`."""
    if (reason := _triton_missing()) is not None:
        return str(reason)
    interpreted = tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if tensor.device.type != "cuda" and not interpreted:
        return f"Triton needs a CUDA tensor, this one is on {tensor.device.type} (TRITON_INTERPRET=1 runs it on a CPU)"
    if tensor.dtype not in dtypes:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return f"the Triton kernels take float32, bfloat16 and float16, not {dtype}; backend='reference' computes in it"
    return None


def triton_heads(largest: int) -> Callable[..., str | None]:
    """`why_not` of Triton kernels of heads q, k, v: one dtype, and head dimensions up to `largest`."""

    def why_not(q: torch.Tensor, k: torch.Tensor | None = None, v: torch.Tensor | None = None) -> str | None:
        if (reason := triton_why_not(q)) is not None:
            return reason
        if k is None or v is None:
            return None
        if k.dtype != q.dtype or v.dtype != q.dtype:
            return f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; cast them to one"
        if max(k.shape[-1], v.shape[-1]) > largest:
            return f"head dimensions are {k.shape[-1]} and {v.shape[-1]}, above {largest}; use more heads"
        return None

    return why_not


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every op that has backend `name` runs on it; others choose freely.

    Raises ValueError for an unknown name; a call that the backend cannot run raises BackendUnavailable.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known are {', '.join(BACKENDS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def available(device: str = "cpu") -> dict[str, dict[str, str | None]]:
    """op -> backend -> None when it can run float32 tensors on `device`, otherwise the reason."""
    try:
        probe = torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # what torch raises where it was built without the device
        reason = f"no tensor can be made on {device!r}: {str(error).splitlines()[0]}"
        return {name: dict.fromkeys(op.names, reason) for name, op in sorted(OPS.items())}
    return {name: {b: op.why_not(b, probe) for b in op.names} for name, op in sorted(OPS.items())}


_library = torch.library.Library("ultra_kernels", "DEF")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers torch.ops.ultra_kernels.<name> for every device and returns it. `fake` returns outputs without data.

    Plain define/impl costs a third of `torch.library.custom_op` per call, which counts for small tensors.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ultra_kernels::{name}", fake, lib=_library)
    return getattr(torch.ops.ultra_kernels, name).default


def define_constant(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """`define` for an op without a gradient: what it returns never requires one, whatever goes in.

    Plain tensors in eager mode skip torch's dispatcher, which costs 4 us a call: a third of a small product.
    """
    op = define(schema, implementation, fake)
    _library.impl(schema.split("(", 1)[0], torch.library.fallthrough_kernel, "Autograd")

    def call(tensor: torch.Tensor, *args: Any) -> Any:
        if torch.compiler.is_compiling() or type(tensor) is not torch.Tensor or torch._C._len_torch_dispatch_stack():
            return op(tensor, *args)
        return implementation(tensor, *args)

    return call


def _register_autograd(op: Any, setup_context: Callable[..., None], gradients: Callable[..., Any]) -> None:
    """Ties `gradients` to `op`. torch.library.register_autograd does the same at about twice the cost per call."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*args)
            setup_context(ctx, args, output)
            return output

        backward = staticmethod(gradients)

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            return Differentiable.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _library.impl(op.name().split("::")[1], autograd, "Autograd")


def define_differentiable(
    forward_schema: str,
    backward_schema: str,
    *,
    forward: Callable[..., Any],
    forward_fake: Callable[..., Any],
    backward: Callable[..., Any],
    backward_fake: Callable[..., Any],
    setup_context: Callable[..., None],
    gradients: Callable[..., Any],
    instead: str = "run it with backend='reference' to differentiate twice",
) -> tuple[Any, Any]:
    """Registers an op and its backward op and ties them together; differentiating the backward is refused.

    `setup_context(ctx, inputs, output)` saves what the backward needs; `gradients(ctx, *grad_outputs)` returns one
    gradient per input of the forward op. `instead` is what the refusal tells to do.
    """
    forward_op = define(forward_schema, forward, forward_fake)
    backward_op = define(backward_schema, backward, backward_fake)
    _register_autograd(forward_op, setup_context, gradients)
    _refuse_second_derivative(forward_op, backward_op, f"its backward is one op; {instead}")
    return forward_op, backward_op


def _refuse_second_derivative(forward_op: Any, backward_op: Any, reason: str) -> None:
    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{forward_op.name()} has no second derivative: {reason}.")

    torch.library.register_autograd(backward_op.name(), refuse, lib=_library)


def opaque(schema: str, fake: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Makes a function of tensors one op for torch.compile; an eager call runs, and differentiates, the function.

    For references whose steps depend on data or lengths, which a compiled graph could not hold or would hold for one
    length alone. `fake` returns the outputs without data; they are contiguous and alias no input. The op's backward
    runs the function again with a graph, which costs one more forward; a second derivative is refused.
    """
    name, rest = schema.split("(", 1)
    arguments = rest.rsplit(") ->", 1)[0]

    def decorate(function: _Function) -> _Function:
        def forward(*args: Any) -> Any:
            with torch.no_grad(), full_precision(args[0]):
                out = function(*args)
            return tuple(o.contiguous() for o in out) if isinstance(out, tuple) else out.contiguous()

        def backward(grads: list[torch.Tensor], needs: list[bool], *args: Any) -> list[torch.Tensor]:
            # Inside an op torch leaves autograd out.
            again = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
            with again, torch.enable_grad(), full_precision(args[0]):
                args = tuple(
                    a.detach().requires_grad_(n) if isinstance(a, torch.Tensor) else a
                    for a, n in zip(args, needs, strict=True)
                )
                out = function(*args)
                pairs = zip(out if isinstance(out, tuple) else (out,), grads, strict=True)
                outs, grads_of = zip(*((o, g) for o, g in pairs if o.requires_grad), strict=True)
                wanted = [a for a, n in zip(args, needs, strict=True) if n]
                found = torch.autograd.grad(outs, wanted, grads_of, allow_unused=True, materialize_grads=True)
            return [g.contiguous() for g in found]

        def backward_fake(grads: list[torch.Tensor], needs: list[bool], *args: Any) -> list[torch.Tensor]:
            return [a.new_empty(a.shape) for a, n in zip(args, needs, strict=True) if n]

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*(a for a in inputs if isinstance(a, torch.Tensor)))
            ctx.rest = [None if isinstance(a, torch.Tensor) else (a,) for a in inputs]

        def gradients(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            tensors, needs = iter(ctx.saved_tensors), list(ctx.needs_input_grad)
            args = [next(tensors) if a is None else a[0] for a in ctx.rest]
            found = iter(backward_op(list(grads), needs, *args))
            return tuple(next(found) if n else None for n in needs)

        forward_op = define(schema, forward, fake)
        backward_schema = f"{name}_backward(Tensor[] grads, bool[] needs, {arguments}) -> Tensor[]"
        backward_op = define(backward_schema, backward, backward_fake)
        _register_autograd(forward_op, setup_context, gradients)
        instead = "call it eagerly to differentiate twice"
        _refuse_second_derivative(forward_op, backward_op, f"torch.compile runs it as one op; {instead}")

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return forward_op(*args) if torch.compiler.is_compiling() else function(*args)

        return call  # type: ignore[return-value]

    return decorate


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Casts the operands of a matrix-like op to the autocast dtype where autocast is on, as torch's matmul does."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def full_precision(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """A block in which autocast leaves float32 products alone, for references that compute in float32 by contract."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)
