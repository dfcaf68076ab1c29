"""The masked cross-entropy against torch's own, with blocks of rows forced small so that every path runs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ultra_kernels import masked_linear_cross_entropy
from ultra_kernels.masked_linear_cross_entropy import reference


def inputs(T=23, D=7, V=19, dtype=torch.float64, seed=0, labelled=0.4):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (T,), generator=g)
    labels[torch.rand(T, generator=g) >= labelled] = -100
    if labelled and T > 1:
        labels[0], labels[1] = 0, V - 1  # the first and the last class
    return hidden, weight, labels, bias


def literal(hidden, weight, labels, bias, z_loss=0.0, reduction="mean"):
    """Every row multiplied, torch's cross_entropy, the z-loss written out."""
    logits = hidden @ weight.t() + (0 if bias is None else bias)
    kept = labels != -100
    z = logits[kept].logsumexp(-1) ** 2
    return functional.cross_entropy(logits, labels, reduction=reduction) + z_loss * (
        z.mean() if reduction == "mean" else z.sum()
    )


@pytest.mark.parametrize("block_rows", [1, 4, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.03])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_cross_entropy_in_float64(monkeypatch, block_rows, z_loss, reduction, with_bias):
    hidden, weight, labels, bias = inputs()
    monkeypatch.setattr(reference, "BLOCK_BYTES", block_rows * weight.shape[0] * 8)
    bias = bias if with_bias else None
    leaves = [t for t in (hidden, weight, bias) if t is not None]
    got = masked_linear_cross_entropy(hidden, weight, labels, bias, z_loss=z_loss, reduction=reduction)
    want = literal(hidden, weight, labels, bias, z_loss, reduction)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    # An upstream factor: the gradients are made in the forward and scaled in the backward.
    for a, b in zip(torch.autograd.grad(3 * got, leaves), torch.autograd.grad(3 * want, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_gradcheck():
    hidden, weight, labels, bias = inputs(T=6, D=3, V=5)
    assert torch.autograd.gradcheck(
        lambda h, w, b: masked_linear_cross_entropy(h, w, labels, b, z_loss=0.1), (hidden, weight, bias)
    )


def test_ignored_rows_play_no_part():
    hidden, weight, labels, bias = inputs()
    kept = labels != -100
    assert 0 < int(kept.sum()) < len(labels)
    spoiled = torch.where(kept[:, None], hidden, torch.full_like(hidden, float("nan"))).detach().requires_grad_()
    loss = masked_linear_cross_entropy(spoiled, weight, labels, bias)
    alone = masked_linear_cross_entropy(hidden[kept], weight, labels[kept], bias)
    assert torch.equal(loss, alone)
    (dhidden,) = torch.autograd.grad(loss, spoiled)
    assert torch.equal(dhidden[~kept], torch.zeros_like(dhidden[~kept]))
    assert (dhidden[kept] != 0).all()


def test_ignore_index_may_be_a_class():
    hidden, weight, labels, _ = inputs()
    labels = labels.clamp(min=0)
    assert (labels == 0).any()
    got = masked_linear_cross_entropy(hidden, weight, labels, ignore_index=0)
    torch.testing.assert_close(got, functional.cross_entropy(hidden @ weight.t(), labels, ignore_index=0))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("T", [0, 5])
def test_without_a_labelled_row_loss_and_gradients_are_zero(reduction, T):
    hidden, weight, labels, bias = inputs(T=T, dtype=torch.float32, labelled=0)
    loss = masked_linear_cross_entropy(hidden, weight, labels, bias, z_loss=0.1, reduction=reduction)
    assert loss.item() == 0
    for leaf, grad in zip((hidden, weight, bias), torch.autograd.grad(loss, (hidden, weight, bias)), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_large_logits_stay_finite_and_right():
    hidden, weight, labels, bias = inputs(dtype=torch.float32)
    hidden = (hidden * 300).detach().requires_grad_()
    loss = masked_linear_cross_entropy(hidden, weight, labels, bias)
    want = literal(hidden.double(), weight.double(), labels, bias.double())
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, weight, bias)))


def test_batched_shape_and_float32_loss():
    hidden, weight, labels, bias = inputs(T=24, dtype=torch.bfloat16)
    flat = masked_linear_cross_entropy(hidden, weight, labels, bias)
    batched = masked_linear_cross_entropy(hidden.view(2, 12, -1), weight, labels.view(2, 12), bias)
    assert flat.dtype == torch.float32 and torch.equal(flat, batched)


