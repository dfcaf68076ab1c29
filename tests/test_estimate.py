from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from ultra.cli import main
from ultra.config import RunConfig, load_config
from ultra.estimate import (
    DEVICE_SIZES,
    USABLE,
    Cost,
    activation_cost,
    cost_of,
    estimate,
    measure,
    saved_bytes,
)
from ultra.model import build_model
from ultra.train.optim import GroupedOptimizer, collect_groups

SMALL = """model.vocab_size=300 model.hidden_size=32 model.num_heads=2 model.retention_heads=2
model.ffn_hidden_size=64 training.batch_size=3 training.max_length=64""".split()


def small(*overrides: str) -> RunConfig:
    return load_config("quickstart", [*SMALL, *overrides])


GALORE = ["training.use_galore=true", "training.galore_rank=8"]
VARIANTS = {
    "plain": [],
    "moe": ["model.use_moe=true", "model.use_bitnet=true", "model.norm_type=dynamic_tanh"],
    "loops": ["model.num_loops=2", "model.dropout=0.1", "model.use_factorized_embedding=true"],
    "rk4": ["model.ode_solver=rk4", "model.ode_checkpoint=step"],
    "amp": ["training.use_amp=true"],
    "galore": GALORE,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_and_optimizer_state_are_those_of_a_real_step(variant: str) -> None:
    cfg = small(*VARIANTS[variant])
    found = measure(cfg)
    model = build_model(cfg)
    groups = collect_groups(model, cfg.training)
    optimizer = GroupedOptimizer(groups, cfg.training)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(torch.zeros(()))
    owner = {name: group.name for group in groups for name, _, _ in group.params}
    state = dict.fromkeys(found.groups, 0)
    for key, tensor in optimizer.state_tensors().items():
        state[owner[key.rpartition(".")[0]]] += tensor.nbytes
    for group in groups:
        memory = found.groups[group.name]
        assert memory.parameters == sum(p.numel() for p in group.tensors)
        assert memory.weights == memory.gradients == 4 * memory.parameters
        assert memory.optimizer == state[group.name], group.name
    assert found.buffers == sum(b.nbytes for b in model.buffers())


@pytest.mark.parametrize("variant", VARIANTS)
def test_activations_of_the_whole_model_are_the_sum_of_its_parts(variant: str) -> None:
    cfg = small(*VARIANTS[variant])
    t = cfg.training
    n, T = t.batch_size, t.max_length
    model = build_model(cfg)
    ids = torch.randint(cfg.model.vocab_size, (1, n * T))
    labels = torch.full_like(ids, -100)
    chosen = round(n * T * t.mlm_probability)
    labels[0, :chosen] = ids[0, :chosen]
    borders = torch.arange(0, n * T + 1, T, dtype=torch.int32)
    whole = saved_bytes(
        lambda: model(ids, labels=labels, cu_seqlens=borders, max_seqlen=T).loss,
        [model],
        torch.bfloat16 if t.use_amp else None,
    )
    kept, _ = activation_cost(cfg)
    # Exact but for small tensors of the loss and for casts that loops share: 10 %.
    assert kept.bytes(n, T) == pytest.approx(whole, rel=0.1)


def test_cost_finds_constant_line_and_parabola() -> None:
    cfg = small()
    D = cfg.model.hidden_size
    weight = torch.nn.Linear(D, D, bias=False)
    run = {
        "squares its input": (lambda x, seqs: x * x, Cost(0, 4 * D, 0)),
        "keeps a cast weight": (
            lambda x, seqs: x.detach() @ (weight.weight * 2).exp(),
            Cost(4 * D * D, 4 * D, 0),
        ),
        "keeps scores": (
            lambda x, seqs: (lambda z: (z @ z.transpose(1, 2)).exp())(x.view(-1, seqs.max_seqlen, D)),
            Cost(0, 4 * D, 4),
        ),
    }
    for name, (call, expected) in run.items():
        found = cost_of(call, [weight], cfg, None)
        assert found.linear == expected.linear, name
        assert found.square == expected.square, name
        assert found.fixed == pytest.approx(expected.fixed, abs=2 * 4 * D * D if expected.fixed else 0), name


def test_saved_bytes_counts_a_storage_once_and_no_parameter() -> None:
    layer = torch.nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    assert saved_bytes(lambda: layer(x), [layer], None) == x.nbytes
    assert saved_bytes(lambda: x * x + x * x.view(8, 4).view(4, 8), [layer], None) == x.nbytes
    assert saved_bytes(lambda: layer(x), [], None) == x.nbytes + layer.weight.nbytes


def test_what_saves_memory_is_seen() -> None:
    plain, galore = measure(small()), measure(small(*GALORE))
    per_layer = measure(small(*GALORE, "training.galore_per_layer=true"))

    def total(e, field):
        return sum(getattr(g, field) for g in e.groups.values())

    assert total(galore, "optimizer") < total(plain, "optimizer")
    assert total(galore, "gradients") == total(plain, "gradients")
    assert total(per_layer, "gradients") < total(galore, "gradients")
    recomputed = measure(small("model.gradient_checkpointing=true"))
    assert recomputed.activations(3) < plain.activations(3)  # one whole layer of it is there at a time
    # six layers keep their input alone, [3 x 64, 32] float32; the rest is embedding, final norm and head
    layers = 6 * 3 * 64 * 32 * 4
    assert layers < recomputed.kept.bytes(3, 64) < plain.kept.bytes(3, 64) / 2
    assert measure(small("training.use_amp=true")).activations(3) < plain.activations(3)


@pytest.mark.parametrize("overrides", [[], ["model.gradient_checkpointing=true"]])
def test_the_largest_batch_fits_and_one_more_does_not(overrides: list[str]) -> None:
    found = measure(small(*overrides))
    for gib in DEVICE_SIZES:
        batch, limit = found.largest_batch(gib), gib * 2**30 * USABLE
        assert found.total(batch) <= limit < found.total(batch + 1)
    assert found.largest_batch(found.static / 2**30) == 0


def test_checkpoint_size_is_that_of_the_files(tiny_run: Path) -> None:
    newest = tiny_run / "checkpoints" / "step-00000006"
    tensors = 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        content = (newest / name).read_bytes()
        tensors += len(content) - 8 - struct.unpack("<Q", content[:8])[0]  # length, header, tensors
    # AdamW's 8 bytes of `calls` exist under GaLore only; every other byte is the same
    assert measure(load_config(newest / "config.yaml")).checkpoint == tensors


def test_estimate_leaves_the_random_stream_alone() -> None:
    before = torch.get_rng_state()
    measure(small())
    assert torch.equal(torch.get_rng_state(), before)


def test_estimate_prints_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = small(*GALORE)
    text = estimate(cfg)
    parameters = sum(p.numel() for p in build_model(cfg).parameters())
    assert f"6 layers, width 32, {parameters:,} parameters" in text
    assert "GaLore of rank 8" in text
    assert all(f"{gb} GB" in text for gb in DEVICE_SIZES)
    assert "batch_size 3 x 64 tokens" in text
    assert main(["estimate", "embbert", "training.max_length=32", "model.vocab_size=500"]) == 0
    assert "4 layers, width 128" in capsys.readouterr().out
