"""Retention against literal formulas, its three forms against each other, and its borders."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from ultra_kernels import retention, retention_step
from ultra_kernels.retention import reference
from ultra_kernels.retention.cases import CASES

F64 = torch.float64
DIRECTIONS = ("forward", "backward", "bidirectional")


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=F64)


def inputs(B: int = 2, T: int = 37, H: int = 3, K: int = 4, V: int = 5):
    decay = torch.tensor([0.6, 0.97, 1.0], dtype=F64)[:H].log()
    return rand(B, T, H, K), rand(B, T, H, K, seed=1), rand(B, T, H, V, seed=2), decay


def literal(q, k, v, log_decay, direction, scale):
    """Σ over pairs, one by one."""
    o = torch.zeros_like(v)
    for n in range(q.shape[1]):
        for m in range(q.shape[1]):
            if (direction == "forward" and m > n) or (direction == "backward" and m < n):
                continue
            score = (q[:, n] * k[:, m]).sum(-1) * log_decay.exp() ** abs(n - m) * scale
            o[:, n] += score[..., None] * v[:, m]
    return o


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scale", [None, 0.3, "heads"])
def test_literal_sum(direction: str, scale) -> None:
    q, k, v, decay = inputs(T=11)
    per_head = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    want = literal(q, k, v, decay, direction, {None: 0.5, "heads": per_head}.get(scale, scale))
    got = retention(q, k, v, decay, scale=per_head if scale == "heads" else scale, direction=direction)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("chunk", [1, 5, 16, 36, 37, 38, 64])
def test_chunkwise_is_parallel(direction: str, chunk: int) -> None:
    q, k, v, decay = inputs()
    whole = retention(q, k, v, decay, direction=direction, chunk_size=1000)
    torch.testing.assert_close(
        retention(q, k, v, decay, direction=direction, chunk_size=chunk), whole, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_chunkwise_gradients_are_parallel_ones(direction: str) -> None:
    leaves = [x.requires_grad_() for x in inputs()[:3]]
    decay, cotangent = inputs()[3], rand(2, 37, 3, 5, seed=9)
    grads = [
        torch.autograd.grad(retention(*leaves, decay, direction=direction, chunk_size=c), leaves, cotangent)
        for c in (1000, 8)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [8, 1000])
def test_recurrent_is_parallel_with_states(chunk: int) -> None:
    q, k, v, decay = inputs()
    start = rand(2, 3, 4, 5, seed=3)
    o, final = retention(
        q, k, v, decay, scale=0.4, direction="forward", initial_state=start, output_final_state=True, chunk_size=chunk
    )
    state = start
    for t in range(q.shape[1]):
        step, state = retention_step(q[:, t], k[:, t], v[:, t], decay, state, scale=0.4)
        torch.testing.assert_close(o[:, t], step, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(final, state, rtol=1e-11, atol=1e-11)


def test_a_sequence_may_be_cut_anywhere() -> None:
    q, k, v, decay = inputs()
    whole, final = retention(q, k, v, decay, direction="forward", output_final_state=True)
    first, state = retention(*(x[:, :13] for x in (q, k, v)), decay, direction="forward", output_final_state=True)
    second, last = retention(
        *(x[:, 13:] for x in (q, k, v)), decay, direction="forward", initial_state=state, output_final_state=True
    )
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_flipping_time_swaps_directions(chunk: int) -> None:
    q, k, v, decay = inputs()
    flipped = [x.flip(1) for x in (q, k, v)]
    for there, back in zip(DIRECTIONS, ("backward", "forward", "bidirectional"), strict=True):
        torch.testing.assert_close(
            retention(*flipped, decay, direction=there, chunk_size=chunk).flip(1),
            retention(q, k, v, decay, direction=back, chunk_size=chunk),
            rtol=1e-12, atol=1e-12,
        )  # fmt: skip


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("chunk", [8, None])
def test_packed_sequences_are_alone(direction: str, chunk: int | None) -> None:
    lengths = [20, 0, 3, 33, 1, 0]
    q, k, v, decay = inputs(B=1, T=sum(lengths))
    start = rand(len(lengths), 3, 4, 5, seed=4) if direction == "forward" else None
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    forward = start is not None
    options = dict(direction=direction, output_final_state=forward)
    packed = retention(q, k, v, decay, cu_seqlens=cu, initial_state=start, chunk_size=chunk, **options)
    o, final = packed if forward else (packed, None)
    for s, n in enumerate(lengths):
        part = [x[:, cu[s] : cu[s] + n] for x in (q, k, v)]
        alone = retention(*part, decay, initial_state=start[s : s + 1] if forward else None, **options)
        torch.testing.assert_close(o[:, cu[s] : cu[s] + n], alone[0] if forward else alone, rtol=1e-12, atol=1e-12)
        if forward:
            torch.testing.assert_close(final[s : s + 1], alone[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[0, 0], []])
def test_no_tokens(lengths: list[int]) -> None:
    q, k, v, decay = inputs(B=1, T=0)
    cu = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    start = rand(len(lengths), 3, 4, 5)
    o, final = retention(
        q, k, v, decay, direction="forward", cu_seqlens=cu, initial_state=start, output_final_state=True
    )
    assert o.shape == (1, 0, 3, 5) and torch.equal(final, start)
    assert retention(q, k, v, decay).shape == (1, 0, 3, 5)


def test_gradcheck() -> None:
    q, k, v, decay = inputs(B=1, T=9, H=2)
    scale, start = torch.tensor([0.5, 1.5], dtype=F64), rand(2, 2, 4, 5)
    leaves = [x.requires_grad_() for x in (q, k, v, scale, start)]
    cu = torch.tensor([0, 3, 9], dtype=torch.int32)
    for chunk in (2, 100):

        def f(q, k, v, scale, start, chunk=chunk):
            return retention(
                q, k, v, decay, scale=scale, direction="forward", cu_seqlens=cu, initial_state=start,
                output_final_state=True, chunk_size=chunk,
            )  # fmt: skip

        assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(lambda x: f(x, k, v, scale, start)[0], leaves[:1])


def test_long_float32_stays_finite_and_right() -> None:
    """gamma^-n is never formed: at gamma = 0.6 it would overflow after 174 tokens."""
    q, k, v, decay = inputs(B=1, T=5000, H=3, K=4, V=2)
    with torch.no_grad():
        got = retention(q.float(), k.float(), v.float(), decay.float())
        want = retention(q, k, v, decay, chunk_size=250)
    # the head that never decays sums T·K terms
    assert (got - want).abs().max() < 4 * 1.2e-7 * math.sqrt(5000 * 4) * want.abs().max()


def test_scores_hold_no_denormals() -> None:
    """Products with denormal numbers are 50 times slower on CPUs."""
    power = reference._power(torch.tensor([-0.29, -80.0, -math.inf]), torch.arange(-3, 600))
    assert ((power == 0) | (power >= torch.finfo(torch.float32).tiny)).all()
    assert (power[:, :3] == 0).all() and (power[:, 3] == 1).all() and power[0, 200] > 0


def test_halves_compute_in_float32() -> None:
    """In bf16 sums 512 ones would stop at 256."""
    one = torch.ones(1, 512, 1, 1, dtype=torch.bfloat16)
    assert retention(one, one, one, torch.zeros(1), direction="forward")[0, -1].item() == 512
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.full((1, 3, 1, 1), 1.0 + 2**-6)  # exact in bf16; its product of three is not
        got = retention(x, x, x, torch.zeros(1), scale=1.0, direction="backward")
    assert got.dtype == torch.bfloat16 and got[0, -1].item() == torch.tensor((1 + 2**-6) ** 3).bfloat16().item()


@pytest.mark.parametrize("case", [c for c in CASES["retention"] if not c.bench], ids=lambda c: c.name)
def test_inputs_stay_unchanged(case) -> None:
    given = case.inputs(torch.float32)
    before = {n: t.detach().clone() for n, t in given.items() if isinstance(t, torch.Tensor)}
    result = retention(**given)
    (result[0] if isinstance(result, tuple) else result).sum().backward()
    assert all(torch.equal(given[n], t) for n, t in before.items())


def test_compiles_without_a_graph_break() -> None:
    q, k, v, decay = inputs()
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    compiled = torch.compile(lambda *a: retention(*a, decay.float()), fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(retention(*leaves, decay.float()).square().sum(), leaves)
    for a, b in zip(eager, torch.autograd.grad(compiled(*leaves).square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_errors_say_what_and_where() -> None:
    q, k, v, decay = inputs(H=3)
    with pytest.raises(ValueError, match="direction 'both'"):
        retention(q, k, v, decay, direction="both")  # type: ignore[arg-type]
    for options in ({"output_final_state": True}, {"initial_state": torch.zeros(2, 3, 4, 5)}):
        with pytest.raises(ValueError, match="state needs direction='forward', got 'bidirectional'"):
            retention(q, k, v, decay, **options)
    with pytest.raises(ValueError, match=r"initial_state has shape \(1, 3, 4, 5\), must be \(2, 3, 4, 5\)"):
        retention(q, k, v, decay, direction="forward", initial_state=torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match=r"log_decay has shape \(2,\), must be \(3,\)"):
        retention(q, k, v, decay[:2])
    with pytest.raises(ValueError, match="batch size must be 1"):
        retention(q, k, v, decay, cu_seqlens=torch.tensor([0, 37], dtype=torch.int32))
    with pytest.raises(ValueError, match="q and k must be"):
        retention(q, k[:, 1:], v, decay)
    with pytest.raises(ValueError, match="retention_step: state has shape"):
        retention_step(q[:, 0], k[:, 0], v[:, 0], decay, torch.zeros(2, 3, 5, 4))


@pytest.mark.parametrize("cu", [None, (0, 3, 3, 11)])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_the_peer_computes_the_same(direction: str, cu, bench_module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two causal passes, one over the flipped rows, less the diagonal that both have; a stand-in does the passes."""

    def chunk_simple_gla(q, k, v, *, g_gamma, scale, cu_seqlens):
        return retention(q, k, v, g_gamma, scale=scale, direction="forward", cu_seqlens=cu_seqlens), None

    package = types.SimpleNamespace(chunk_simple_gla=chunk_simple_gla)
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", package)
    q, k, v, decay = inputs(B=1, T=11)
    options = {"direction": direction, "cu_seqlens": None if cu is None else torch.tensor(cu, dtype=torch.int32)}
    peer = bench_module("peers").PEERS["retention"]["flash-linear-attention"]
    torch.testing.assert_close(peer(q, k, v, decay, **options), retention(q, k, v, decay, **options))
    with pytest.raises(NotImplementedError, match="without states"):
        peer(q, k, v, decay, output_final_state=True)
