"""The bench's peers of the ternary ops compute what the ops do, and its tools run."""

from __future__ import annotations

import pytest
import torch

from ultra_kernels import moe_ffn, pack_ternary, ternary_linear, ternary_matmul, unpack_ternary


@pytest.fixture
def packed():
    g = torch.Generator().manual_seed(0)
    return pack_ternary(torch.randint(-1, 2, (70, 256), generator=g, dtype=torch.int8), torch.tensor(0.7))


@pytest.mark.parametrize("M", [1, 21])
@pytest.mark.parametrize("name", ["bitnet.cpp-i2s", "torch-int_mm"])
def test_integer_peers_are_exact(bench_module, packed, name, M):
    peers = bench_module("peers")
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-127, 128, (M, 256), generator=g, dtype=torch.int8)
    tokens = torch.randn(M, 256, generator=g)
    try:
        prepared = peers.PREPARED[name](packed, torch.float32)
    except ImportError as error:
        pytest.skip(str(error))
    assert torch.equal(peers.PEERS["ternary_matmul"][name](x, prepared).int(), ternary_matmul(x, packed))
    torch.testing.assert_close(peers.PEERS["ternary_linear"][name](tokens, prepared), ternary_linear(tokens, packed))


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_loop_over_experts(bench_module, top_k):
    g = torch.Generator().manual_seed(1)
    x, logits, w_in, w_out = (torch.randn(*shape, generator=g) for shape in ((9, 6), (9, 4), (4, 5, 6), (4, 6, 5)))
    options = {"top_k": top_k, "activation": "gelu", "gated": False}
    got = bench_module("peers").PEERS["moe_ffn"]["loop"](x, logits, w_in, w_out, **options)
    torch.testing.assert_close(got, moe_ffn(x, logits, w_in, w_out, **options)[0])


# int8pack multiplies in bfloat16: 2^-8 of results up to 40; float32 sums of 256 terms err by 1e-6 of them
@pytest.mark.parametrize(("name", "limit"), [("torch-int8pack", 0.2), ("torch-linear", 1e-4)])
def test_peers_that_round_no_activations(bench_module, packed, name, limit):
    peers = bench_module("peers")
    tokens = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    codes, scale = unpack_ternary(packed)
    got = peers.PEERS["ternary_linear"][name](tokens, peers.PREPARED[name](packed, torch.float32))
    torch.testing.assert_close(got, tokens @ (codes * scale).t(), atol=limit, rtol=0.0)


def test_i2s_is_skipped_without_a_clone(bench_module, monkeypatch):
    monkeypatch.delenv("ULTRA_BITNET_CPP", raising=False)
    i2s = bench_module("i2s")
    i2s.library.cache_clear()
    with pytest.raises(ImportError, match="ULTRA_BITNET_CPP"):
        i2s.library()


def test_overhead(bench_module, monkeypatch, capsys):
    tool = bench_module("overhead")
    monkeypatch.setattr(tool, "CALLS", 1)
    assert tool.main(["dyt"]) == 0 and "reference" in capsys.readouterr().out
    assert tool.main(["nothing"]) == 2 and "no such op: nothing" in capsys.readouterr().err