def test_autocast_multiplies_in_the_autocast_dtype():
    hidden, weight, labels, bias = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = masked_linear_cross_entropy(hidden, weight, labels, bias)
    assert torch.equal(got, masked_linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels, bias))
    grads = torch.autograd.grad(got, (hidden, weight, bias))
    assert all(g.dtype == torch.float32 for g in grads)


def test_nothing_the_size_of_all_logits_is_kept(monkeypatch):
    """With blocks of 4 rows of 19 logits the largest tensor ever made is the weight's gradient."""
    hidden, weight, labels, bias = inputs(T=200, labelled=1.0, dtype=torch.float32)
    monkeypatch.setattr(reference, "BLOCK_BYTES", 4 * weight.shape[0] * 4)
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    with Sizes(), torch.no_grad():
        masked_linear_cross_entropy(hidden, weight, labels, bias)
    assert max(sizes) <= hidden.numel() < 200 * weight.shape[0]


def test_no_grad_computes_no_gradient():
    hidden, weight, labels, bias = inputs()
    with torch.no_grad():
        quiet = masked_linear_cross_entropy(hidden, weight, labels, bias)
        arguments = (hidden, weight, labels, bias, -100, 0.0, True, False, hidden.dtype)
        returned = reference.masked_linear_cross_entropy(*arguments)
    assert torch.equal(quiet, masked_linear_cross_entropy(hidden, weight, labels, bias).detach())
    assert [t.numel() for t in returned] == [1, 0, 0, 0, 1]


def test_compiles_without_a_graph_break():
    hidden, weight, labels, bias = inputs(dtype=torch.float32)
    compiled = torch.compile(masked_linear_cross_entropy, fullgraph=True, backend="aot_eager")
    leaves = (hidden, weight, bias)
    a = torch.autograd.grad(masked_linear_cross_entropy(hidden, weight, labels, bias, z_loss=0.1), leaves)
    b = torch.autograd.grad(compiled(hidden, weight, labels, bias, z_loss=0.1), leaves)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_kept_graph_may_be_differentiated_again(dtype):
    """A backward after which the graph goes overwrites what was saved; one that keeps it may not."""
    hidden, weight, labels, bias = inputs(dtype=dtype)
    leaves, loss = (hidden, weight, bias), masked_linear_cross_entropy(hidden, weight, labels, bias)
    first = torch.autograd.grad(loss, leaves, torch.full_like(loss, 3.0), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, leaves, torch.full_like(loss, 6.0), retain_graph=True)
    last = torch.autograd.grad(loss, leaves, torch.full_like(loss, 12.0))
    for a, b, c, before in zip(first, second, last, kept, strict=True):
        assert torch.equal(a, before) and torch.equal(b, 2 * a) and torch.equal(c, 4 * a)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_the_weights_gradient_is_not_copied():
    """The one that the forward made is scaled in place and becomes the parameter's."""
    hidden, weight, labels, bias = inputs(dtype=torch.float32)
    loss = masked_linear_cross_entropy(hidden, weight, labels, bias, reduction="sum")
    assert loss.grad_fn.saved_tensors[2].shape == weight.shape
    address = loss.grad_fn.saved_tensors[2].data_ptr()
    (loss / 7).backward()
    assert weight.grad.data_ptr() == address


def test_second_derivative_is_refused():
    hidden, weight, labels, bias = inputs()
    loss = masked_linear_cross_entropy(hidden, weight, labels, bias)
    (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


def test_errors_name_the_argument():
    hidden, weight, labels, bias = inputs()
    with pytest.raises(ValueError, match=r"weight has shape \(19, 6\).*\(V, 7\)"):
        masked_linear_cross_entropy(hidden, weight[:, :6], labels)
    with pytest.raises(ValueError, match=r"labels are torch.int32"):
        masked_linear_cross_entropy(hidden, weight, labels.int())
    with pytest.raises(ValueError, match=r"bias has shape \(18,\)"):
        masked_linear_cross_entropy(hidden, weight, labels, bias[:18])
    with pytest.raises(ValueError, match="'none' is unknown"):
        masked_linear_cross_entropy(hidden, weight, labels, reduction="none")
    labels[0] = 19
    with pytest.raises(ValueError, match=r"label 19 is outside 0..18"):
        masked_linear_cross_entropy(hidden, weight, labels)
