"""BitLinear as an op over backends: what it saves, which weights it quantises again, what it refuses.

One backend is a few lines of PyTorch in this file, so that this runs everywhere; the others run where they can.
"""

from __future__ import annotations

import copy
import gc
import types
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ultra_kernels import BackendUnavailable, bitlinear
from ultra_kernels.bitlinear import op as bitlinear_op
from ultra_kernels.bitlinear.cases import grid_tokens, ternary_weights
from ultra_kernels.bitlinear.op import OP, groups
from ultra_kernels.bitlinear.reference import quantize_tokens
from ultra_kernels.bitlinear.reference import quantize_weight as reference_weight

HERE = "cuda"  # the name that this file's backend takes: bitlinear has no CUDA C++


def quantize_weight(weight, scale):
    if weight.ndim == 3:
        return tuple(torch.stack(parts) for parts in zip(*(quantize_weight(w, scale) for w in weight), strict=True))
    codes, gamma = reference_weight(weight, scale)
    return codes.to(torch.int8), gamma.float()


def forward(x, quantised, gamma, N, bias, norm_weight, ends, dtype):
    if ends is not None:
        found = [
            forward(x[own], quantised[e], gamma[e], N, None if bias is None else bias[e], norm_weight, None, dtype)
            for e, own in groups(ends)
        ]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
    x, rstd = x.float(), x.new_empty(0, dtype=torch.float32)
    if norm_weight is not None:
        rstd = (x.square().mean(-1) + 1e-6).rsqrt()
        x = x * rstd[:, None] * norm_weight.float()
    codes, step = quantize_tokens(x)
    y = (codes @ quantised.float().t()) * (step * gamma)
    return (y if bias is None else y + bias).to(dtype), codes.to(torch.int8), step[:, 0], rstd


def backward(dy, codes, step, rstd, x, quantised, gamma, weight_shape, norm_weight, ends, wants):
    if ends is not None:
        rows = (dy, codes, step, rstd, x)
        found = [
            backward(
                *(t if t is None or not len(t) else t[own] for t in rows), quantised[e], gamma[e], weight_shape[1:],
                norm_weight, None, wants,
            )
            for e, own in groups(ends)
        ]  # fmt: skip
        dx, dweight, dbias, dgain = zip(*found, strict=True)
        return torch.cat(dx), torch.stack(dweight), torch.stack(dbias), torch.stack(dgain).sum(0)
    none = dy.new_empty(0)
    normal = (dy @ (quantised * gamma).to(dy.dtype)).float()
    dweight = dy.t() @ (codes * step[:, None]).to(dy.dtype) if wants[1] else none
    dbias = dy.float().sum(0) if wants[2] else none
    if norm_weight is None:
        return normal, dweight, dbias, none
    x, r = x.float(), rstd[:, None]
    g = normal * norm_weight.float()
    return r * (g - x * r * r * (g * x).mean(-1, keepdim=True)), dweight, dbias, (normal * x * r).sum(0)


def no_float64(tensor):
    return "not float64" if tensor.dtype == torch.float64 else None


@pytest.fixture(params=dict.fromkeys((HERE, *(b for b in OP.names if b != "reference"))))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == HERE:
        here = types.SimpleNamespace(quantize_weight=quantize_weight, forward=forward, backward=backward)
        real = OP.module
        monkeypatch.setattr(OP, "module", lambda b: here if b == HERE else real(b))
        monkeypatch.setattr(OP, "names", (HERE, *OP.names))
        monkeypatch.setitem(OP._why_not, HERE, bitlinear_op._one_device(no_float64))
    if (reason := OP.why_not(name, torch.empty(0))) is not None:
        pytest.skip(reason)
    return name


