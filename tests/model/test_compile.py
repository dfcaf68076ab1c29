"""torch.compile(model, fullgraph=True): equal to eager, and compiled once or twice however the batches change."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ultra.mixers import MIXERS
from ultra.train.compiling import any_size

_spec = importlib.util.spec_from_file_location("invariants", Path(__file__).with_name("test_invariants.py"))
invariants = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(invariants)


def ids(B: int, T: int) -> torch.Tensor:
    return torch.randint(5, 40, (B, T), generator=torch.Generator().manual_seed(B + T))


def packed(lengths: list[int]) -> dict[str, object]:
    tokens = ids(1, sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    labels = torch.where(tokens % 3 == 0, tokens, -100)
    return {"input_ids": tokens, "labels": labels, "cu_seqlens": cu_seqlens, "max_seqlen": max(lengths)}


def dense(B: int, T: int) -> dict[str, object]:
    return {"input_ids": ids(B, T), "labels": ids(B, T)}


def padded(B: int, T: int) -> dict[str, object]:
    mask = torch.arange(T) < 3 + torch.arange(B)[:, None]
    return {**dense(B, T), "attention_mask": mask.long()}


# A single sequence under 64 tokens may cost a graph more: its scan saves one state, and torch specialises sizes of 1.
PACKED = [packed(lengths) for lengths in ([5, 1, 9, 3], [7, 20, 4], [3, 4, 5, 6, 7, 0])]


def results(model, call, batch, half: bool = False) -> list[torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        out = call(**batch)
    out.loss.backward()
    return [out.loss.detach(), out.last_hidden_state.detach(), out.logits.detach(), out.num_labelled] + [
        p.grad for p in model.parameters()
    ]


def least_scales(model, batch, half: bool) -> list[float]:
    """What errors of `results` are measured against at least.

    The gradient of the embedding's scale s is the sum of out · dL/dout over the whole output, divided by s: terms of
    both signs, whose rounding errors follow their size and not that of the sum.
    """
    outputs: list[torch.Tensor] = []
    hook = model.embedding.register_forward_hook(lambda module, args, out: outputs.append(out) or out.retain_grad())
    results(model, model, batch, half)
    hook.remove()
    (out,), s = outputs, model.embedding.scale
    terms = 0.0 if s is None else float((out.detach() * out.grad).abs().sum() / s.detach().abs())
    return [0.0] * 4 + [terms if p is s else 0.0 for p in model.parameters()]


def compare(model, batches, *, fullgraph: bool = True, half: bool = False, backend: str = "aot_eager") -> int:
    """Asserts that compiled and eager agree on every batch; the number of graphs compiled for all."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=fullgraph, backend=counter)
    for batch in batches:
        least = least_scales(model, batch, half)
        pairs = zip(results(model, model, batch, half), results(model, compiled, batch, half), least, strict=True)
        for a, b, least_scale in pairs:
            # The operations are the same; at most the order of sums of gradients differs. In float32 that is a few
            # roundings; bfloat16 gradients of a sum of two paths round once more each.
            scale = max(float(a.abs().max()), least_scale) if a.numel() else 1.0
            torch.testing.assert_close(a, b, rtol=0, atol=(2**-6 if half else 2e-6) * scale)
    return counter.frame_count


def model_of(*mixers: str, **changes):
    return invariants.model_of(dtype=torch.float32, layer_pattern=mixers, num_layers=len(mixers), **changes).train()


def test_all_mixers_packed() -> None:
    assert compare(model_of(*MIXERS, ode_checkpoint="none"), PACKED) <= 2


def test_everything_else_of_a_model() -> None:
    """BitNet, experts, loops, both checkpointings, factorised and convolved embedding."""
    model = model_of(
        "ode", use_bitnet=True, use_moe=True, num_experts=2, top_k_experts=1, num_loops=2, norm_type="dynamic_tanh",
        gradient_checkpointing=True, ode_checkpoint="step", ode_solver="euler", use_factorized_embedding=True,
        factorized_embedding_dim=8, use_embedding_conv=True, layerscale_init=0.5,
    )  # fmt: skip
    with any_size():  # as the trainer compiles: one graph from the start
        assert compare(model, PACKED) == 1


def test_dense_rows_in_training_and_evaluation() -> None:
    model = model_of("retnet", norm_type="derf")
    batches = [dense(3, 7), dense(2, 20), dense(4, 13)]
    with any_size():
        assert compare(model, batches) == compare(model.eval(), batches) == 1


def test_padding_breaks_the_graph_at_the_entrance_alone() -> None:
    model = model_of("sigmoid_attn")
    assert compare(model, [padded(3, 11), padded(4, 9), padded(5, 17)], fullgraph=False) <= 4  # entrance, rest; twice
    torch._dynamo.reset()
    breaks = torch._dynamo.explain(model)(**padded(3, 11)).break_reasons
    assert len(breaks) == 1 and "no padding is data" in str(breaks[0].reason)


def test_options_whose_length_is_data() -> None:
    model = model_of("titan_attn", titan_memory="linear", titan_persistent_tokens=2, hope_learnable_damping=True)
    with any_size():
        assert compare(model, PACKED) == 1
        assert compare(model_of("titan_attn", titan_persistent_tokens=2, use_hope=False), PACKED) == 1


def test_under_autocast() -> None:
    with any_size():
        assert compare(model_of("mamba", "titan_attn"), PACKED, half=True) == 1


def test_inductor() -> None:
    assert compare(model_of("standard_attn"), PACKED[:1], backend="inductor") == 1


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"use_bitnet": True, "use_moe": True, "num_experts": 2}], ids=["full", "bit"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_inductor_with_every_mixer(mixer: str, changes: dict[str, object]) -> None:
    assert compare(model_of(mixer, **changes), PACKED, backend="inductor") <= 2
