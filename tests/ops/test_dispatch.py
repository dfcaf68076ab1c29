"""The order of choice, refusals, torch.compile and second derivatives, on one small op."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import ultra_kernels
from ultra_kernels import BackendUnavailable, _native, dyt, use_backend
from ultra_kernels._dispatch import OPS
from ultra_kernels.dyt.op import OP

needs_native = pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    leaves = torch.randn(5, 33), torch.tensor([0.5]), torch.randn(33), torch.randn(33)
    return tuple(t.to(dtype).requires_grad_() for t in leaves)


def test_order_argument_then_context_then_environment(monkeypatch):
    x = inputs()[0]
    monkeypatch.setenv("ULTRA_BACKEND", "reference")
    assert OP.choose(None, x) == "reference"
    with use_backend("triton"), pytest.raises(BackendUnavailable, match=r"TRITON_INTERPRET|not installed"):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        OP.choose(None, x)
    with use_backend("triton"):
        assert OP.choose("reference", x) == "reference"


def test_unknown_names_are_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"'fast'.*known are cuda, triton"):
        dyt(*inputs(), backend="fast")
    monkeypatch.setenv("ULTRA_BACKEND", "fast")
    with pytest.raises(ValueError, match="fast"):
        dyt(*inputs())


@needs_native
def test_native_runs_by_default_on_a_cpu(monkeypatch):
    monkeypatch.delenv("ULTRA_BACKEND", raising=False)
    assert OP.choose(None, inputs()[0]) == "native"
    assert OP.choose(None, inputs(torch.float64)[0]) == "reference"
    assert ultra_kernels.available()["dyt"]["native"] is None
    assert "no tensor can be made on 'nowhere'" in str(ultra_kernels.available("nowhere")["dyt"]["reference"])
    assert ultra_kernels.available()["dyt"]["reference"] is None


@needs_native
def test_compiles_without_a_graph_break():
    args = inputs()
    eager = torch.autograd.grad(dyt(*args).square().sum(), args)
    compiled = torch.compile(lambda *a: dyt(*a), fullgraph=True, backend="aot_eager")
    for a, b in zip(eager, torch.autograd.grad(compiled(*args).square().sum(), args), strict=True):
        torch.testing.assert_close(a, b)


@needs_native
def test_second_derivative_is_refused():
    args = inputs()
    (first,) = torch.autograd.grad(dyt(*args, backend="native").sum(), args[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


def test_reference_differentiates_twice():
    args = inputs(torch.float64)
    assert torch.autograd.gradgradcheck(lambda *a: dyt(*a, backend="reference"), args)


def test_shape_errors_name_the_argument():
    x, alpha, weight, bias = inputs()
    with pytest.raises(ValueError, match=r"weight has shape \(32,\).*\(33,\)"):
        dyt(x, alpha, weight[:32], bias)


def test_a_build_in_the_clone_hides_no_installed_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pip install .` leaves ultra.egg-info in the clone, which Python finds first when it starts there."""
    for folder, name in (("clone", "ultra.egg-info/PKG-INFO"), ("site", "ultra-0.1.0.dist-info/METADATA")):
        (tmp_path / folder / name).parent.mkdir(parents=True)
        (tmp_path / folder / name).write_text("Metadata-Version: 2.1\nName: ultra\nVersion: 0.1.0\n")
    (tmp_path / "site" / "ultra-0.1.0.dist-info" / "RECORD").write_text("ultra_kernels/__init__.py,,\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "clone"), str(tmp_path / "site")])
    assert _native.folders()[1:] == [tmp_path / "site" / "ultra_kernels"]


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if "triton" in op.names])
def test_triton_kernels_refuse_what_they_would_round(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They compute in float32, whatever they load."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert OPS[name].why_not("triton", torch.empty(4, 4, 4, 4)) is None
    assert "not float64" in (OPS[name].why_not("triton", torch.empty(4, 4, 4, 4, dtype=torch.float64)) or "")