@pytest.fixture
def quantisations(backend: str, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The weights that the backend was asked to quantise."""
    module, seen = OP.module(backend), []
    real = module.quantize_weight
    monkeypatch.setattr(module, "quantize_weight", lambda w, scale: (seen.append(w), real(w, scale))[1])
    return seen


def leaves(rows: int = 6, K: int = 9, N: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    made = {"x": grid_tokens(g, rows, K), "weight": ternary_weights(g, N, K), "bias": torch.randn(N, generator=g)}
    return {k: v.to(dtype).requires_grad_() for k, v in made.items()}


def saved_by(function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    seen: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t), t)[1], lambda t: t):
        y = function()
    return y, seen


def test_what_is_kept_for_the_backward(backend: str) -> None:
    """A byte per element of x and a float per token; with a norm x as well. The weight is the parameter itself."""
    args, gain = leaves(), torch.ones(9, requires_grad=True)
    plain, seen = saved_by(lambda: bitlinear(**args, backend=backend))
    assert plain.requires_grad
    own = [t for t in seen if t is not args["weight"]]
    assert sorted((str(t.dtype), *t.shape) for t in own) == [("torch.float32", 6), ("torch.int8", 6, 9)]
    _, seen = saved_by(lambda: bitlinear(**args, norm_weight=gain, backend=backend))
    own = [t for t in seen if t is not args["weight"] and t is not gain and t is not args["x"]]
    assert sorted(t.numel() * t.element_size() for t in own) == [24, 24, 54]


def test_nothing_is_kept_that_no_gradient_needs(backend: str) -> None:
    args, gain = leaves(), torch.ones(9)
    frozen = args | {"weight": args["weight"].detach()}
    _, seen = saved_by(lambda: bitlinear(**frozen, backend=backend))
    assert [t for t in seen if t is not frozen["weight"]] == []
    with torch.no_grad():
        assert saved_by(lambda: bitlinear(**args, norm_weight=gain, backend=backend))[1] == []
    constants = {k: v.detach() for k, v in args.items()}
    y, seen = saved_by(lambda: bitlinear(**constants, backend=backend))
    assert not y.requires_grad and seen == []


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "norm_weight"])
def test_one_gradient_alone(backend: str, wanted: str) -> None:
    args = leaves() | {"norm_weight": torch.linspace(0.5, 2.0, 9)}
    found = []
    for name in (backend, "reference"):
        own = {k: v.detach().requires_grad_(k == wanted) for k, v in args.items()}
        y = bitlinear(**own, backend=name)
        found += torch.autograd.grad(y, own[wanted], torch.linspace(-1, 1, y.numel()).view_as(y))
    torch.testing.assert_close(found[0], found[1])


# ---- when a weight is quantised ------------------------------------------------------------------------------


def optimised(make: Callable[..., torch.optim.Optimizer], **options) -> Callable[[nn.Parameter, torch.Tensor], None]:
    def step(weight: nn.Parameter, y: torch.Tensor) -> None:
        y.square().sum().backward()
        make([weight], lr=0.5, **options).step()

    return step


def loaded(weight: nn.Parameter, y: torch.Tensor) -> None:
    layer = nn.Linear(9, 5, bias=False)
    layer.weight = weight
    layer.load_state_dict({"weight": -weight.detach().clone()})


def copied(weight: nn.Parameter, y: torch.Tensor) -> None:
    with torch.no_grad():
        weight.copy_(-weight)


def scaled(weight: nn.Parameter, y: torch.Tensor) -> None:
    with torch.no_grad():
        weight[0] *= -3


def replaced(weight: nn.Parameter, y: torch.Tensor) -> None:
    weight.data = -weight.detach().clone()


WRITES = {
    "fused-adamw": optimised(torch.optim.AdamW, fused=True),
    "foreach-adamw": optimised(torch.optim.AdamW, foreach=True),
    "loop-adamw": optimised(torch.optim.AdamW, foreach=False),
    "sgd": optimised(torch.optim.SGD),
    "foreach-sgd": optimised(torch.optim.SGD, foreach=True, momentum=0.9),
    "fused-sgd": optimised(torch.optim.SGD, fused=True),
    "load_state_dict": loaded,
    "copy": copied,
    "a row in place": scaled,
    "another storage": replaced,
}


@pytest.mark.parametrize("write", WRITES)
def test_every_write_to_a_weight_is_seen(backend: str, write: str, quantisations: list[torch.Tensor]) -> None:
    """Fused optimizers leave a tensor's version as it was (torch 2.13)."""
    args = leaves()
    weight, x = nn.Parameter(args["weight"].detach()), args["x"].detach()
    before = bitlinear(x, weight, backend=backend)
    WRITES[write](weight, before)
    after, want = (bitlinear(x, weight, backend=b) for b in (backend, "reference"))
    torch.testing.assert_close(after, want)
    assert not torch.equal(before, after)
    assert len(quantisations) == 2


@pytest.mark.parametrize("fused", [False, True])
def test_training_follows_the_reference(backend: str, fused: bool) -> None:
    """Two micro-steps a step, a look without a gradient after each."""
    found = []
    for name in (backend, "reference"):
        args, seen = leaves(), []
        weight, x = nn.Parameter(args["weight"].detach()), args["x"].detach()
        optimizer = torch.optim.AdamW([weight], lr=0.2, fused=fused)
        for _ in range(4):
            for part in x.split(3):
                (bitlinear(part, weight, backend=name) - 1).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                seen.append(bitlinear(x, weight, backend=name))
        found.append(torch.stack(seen))
    torch.testing.assert_close(found[0], found[1])


def test_both_passes_of_a_step_share_what_was_quantised(backend: str, quantisations: list[torch.Tensor]) -> None:
    """Also where a weight is used many times; each scale has its own."""
    args = leaves()
    for step in range(1, 3):
        sum(bitlinear(**args, backend=backend).sum() for _ in range(3)).backward()
        assert len(quantisations) == step
    median = [bitlinear(**args, scale="median", backend=b) for b in (backend, "reference")]
    torch.testing.assert_close(*median)
    mean = [bitlinear(**args, backend=b) for b in (backend, "reference")]
    torch.testing.assert_close(*mean)
    assert len(quantisations) == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_backward_recomputes_is_not_quantised_again(
    backend: str, reentrant: bool, quantisations: list[torch.Tensor]
) -> None:
    """Steps of one weight, each recomputed; reentrant checkpoints run them without gradients at first."""
    weight, x = leaves()["weight"][:, :5].detach().requires_grad_(), torch.ones(2, 5, requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        return bitlinear(x, weight, backend=backend)

    y = x
    for _ in range(3):
        y = checkpoint(run, y, use_reentrant=reentrant)
    before = len(quantisations)
    y.sum().backward()
    assert before == (3 if reentrant and not hasattr(OP.module(backend), "fingerprint") else 1)
    assert len(quantisations) - before == (1 if before == 3 else 0)
    (want,) = torch.autograd.grad(run(run(run(x))).sum(), x)
    assert torch.equal(x.grad, want)


@pytest.mark.parametrize("sampled", [False, True], ids=["no fingerprint", "fingerprint"])
def test_without_gradients_a_fingerprint_decides(
    backend: str, sampled: bool, quantisations: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes through `.data`, as averages of weights are swapped in for an evaluation, are seen either way."""
    module = OP.module(backend)
    monkeypatch.delattr(module, "fingerprint", raising=False)
    if sampled:
        monkeypatch.setattr(module, "fingerprint", lambda w: hash(w.detach().flatten()[0].item()), raising=False)
    args = leaves()
    x, weight = args["x"].detach(), args["weight"]
    with torch.inference_mode():
        first, again = (bitlinear(x, weight, backend=backend) for _ in range(2))
    assert torch.equal(first, again) and len(quantisations) == (1 if sampled else 2)
    weight.data.neg_()
    with torch.no_grad():
        torch.testing.assert_close(bitlinear(x, weight, backend=backend), -first)
    weight.data.neg_()
    y = bitlinear(x, weight, backend=backend)  # what inference mode has made serves here, or nothing is kept
    y.sum().backward()
    assert torch.equal(y, first)


def test_what_was_made_of_a_weight_goes_with_it(backend: str) -> None:
    gc.collect()
    before = len(bitlinear_op._quantised)
    args = leaves()
    bitlinear(**args, backend=backend).sum().backward()
    bitlinear(args["x"], args["weight"] * 1.0, backend=backend).sum().backward()
    assert len(bitlinear_op._quantised) > before
    del args
    gc.collect()
    assert len(bitlinear_op._quantised) == before


def test_a_copy_of_a_weight_is_another(backend: str) -> None:
    args = leaves()
    y = bitlinear(args["x"], args["weight"], backend=backend)
    other = copy.deepcopy(args["weight"])
    with torch.no_grad():
        other.neg_()
    torch.testing.assert_close(bitlinear(args["x"], other, backend=backend), -y)


def test_tensors_of_inference_mode_count_no_writes(backend: str, quantisations: list[torch.Tensor]) -> None:
    with torch.inference_mode():
        args = {k: v.detach().clone() for k, v in leaves().items()}
        first = bitlinear(args["x"], args["weight"], backend=backend)
        args["weight"].neg_()
        torch.testing.assert_close(bitlinear(args["x"], args["weight"], backend=backend), -first)
    assert len(quantisations) == 2


def test_a_captured_graph_quantises_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked up and nothing kept while a CUDA graph is recorded: it is replayed with other values."""
    weight = types.SimpleNamespace(is_cuda=True, is_inference=lambda: False)
    module = types.SimpleNamespace(quantize_weight=lambda w, scale: (w, scale))
    monkeypatch.setattr(OP, "module", lambda b: module)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert bitlinear_op._quantise(weight, "mean", HERE, True) == (weight, "mean")


# ---- the op --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(backend: str, norm: bool) -> None:
    args = leaves()
    gain = torch.linspace(0.5, 2.0, 9, requires_grad=True) if norm else None
    tensors = (args["x"], args["weight"], args["bias"], gain, None)
    torch.library.opcheck(bitlinear_op._forward, (*tensors, "mean", torch.float32, True, backend))
    y, codes, step, rstd = (t.detach() for t in bitlinear_op._forward(*tensors, "mean", torch.float32, True, backend))
    constants = [None if t is None else t.detach() for t in tensors]
    normed = (rstd, constants[0], constants[3]) if norm else (None, None, None)
    for wants in ([True] * 3 + [norm], [False, True, False, False], [True, False, False, False]):
        rest = (constants[1], None, "mean", torch.float32, wants, True, backend)
        torch.library.opcheck(bitlinear_op._backward, (y, codes, step, *normed, *rest))


def grouped(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x, weights and biases of four experts, a gain, and the ends of their rows: the second expert has none."""
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*s, generator=g).requires_grad_() for s in ((11, 9), (4, 5, 9), (4, 5)))
    return x, weight, bias, torch.linspace(0.5, 2.0, 9, requires_grad=True), torch.tensor([3, 3, 10, 11])


@pytest.mark.parametrize("norm", [False, True])
def test_groups_are_bitlinears_of_their_own(backend: str, norm: bool) -> None:
    x, weight, bias, gain, ends = grouped()
    leaves = [x, weight, bias, *([gain] if norm else [])]
    dy = torch.randn(11, 5, generator=torch.Generator().manual_seed(1))

    def one_by_one() -> torch.Tensor:
        parts, begin = [], 0
        for e, end in enumerate(ends.tolist()):
            if end > begin:
                parts.append(
                    bitlinear(x[begin:end], weight[e], bias[e], norm_weight=gain if norm else None, backend=backend)
                )
            begin = end
        return torch.cat(parts)

    def together() -> torch.Tensor:
        return bitlinear_op.grouped_bitlinear(
            x, weight, bias, gain if norm else None, ends, "mean", torch.float32, backend
        )

    for a, b in zip(
        (together(), *torch.autograd.grad(together(), leaves, dy)),
        (one_by_one(), *torch.autograd.grad(one_by_one(), leaves, dy)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert not torch.autograd.grad(together(), weight, dy)[0][1].any()
    torch.library.opcheck(
        bitlinear_op._forward, (x, weight, bias, gain, ends, "mean", torch.float32, True, backend),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


def test_no_rows_in_any_group(backend: str) -> None:
    x, weight, bias, _, ends = grouped()
    y = bitlinear_op.grouped_bitlinear(x[:0], weight, bias, None, ends * 0, "mean", torch.float32, backend)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight), allow_unused=True)
    assert y.shape == (0, 5) and not dweight.any() and (dx is None or not dx.any())


def test_experts_are_quantised_once_in_a_forward(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them together; the backward takes what the forward kept."""
    x, weight, bias, _, ends = grouped()
    module = bitlinear_op.OP.module(backend)
    calls, real = [], module.quantize_weight
    monkeypatch.setattr(module, "quantize_weight", lambda w, scale: calls.append(tuple(w.shape)) or real(w, scale))
    for _ in range(2):
        y = bitlinear_op.grouped_bitlinear(x, weight, bias, None, ends, "mean", torch.float32, backend)
    assert calls == [(4, 5, 9)]
    y.sum().backward()
    assert calls == [(4, 5, 9)]
    bitlinear_op.grouped_bitlinear(x, weight, bias, None, ends, "mean", torch.float32, backend)
    assert calls == [(4, 5, 9)] * 2


def test_a_compiled_graph_follows_the_weight(backend: str) -> None:
    args = leaves() | {"norm_weight": torch.linspace(0.5, 2.0, 9, requires_grad=True)}
    compiled = torch.compile(lambda **a: bitlinear(**a, backend=backend), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        found = []
        for function in (compiled, lambda **a: bitlinear(**a, backend=backend)):
            y = function(**args)
            found.append([y, *torch.autograd.grad(y.square().sum(), list(args.values()))])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
        with torch.no_grad():
            args["weight"].neg_()


@pytest.mark.parametrize("norm", [False, True])
def test_autocast(backend: str, norm: bool) -> None:
    """Quantised from float32, y in bfloat16, gradients in the dtypes of what they are of."""
    args = leaves() | ({"norm_weight": torch.linspace(0.5, 2.0, 9, requires_grad=True)} if norm else {})
    found = []
    for name in (backend, "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            y = bitlinear(**args, backend=name)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), list(args.values()))])
    assert found[0][0].dtype == torch.bfloat16
    assert [g.dtype for g in found[0][1:]] == [torch.float32] * len(args)
    for a, b in zip(*found, strict=True):  # sums of 9 terms with factors of 8 bits
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=6 * 2**-8 * float(b.detach().abs().max()))


def test_strides_and_expanded_gradients(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = grid_tokens(g, 3, 4, 9).transpose(0, 1).float().requires_grad_()
    weight = ternary_weights(g, 5, 9).t().contiguous().t().float().requires_grad_()
    gain = torch.linspace(0.5, 2.0, 18)[::2].clone().requires_grad_()
    found = []
    for name in (backend, "reference"):
        y = bitlinear(x, weight, norm_weight=gain, backend=name)
        found.append([y, *torch.autograd.grad(y.sum(), (x, weight, gain))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_have_the_dtypes_of_what_they_are_of(backend: str) -> None:
    args = leaves(dtype=torch.float16) | {"norm_weight": torch.ones(9, requires_grad=True)}
    y = bitlinear(**args, backend=backend)
    assert y.dtype == torch.float16
    grads = torch.autograd.grad(y.float().sum(), list(args.values()))
    assert [t.dtype for t in grads] == [torch.float16] * 3 + [torch.float32]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
def test_nan_and_inf_are_not_hidden(backend: str) -> None:
    args = {k: v.detach() for k, v in leaves().items()}
    args["x"][0, 2], args["x"][1, 2] = float("nan"), -float("inf")
    for gain in (None, torch.ones(9)):
        x, weight = args["x"].clone().requires_grad_(), args["weight"].clone().requires_grad_()
        y = bitlinear(x, weight, norm_weight=gain, backend=backend)
        assert not y[:2].isfinite().any() and y[2:].isfinite().all()
        assert not torch.autograd.grad(y[:1].sum(), weight)[0].isfinite().any()


def test_rows_of_zeros_give_the_bias(backend: str) -> None:
    args = {k: v.detach() for k, v in leaves().items()} | {"x": torch.zeros(3, 9)}
    for gain in (None, torch.ones(9)):
        assert torch.equal(bitlinear(**args, norm_weight=gain, backend=backend), args["bias"].expand(3, 5))
    assert torch.equal(bitlinear(**args | {"weight": torch.zeros(5, 9)}, backend=backend), args["bias"].expand(3, 5))


def test_second_derivative_is_refused(backend: str) -> None:
    args = leaves()
    (dx,) = torch.autograd.grad(bitlinear(**args, backend=backend).square().sum(), args["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.zeros(6, 9, dtype=torch.float64)}, r"not (torch\.)?float64"),
        ({"weight": torch.zeros(5, 9, dtype=torch.float64)}, r"not (torch\.)?float64"),
        ({"bias": torch.zeros(5, device="meta")}, "x is on cpu, another tensor on meta"),
        ({"weight": torch.zeros(0, 9), "bias": None}, "the weight is empty"),
    ],
)
def test_refusals_say_why(backend: str, change: dict, reason: str) -> None:
    with pytest.raises(BackendUnavailable, match=reason):
        bitlinear(**leaves() | change, backend=backend)


def test_float64_runs_the_reference() -> None:
    args = leaves(dtype=torch.float64)
    assert torch.equal(bitlinear(**args), bitlinear(**args, backend="reference"))
