"""Device mistakes, found without a GPU: every op's reference and whole models on a pretended device.

A tensor of device "pretend" is a wrapper around a CPU tensor that computes there and refuses to meet one, as CUDA's do.
So a tensor that was made on the CPU by oversight fails here, and the values can still be compared. A device stays with
its process, so test_other_device.py runs this file in one of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import ultra_kernels
from ultra_kernels._dispatch import OPS
from ultra_kernels._testing import Case, cases, compare, run

aten = torch.ops.aten
# A copy between devices is how tensors are meant to move.
COPIES = (aten.copy_.default, aten._to_copy.default)


class Pretended(torch.Tensor):
    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretended:
        shape = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        out = torch.Tensor._make_wrapper_subclass(cls, inner.shape, device="pretend:0", **shape)
        out.inner = inner
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def tolist(self) -> list[Any]:
        return self.inner.tolist()


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, Pretended)]
    # 0-d CPU tensors may join any device's, as numbers do; an index may lie on the CPU
    strangers = [t for t in tensors if not isinstance(t, Pretended) and t.dim() and "index" not in func.__name__]
    if ours and strangers and func not in COPIES:
        raise RuntimeError(f"{func}: tensors of two devices, pretend and cpu")
    asked = kwargs.get("device")
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    out = func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
    stays = torch.device(asked).type == "pretend" if asked is not None else bool(ours)
    if func is aten.copy_.default or (func._schema.is_mutable and func._schema.name.endswith("_")):
        return args[0]
    # a wrapper cannot say that its tensor is read as conjugate or negative
    wrap = lambda t: Pretended(t.resolve_conj().resolve_neg()) if isinstance(t, torch.Tensor) else t  # noqa: E731
    return tree_map(wrap, out) if stays else out


def unwrapped(value: Any) -> Any:
    return value.inner if isinstance(value, Pretended) else value


class Factories(TorchDispatchMode):
    """Tensors made on the device without one of its tensors as an argument."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class Literals(TorchFunctionMode):
    """torch.tensor and torch.as_tensor of numbers copy below the level at which modes see it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "pretend":
            return func(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


@pytest.fixture
def pretend() -> Iterator[None]:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices in Python")
    if torch._C._get_privateuse1_backend_name() != "pretend":
        module = backend_registration._DummyBackendModule()
        module.get_amp_supported_dtype = lambda: [torch.bfloat16]
        backend_registration._setup_privateuseone_for_python_backend("pretend", module)
    with Literals(), Factories():
        yield


def moved(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pretended(value.detach()).requires_grad_(value.requires_grad)
    if dataclasses.is_dataclass(value):
        fields = {f.name: moved(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(n, c, id=f"{n}-{c.name}") for n in OPS for c in cases(n) if c.elements < 4_000 and not c.bench],
)
def test_references_stay_on_their_device(name: str, case: Case, pretend: None) -> None:
    function = getattr(ultra_kernels, name)
    inputs = case.inputs(torch.float32)
    want = run(function, inputs, "reference", torch.float32)
    got = run(function, {n: moved(v) for n, v in inputs.items()}, "reference", torch.float32)
    assert got.keys() == want.keys()
    assert [n for n, t in got.items() if not isinstance(t, Pretended)] == []
    values = {n: t.inner for n, t in got.items()}
    wrong = compare(values, {n: t.double() if t.is_floating_point() else t for n, t in want.items()}, case.reduction)
    assert not wrong, "\n".join(wrong)


def test_a_tensor_of_the_cpu_is_noticed(pretend: None) -> None:
    x = moved(torch.ones(3))
    assert (x + torch.arange(3, device=x.device)).inner.tolist() == [1, 2, 3]
    with pytest.raises(RuntimeError, match="two devices"):
        x + torch.arange(3)


@pytest.mark.parametrize("preset", ["quickstart", "frankenstein", "mini"])
def test_models_stay_on_their_device(preset: str, pretend: None) -> None:
    """Forward and backward of a shrunken preset with all mixers, over packed sequences of several lengths."""
    pytest.importorskip("pydantic")
    from ultra.config import load_config
    from ultra.mixers import MIXERS
    from ultra.model import build_model

    sizes = "vocab_size=64 hidden_size=16 num_heads=2 retention_heads=2 ffn_hidden_size=24 ode_steps=1 dropout=0.0"
    # functional_call puts the own parameters back before a recomputation would run
    sizes += " gradient_checkpointing=false ode_checkpoint=none"
    pattern = f"layer_pattern=[{', '.join(MIXERS)}]"
    overrides = [pattern, f"num_layers={len(MIXERS)}", *sizes.split()]
    torch.manual_seed(0)
    model = build_model(load_config(preset, [f"model.{o}" for o in overrides]))
    ids = torch.randint(5, 64, (1, 24))
    labels = torch.where(torch.rand(1, 24) < 0.3, ids, -100)
    cu_seqlens = torch.tensor([0, 9, 10, 24], dtype=torch.int32)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())

    def loss_and_gradients(tensors: dict[str, torch.Tensor], *batch: torch.Tensor) -> list[torch.Tensor]:
        ids, labels, cu_seqlens = batch
        options = {"labels": labels, "cu_seqlens": cu_seqlens, "max_seqlen": 14}
        with ultra_kernels.use_backend("reference"):
            loss = torch.func.functional_call(model, tensors, (ids,), options).loss
        leaves = [t for t in tensors.values() if t.requires_grad]
        return [loss, *torch.autograd.grad(loss, leaves, allow_unused=True)]

    want = loss_and_gradients(tensors, ids, labels, cu_seqlens)
    got = loss_and_gradients({n: moved(t) for n, t in tensors.items()}, *map(moved, (ids, labels, cu_seqlens)))
    assert want[0].isfinite()
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a.inner, b, rtol=1e-3, atol=1e-5)
