"""Failure modes that trainers of this kind are known for: model, optimisation, trainer, data, packaging.

One promise a test; its docstring states the failure. Deeper tests of the same parts stand beside those parts.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import math
import multiprocessing
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ultra
from ultra.config import RunConfig, UltraConfig, load_config
from ultra.config.load import presets
from ultra.config.training import GROUPS, TrainingConfig
from ultra.data import Batch, CorpusData, open_data, prepare
from ultra.data import tokenizer as tokenizer_module
from ultra.data.cache import Filler
from ultra.data.tokenizer import Vocabulary
from ultra.errors import UserError
from ultra.inference import Pipeline
from ultra.layers.linear import BitLinear
from ultra.layers.sequences import Sequences
from ultra.mixers import MIXERS
from ultra.model import Encoder, build_model
from ultra.norms import NORMS
from ultra.train import checkpoint, health, trainer
from ultra.train.metrics import read_rows
from ultra.train.optim import GroupedOptimizer, collect_groups, warn_if_rates_cannot_train
from ultra.train.precision import LossScale, pick_device
from ultra.train.schedule import lr_factor, travel
from ultra.train.signals import StopFlag
from ultra_kernels import hope_attention, retention, rotary, sigmoid_attention

ROOT = Path(__file__).parents[1]
F64 = torch.float64
GOOD = torch.tensor(0.0)


# ---- tools ----------------------------------------------------------------------------------------------------------
def small(**changes: Any) -> UltraConfig:
    sizes = dict(
        vocab_size=40, hidden_size=24, num_layers=1, num_heads=2, retention_heads=2, ffn_hidden_size=32,
        use_moe=False, dropout=0.0, ode_steps=1,
    )  # fmt: skip
    return UltraConfig(**{**sizes, **changes})


def model_of(**changes: Any) -> Encoder:
    """In float64 and moved off the special values of the initialisation: zero biases, unit gains."""
    torch.manual_seed(0)
    model = build_model(small(**changes)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p) * (p.abs().mean() + 0.1))
    return model


def dense(T: int) -> Sequences:
    return Sequences.dense(T, torch.device("cpu"))


def random(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


IDS = torch.tensor([[5, 9, 31, 7, 22, 16, 9, 38]])
EVERY_MIXER = pytest.mark.parametrize("mixer", MIXERS)


class Watch(TorchDispatchMode):
    """What runs inside: the largest tensor made, the matrix products, and the values that the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.products += name in ("mm", "addmm")
        self.reads += name in ("_local_scalar_dense", "is_nonzero", "equal")
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
        return out


WORDS = "the a river house walks slowly over stone green light model of and to in which every small number".split()


def write_corpus(folder: Path, documents: int = 200, words: int = 12) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = [" ".join([f"n{i}", *rng.choice(WORDS, rng.integers(1, 2 * words))]) for i in range(documents)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus and its token cache; a test that spoils either makes its own."""
    folder = tmp_path_factory.mktemp("shared")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture
def config(shared: Path) -> Callable[..., RunConfig]:
    """A model that makes a step in milliseconds, on the shared corpus; keywords are training fields."""

    def make(model: dict[str, Any] | None = None, **training: Any) -> RunConfig:
        settings = dict(
            local_parquet_dir=str(shared / "corpus"), cache_dir=str(shared / "cache"), dataset_batch_size=50,
            stream_local_parquet=False, batch_size=2, gradient_accumulation_steps=2, max_length=16, num_workers=1,
            dataloader_workers=0, val_fraction=0.1, mlm_probability=0.3, eval_samples=8, val_interval=100,
            checkpoint_every_n_steps=100, scheduler_total_steps=6, scheduler_type="constant", device="cpu",
        )  # fmt: skip
        sizes = dict(vocab_size=300, hidden_size=16, ffn_hidden_size=16, layer_pattern=("retnet", "standard_attn"))
        return RunConfig(
            model=small(**{**sizes, "num_layers": 2, **(model or {})}), training=TrainingConfig(**settings | training)
        )

    return make


def train(cfg: RunConfig, run: Path) -> list[dict[str, Any]]:
    """The rows of the metrics of a run that ends well."""
    assert trainer.train(cfg, run_dir=run) == 0
    return list(read_rows(run / "metrics.jsonl"))


def training_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "loss" in row]


def make_trainer(cfg: RunConfig, run: Path) -> trainer.Trainer:
    torch.manual_seed(0)
    return trainer.Trainer(cfg, run, build_model(cfg), open_data(cfg), torch.device("cpu"), StopFlag())


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read_tensors(checkpoint.resolve(run), "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps(data: CorpusData, count: int) -> list[list[Batch]]:
    return list(itertools.islice(data.train_batches(0), count))


def original(batch: Batch) -> np.ndarray:
    """The ids before masking."""
    return torch.where(batch.labels >= 0, batch.labels, batch.input_ids)[0].numpy()


def poison(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """The loss of the training steps whose number in the data `bad` chooses is NaN."""
    forward, backward, at = Encoder.forward, trainer.Trainer.backward, [-1]

    def poisoned(self: Encoder, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        if self.training and bad(at[0]):
            out.loss_sum = out.loss_sum * float("nan")
        return out

    def noted(self: trainer.Trainer, batches: list[Batch]) -> Any:
        at[0] = self.state.data_step
        return backward(self, batches)

    monkeypatch.setattr(Encoder, "forward", poisoned)
    monkeypatch.setattr(trainer.Trainer, "backward", noted)


# ---- model: BitLinear -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("norm", [True, False])
def test_a_token_scaled_by_20_changes_no_other_token_through_bitlinear(norm: bool) -> None:
    """Statistics over the whole sequence let every token leak into every other."""
    layer, x = BitLinear(small(), 24, 8, norm=norm).double(), random(2, 6, 24)
    nn.init.normal_(layer.weight)
    loud = x.clone()
    loud[:, 2] *= 20
    others = [0, 1, 3, 4, 5]
    assert torch.equal(layer(x)[:, others], layer(loud)[:, others])


@pytest.mark.parametrize("norm", [True, False])
def test_appended_zeros_change_no_token_through_bitlinear(norm: bool) -> None:
    """The same statistics taken over padding as well."""
    layer, x = BitLinear(small(), 24, 8, norm=norm).double(), random(1, 6, 24)
    nn.init.normal_(layer.weight)
    assert torch.equal(layer(torch.cat([x, torch.zeros(1, 6, 24, dtype=F64)], 1))[:, :6], layer(x))


@pytest.mark.parametrize("norm", [True, False])
def test_bitlinear_of_a_matrix_is_that_of_the_same_batch(norm: bool) -> None:
    """Experts call a layer with [T, D], blocks with [B, T, D]; the two must agree."""
    layer, x = BitLinear(small(), 24, 8, norm=norm).double(), random(2, 6, 24)
    nn.init.normal_(layer.weight)
    assert torch.equal(layer(x.reshape(12, 24)).view(2, 6, 8), layer(x))


@pytest.mark.parametrize("part", ["head", "embedding"])
def test_bitnet_leaves_full_precision_at_both_ends(part: str) -> None:
    """A ternary vocabulary head, and a ternary projection behind the token table."""
    model = build_model(small(use_bitnet=True, use_factorized_embedding=True, factorized_embedding_dim=8))
    quantised = [name for name, module in model.named_modules() if isinstance(module, BitLinear)]
    assert quantised and not [name for name in quantised if name.startswith(part)]


def test_use_bitnet_adds_sub_norms_and_takes_nothing() -> None:
    """Layers with a bias in one mode and without in the other: a flag of precision that changes the architecture."""
    configs = (small(use_bitnet=b, num_layers=6, layer_pattern=tuple(MIXERS)) for b in (False, True))
    plain, ternary = ({n: p.shape for n, p in build_model(cfg).named_parameters()} for cfg in configs)
    assert plain.items() < ternary.items()
    assert all(name.endswith("norm.weight") for name in ternary.keys() - plain.keys())


# ---- model: norms and initial values --------------------------------------------------------------------------------
@pytest.mark.parametrize("norm_type", ["dynamic_tanh", "derf"])
def test_pointwise_norms_are_pointwise(norm_type: str) -> None:
    """A standardisation in front of the tanh, which the formula does not have."""
    norm, x = NORMS[norm_type](small(norm_type=norm_type), 24, site="mixer").double(), random(1, 3, 24)
    moved = x.clone()
    moved[0, 1, 7] += 1
    assert (norm(moved) != norm(x)).nonzero().tolist() == [[0, 1, 7]]


@pytest.mark.parametrize("norm_type", ["dynamic_tanh", "derf"])
def test_pointwise_norms_have_one_alpha_and_a_gain_for_each_channel(norm_type: str) -> None:
    """An alpha for every channel, and no gain and offset behind the tanh."""
    shapes = {
        n: p.numel() for n, p in NORMS[norm_type](small(norm_type=norm_type), 24, site="mixer").named_parameters()
    }
    assert (shapes["alpha"], shapes["weight"], shapes["bias"]) == (1, 24, 24)


@pytest.mark.parametrize("norm_type", NORMS)
def test_features_are_not_bound_to_one(norm_type: str) -> None:
    """A final tanh without a gain keeps every feature, and so every logit, within fixed limits."""
    model = model_of(norm_type=norm_type)
    with torch.no_grad():
        model.final_norm.weight.fill_(50)
    assert bool((model(IDS).last_hidden_state.abs() > 2).any())


@pytest.mark.parametrize("norm_type", NORMS)
def test_every_norm_gets_a_scaled_embedding(norm_type: str) -> None:
    """A small embedding: before a pointwise norm its gradient vanishes, before LayerNorm the loss spikes."""
    model = build_model(small(norm_type=norm_type))
    assert isinstance(model.embedding.scale, nn.Parameter) and model.embedding.scale == model.cfg.hidden_size**0.5


def test_table_starts_small() -> None:
    """A table drawn from N(0, 1), under a head that shares it: first losses far above that of guessing."""
    model = build_model(small(vocab_size=2000))
    assert float(model.embedding.table.weight.std()) == pytest.approx(model.cfg.initial_std, rel=0.05)
    loss = model(IDS, labels=IDS).loss
    assert abs(float(loss) - math.log(2000)) < 0.5


def test_initial_spread_shrinks_with_logical_depth() -> None:
    """No scheme of initialisation: the residual stream grows with every layer and loop."""
    model = build_model(small(hidden_size=128, ffn_hidden_size=512, num_layers=4, num_loops=2, init_std=0.05))
    ffn = model.layers[0].ffn
    assert float(ffn.up.weight.std()) == pytest.approx(0.05, rel=0.05)
    assert float(ffn.down.weight.std()) == pytest.approx(0.05 / math.sqrt(2 * 4 * 2), rel=0.05)


# ---- model: embedding convolution -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 8, 32])
def test_even_embedding_kernel_keeps_length_and_centre(kernel: int) -> None:
    """An even kernel gives one output too many, and cutting it off shifts the window."""
    conv = model_of(use_embedding_conv=True, embedding_conv_kernel=kernel, embedding_conv_residual=False).embedding.conv
    x = torch.zeros(1, 80, 24, dtype=F64)
    x[0, 40] = 1
    y = conv(x, dense(80))
    hit = y[0].abs().sum(-1).nonzero().squeeze(1)
    assert y.shape == x.shape
    assert (int(hit.min()), int(hit.max())) == (40 - kernel // 2, 40 + (kernel - 1) // 2)


def test_embedding_convolution_stops_at_the_border_of_a_document() -> None:
    """A convolution over the whole row mixes padding and neighbours into every document's ends."""
    conv, x = model_of(use_embedding_conv=True, embedding_conv_kernel=5).embedding.conv, random(1, 10, 24)
    packed = conv(x, Sequences.packed(torch.tensor([0, 4, 10], dtype=torch.int32), 6, 10))
    torch.testing.assert_close(packed, torch.cat([conv(x[:, :4], dense(4)), conv(x[:, 4:], dense(6))], 1))


def test_embedding_convolution_can_be_depthwise() -> None:
    """Only a dense filter: width^2 weights for every tap."""
    conv = model_of(use_embedding_conv=True, embedding_conv_depthwise=True, embedding_conv_kernel=3).embedding.conv
    assert sum(p.numel() for p in conv.parameters()) == 24 * 3


def test_embedding_convolution_adds_to_its_input() -> None:
    """Without a residual a convolution near zero wipes out the tokens."""
    conv, x = model_of(use_embedding_conv=True).embedding.conv, random(1, 6, 24)
    with torch.no_grad():
        conv.weight.zero_()
    assert torch.equal(conv(x, dense(6)), x)


@pytest.mark.parametrize("factorised", [True, False])
def test_embedding_convolution_acts_with_and_without_factorisation(factorised: bool) -> None:
    """A field that is silently ignored unless another one is set."""
    model = model_of(use_embedding_conv=True, use_factorized_embedding=factorised, factorized_embedding_dim=8)
    before = model(IDS).last_hidden_state
    with torch.no_grad():
        model.embedding.conv.weight.zero_()
    assert not torch.allclose(before, model(IDS).last_hidden_state)


# ---- model: HoPE ----------------------------------------------------------------------------------------------------
def hope_logits(T: int, dtype: torch.dtype = F64, **options: Any) -> torch.Tensor:
    """log softmax `[T,T]` of equal queries and keys at every place: up to each row's constant, the scores."""
    q = torch.tensor([1.0, 0.3, 0.8, -0.2], dtype=dtype).expand(1, T, 1, 4).contiguous()
    return hope_attention(q, q, torch.eye(T, dtype=dtype)[None, :, None], **options)[0, :, 0].double().log()


@pytest.mark.parametrize("damping", [0.0, 0.05], ids=["angles", "damping"])
def test_hope_scores_depend_on_differences(damping: float) -> None:
    """The same turn on queries and keys gives angles and damping of m + n: a score that fades with absolute place."""
    logits = hope_logits(40, damping=damping)
    scores = logits - logits.diagonal()[:, None]
    torch.testing.assert_close(scores[:30, :30], scores[10:, 10:])
    assert float(scores[0, 20].abs()) > 0.1


def test_hope_tells_all_distances_apart() -> None:
    """Exponents clamped at 12: beyond a dozen tokens all places are one."""
    scores = hope_logits(300, damping=0.01)[0]
    assert bool((scores.diff() < -1e-6).all())


def test_hope_has_no_parameters_of_its_own() -> None:
    """A learned scale in the scores, which is in no formula of the paper."""
    names = [
        {n for n, _ in MIXERS[m](small(layer_pattern=(m,))).named_parameters()} for m in ("titan_attn", "standard_attn")
    ]
    assert names[0] == names[1]


def test_positions_beyond_256_are_exact_in_bfloat16() -> None:
    """Positions in the type of the activations: bfloat16 has no odd integer above 256."""
    x = torch.ones(1, 4, 1, 4, dtype=torch.bfloat16)
    turned = rotary(x, torch.tensor([256, 257, 258, 259]))[0, :, 0]
    exact = rotary(x.double(), torch.tensor([256, 257, 258, 259]))[0, :, 0]
    torch.testing.assert_close(turned.double(), exact, atol=2**-8, rtol=2**-8)
    logits = hope_logits(300, torch.bfloat16, damping=0.05)
    # from key to key the score moves by 0.03 to 0.05; four logarithms of rounded weights err by 2^-9 each
    torch.testing.assert_close(logits[270, 262:270].diff(), logits[20, 12:20].diff(), atol=2**-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_hope_is_finite_far_into_a_sequence(dtype: torch.dtype) -> None:
    """cosh of the position overflows: in half precision after a few tokens, in single precision after some dozens."""
    x = 3 * random(1, 600, 1, 4, dtype=dtype)
    assert bool(hope_attention(x, x, x).isfinite().all())


# ---- model: padding, positions, directions --------------------------------------------------------------------------
@EVERY_MIXER
def test_padding_changes_nothing(mixer: str) -> None:
    """Modules that never see which tokens are padding."""
    model, ids, mask = model_of(layer_pattern=(mixer,)), IDS.repeat(2, 1), torch.ones(2, 8)
    ids[0, 5:], mask[0, 5:] = 0, 0
    ids[1, :3], mask[1, :3] = 0, 0
    hidden = model(ids, mask).last_hidden_state
    torch.testing.assert_close(hidden[0, :5], model(IDS[:, :5]).last_hidden_state[0])
    torch.testing.assert_close(hidden[1, 3:], model(IDS[:, 3:]).last_hidden_state[0])


@EVERY_MIXER
def test_every_mixer_knows_the_order_of_tokens(mixer: str) -> None:
    """Attention without positions: an encoder of bags of words."""
    model, order = model_of(layer_pattern=(mixer,)), torch.tensor([3, 0, 6, 1, 7, 2, 5, 4])
    shuffled = model(IDS[:, order]).last_hidden_state
    assert not torch.allclose(shuffled, model(IDS).last_hidden_state[:, order], atol=1e-6)


@pytest.mark.parametrize("preset", presets())
def test_every_preset_knows_the_order_of_tokens(preset: str) -> None:
    """Presets whose only mixer has no positions."""
    sizes = (
        "vocab_size=64 hidden_size=32 num_layers=2 num_heads=2 retention_heads=2 ffn_hidden_size=16 "
        "factorized_embedding_dim=8 use_embedding_conv=false use_bitnet=false dropout=0"
    )
    cfg = load_config(preset, [f"model.{s}" for s in sizes.split()])
    torch.manual_seed(0)
    model, order = build_model(cfg).double().eval(), torch.tensor([3, 0, 6, 1, 7, 2, 5, 4])
    shuffled = model(IDS[:, order]).last_hidden_state
    assert not torch.allclose(shuffled, model(IDS).last_hidden_state[:, order], atol=1e-9)


@EVERY_MIXER
def test_every_mixer_sees_both_sides_and_far(mixer: str) -> None:
    """An encoder with a causal mixer, and a mixer that is no more than a linear map of each token."""
    mixer = model_of(layer_pattern=(mixer,)).layers[0].mixer
    x = random(1, 24, 24)
    for changed, seen in ((0, 23), (23, 0)):
        moved = x.clone()
        moved[0, changed] += random(24, seed=1)
        assert float((mixer(moved, dense(24)) - mixer(x, dense(24)))[0, seen].abs().max()) > 1e-9


@EVERY_MIXER
def test_a_mixer_whose_output_map_is_zero_adds_nothing(mixer: str) -> None:
    """A second residual inside a mixer: the block adds its input twice."""
    module = model_of(layer_pattern=(mixer,)).layers[0].mixer
    maps = [m for name, m in module.named_modules() if name.rpartition(".")[2] in ("out", "out_proj")]
    with torch.no_grad():
        maps[0].weight.zero_()
    assert len(maps) == 1 and not bool(module(random(1, 5, 24), dense(5)).any())


@EVERY_MIXER
def test_every_buffer_of_a_model_is_read(mixer: str) -> None:
    """Registered tables that no forward pass looks at."""
    for name, _ in build_model(small(layer_pattern=(mixer,))).named_buffers():
        model = model_of(layer_pattern=(mixer,))
        before = model(IDS).last_hidden_state
        model.get_buffer(name).mul_(0.7)
        assert not torch.equal(before, model(IDS).last_hidden_state), name


# ---- model: sigmoid attention ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [4, 40, 400])
def test_sigmoid_rows_sum_to_one_at_any_length(n: int) -> None:
    """Without the bias of -ln n a row of sigmoids sums to n / 2."""
    zero, one = torch.zeros(1, n, 1, 4, dtype=F64), torch.ones(1, n, 1, 4, dtype=F64)
    torch.testing.assert_close(sigmoid_attention(zero, zero, one), one * n / (n + 1))


def test_sigmoid_weights_do_not_couple() -> None:
    """Rows divided by their sum are a flatter softmax, not sigmoid attention."""
    q, k, v = random(1, 6, 1, 4), random(1, 6, 1, 4, seed=1), torch.zeros(1, 6, 1, 4, dtype=F64)
    v[0, 0] = 1  # only key 0 speaks
    other = k.clone()
    other[0, 3:] += 2
    assert torch.equal(sigmoid_attention(q, k, v), sigmoid_attention(q, other, v))


# ---- model: ode -----------------------------------------------------------------------------------------------------
def test_ode_can_depend_on_time() -> None:
    """A derivative f(z, t) that never uses t."""
    model = model_of(layer_pattern=("ode",), ode_time="additive", ode_steps=2)
    before = model(IDS).last_hidden_state
    with torch.no_grad():
        model.layers[0].mixer.time.copy_(random(24))
    assert not torch.allclose(before, model(IDS).last_hidden_state)


def test_ode_normalises_once() -> None:
    """A norm before the solver and another one inside it."""
    block, x = model_of(layer_pattern=("ode",), ode_solver="euler").layers[0], random(1, 5, 24)
    ode = block.mixer
    mixed = x + ode.attention(ode.norm(x), dense(5))
    torch.testing.assert_close(block(x, dense(5))[0], mixed + block.ffn(block.ffn_norm(mixed))[0])


@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_zero_field_ode_is_identity(solver: str) -> None:
    """The solver starts at x, and the block adds x to its result."""
    block, x = model_of(layer_pattern=("ode",), ode_solver=solver, ode_steps=3).layers[0], random(1, 5, 24)
    with torch.no_grad():
        block.mixer.attention.out.weight.zero_()
    assert torch.equal(block(x, dense(5))[0], x + block.ffn(block.ffn_norm(x))[0])


def test_ode_draws_no_dropout_inside_the_solver() -> None:
    """A new mask at every stage makes the field random and ruins the solver's order."""
    block, x = model_of(layer_pattern=("ode",), dropout=0.5).layers[0].train(), random(1, 5, 24)
    assert torch.equal(block.mixer(x, dense(5)), block.mixer(x, dense(5)))
    assert not torch.equal(block(x, dense(5))[0], block(x, dense(5))[0])


def test_ode_keeps_one_step_of_the_solver_in_memory() -> None:
    """Every stage of every step kept for the backward pass."""

    def kept(mode: str) -> int:
        ode, sizes = model_of(layer_pattern=("ode",), ode_steps=8, ode_checkpoint=mode).layers[0].mixer, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            ode(random(1, 16, 24).requires_grad_(), dense(16))
        return sum(sizes)

    assert kept("step") < kept("none") / 8


# ---- model: retention -----------------------------------------------------------------------------------------------
def test_long_retention_makes_no_matrix_of_all_pairs() -> None:
    """A decay matrix of T x T, built anew in every call."""
    q = random(1, 2048, 1, 8, dtype=torch.float32)
    with Watch() as watch:
        retention(q, q, q, torch.tensor([-0.1]))
    assert watch.largest < 2048**2 / 8


def test_retention_turns_queries_and_keys() -> None:
    """Without rotation retention knows how far away a token is, but not on which side."""
    x = random(1, 9, 24)
    for rotated in (True, False):
        mixer = model_of(layer_pattern=("retnet",), retention_rotary=rotated).layers[0].mixer
        mirrored = mixer(x.flip(1), dense(9)).flip(1)
        assert torch.allclose(mirrored, mixer(x, dense(9))) == (not rotated)


def test_retention_scores_are_of_order_one_at_any_length() -> None:
    """Unnormalised rows grow to the length of the memory: a thousand times for a slow head."""
    mixer = MIXERS["retnet"](small(retention_heads=4))
    for T in (16, 400):
        q, k, v = (random(1, T, 4, 6, dtype=torch.float32, seed=s) for s in range(3))
        spread = retention(q, k, v, mixer.log_decay, scale=mixer.scale).std((0, 1, 3))
        # sqrt((1 + g²) / (1 + g)²) = 0.71 to 1 far from the ends
        assert bool((spread < 1.3).all()) and (T == 16 or bool((spread > 0.5).all()))


def retention_heads(mixer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the output map gets: the gated, normalised heads."""
    seen: list[torch.Tensor] = []
    handle = mixer.out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mixer(x, dense(x.shape[1]))
    handle.remove()
    return seen[0]


def test_retention_normalises_each_head_alone() -> None:
    """One norm over all heads: a loud head silences the others."""
    mixer, x = model_of(layer_pattern=("retnet",)).layers[0].mixer, random(1, 6, 24)
    before = retention_heads(mixer, x)
    with torch.no_grad():
        mixer.qkvg.weight[48:60] *= 100  # the values of head 0 of 2
    torch.testing.assert_close(retention_heads(mixer, x)[..., 12:], before[..., 12:])


@pytest.mark.parametrize("norm_type", ["dynamic_tanh", "derf"])
def test_retention_keeps_its_scale_free_norm_under_pointwise_norms(norm_type: str) -> None:
    """A saturating function in its place turns heads into signs."""
    mixer, x = model_of(layer_pattern=("retnet",), norm_type=norm_type).layers[0].mixer, random(1, 6, 24)
    with torch.no_grad():
        mixer.qkvg.weight[48:72] *= 10
        before = retention_heads(mixer, x)
        mixer.qkvg.weight[48:72] *= 100
    torch.testing.assert_close(retention_heads(mixer, x), before, rtol=1e-3, atol=1e-4)


# ---- model: mixture of experts, feed-forward ------------------------------------------------------------------------
def test_gates_of_equal_experts_sum_to_one() -> None:
    """Top-k probabilities that are not scaled to 1 shrink the layer's output."""
    ffn, x = model_of(use_moe=True, top_k_experts=2).layers[0].ffn, random(1, 5, 24)
    with torch.no_grad():
        for w in (ffn.w_in, ffn.w_out):
            w.copy_(w[:1].expand_as(w))
    expert = torch.nn.functional.silu(x @ ffn.w_in[0].t()) @ ffn.w_out[0].t()
    torch.testing.assert_close(ffn(x)[0], expert)


@pytest.mark.parametrize("term", ["moe_aux_loss", "moe_z_loss"])
def test_router_is_balanced_by_a_loss(term: str) -> None:
    """No balance and no z-loss: nothing keeps the router from one expert, or from growing logits."""
    model = model_of(use_moe=True, **{"moe_aux_loss": 0.0, "moe_z_loss": 0.0, term: 0.1})
    out = model(IDS)
    out.aux_loss.backward()
    assert float(out.aux_loss) > 0 and bool(model.layers[0].ffn.router.weight.grad.any())
    assert small(use_moe=True).moe_aux_loss > 0 and small(use_moe=True).moe_z_loss > 0


def test_padding_is_not_routed() -> None:
    """Padding that takes part in the experts' load."""
    model, mask = model_of(use_moe=True, top_k_experts=2), torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    assert int(model(IDS, mask).moe_stats[0].counts.sum()) == 5 * 2


def test_experts_work_does_not_multiply_with_top_k() -> None:
    """A loop over k times E pairs, each with its own mask and products."""
    counts = []
    for k in (1, 4):
        ffn = model_of(use_moe=True, num_experts=4, top_k_experts=k).layers[0].ffn
        with Watch() as watch, torch.no_grad():
            ffn(random(1, 64, 24))
        counts.append(watch.products)
    assert counts[1] <= counts[0] <= 1 + 2 * 4  # the router, and two products for each expert


@pytest.mark.parametrize("use_moe", [True, False])
def test_feed_forward_can_be_gated(use_moe: bool) -> None:
    """Neither the dense network nor the experts had a gate to choose."""
    plain, gated = (model_of(use_moe=use_moe, ffn_gated=g).layers[0].ffn(random(1, 5, 24))[0] for g in (False, True))
    assert plain.shape == gated.shape and not torch.allclose(plain, gated)


def test_an_idle_expert_is_not_an_error(config, tmp_path: Path) -> None:
    """A check for zero gradients that stops the run as soon as one expert gets no token."""
    cfg = config(
        {"use_moe": True, "num_experts": 64, "top_k_experts": 1}, log_gradient_stats=True, gradient_log_interval=1
    )
    rows = training_rows(train(cfg, tmp_path / "run"))
    assert max(row["moe_dead_experts"] for row in rows) > 0 and not any(row["skipped"] for row in rows)


# ---- model: head, loops, interface ----------------------------------------------------------------------------------
def test_head_is_tied() -> None:
    """A second matrix of the vocabulary's size, for nothing."""
    model = build_model(small(vocab_size=1000))
    assert [n for n, p in model.named_parameters() if p.dim() == 2 and 1000 in p.shape] == ["embedding.table.weight"]


def test_a_training_step_makes_logits_of_labelled_tokens_alone() -> None:
    """Logits, and an argmax over the vocabulary, for every token of the batch."""
    model = build_model(small(vocab_size=5000))
    ids = torch.randint(5, 5000, (1, 200))
    labels = torch.full_like(ids, -100)
    labels[0, ::20] = 7
    with Watch() as watch:
        model(ids, labels=labels).loss.backward()
    assert watch.largest <= 24 * 5000  # the table's own gradient


def test_loops_can_tell_themselves_apart() -> None:
    """The same layers again, without a signal of which pass it is."""
    model = model_of(num_loops=2)
    before = model(IDS).last_hidden_state
    for p in model.loops.parameters():
        with torch.no_grad():
            p.add_(1)
        assert not torch.allclose(before, model(IDS).last_hidden_state)


def test_building_a_model_leaves_the_config_alone() -> None:
    """A model that writes into its caller's config."""
    cfg = small(use_moe=True, use_factorized_embedding=True, num_loops=2)
    before = cfg.model_dump()
    build_model(cfg)(IDS)
    assert cfg.model_dump() == before
    with pytest.raises(ValueError, match="frozen"):
        cfg.hidden_size = 48  # type: ignore[misc]


def test_what_the_readme_imports_exists() -> None:
    """A README with classes and attributes that the code does not have."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(hasattr(importlib.import_module(node.module or ""), alias.name) for alias in node.names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ultra":
            assert hasattr(ultra, node.attr), node.attr
    calls = {
        n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "pipeline"
    }
    assert calls and all(hasattr(Pipeline, name) for name in calls)


# ---- optimisation: rates, groups ------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.e-6", "2e3"])
def test_exponents_without_a_point_are_numbers(text: str, tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-6 as a text, and the optimizer dies of it."""
    (tmp_path / "c.yaml").write_text(f"training:\n  lr_other: {text}\n")
    training = load_config(tmp_path / "c.yaml").training
    assert training.lr_other == float(text)
    model = build_model(small())
    GroupedOptimizer(collect_groups(model, training), training)


@pytest.mark.parametrize("preset", presets())
def test_presets_rates_can_move_the_weights(preset: str) -> None:
    """Rates so small that the whole schedule moves a weight by less than its initial spread."""
    cfg = load_config(preset)
    reach = travel(cfg.training.steps, cfg.training)
    assert {
        g: cfg.training.optim(g).lr * reach for g in GROUPS if cfg.training.optim(g).lr * reach < cfg.model.initial_std
    } == {}


def test_rates_that_cannot_train_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Ten thousand steps at 1e-6, and no word about it."""
    training = TrainingConfig(**{f"lr_{g}": 1e-6 for g in GROUPS})
    warn_if_rates_cannot_train(collect_groups(build_model(small()), training), 10000, training, 0.02)
    assert "hardly trains" in caplog.text


MIXER_OF_GROUP = {"retnet": "retnet", "mamba": "mamba", "ode": "ode", "attention": "sigmoid_attn"}


@pytest.mark.parametrize("group", GROUPS)
def test_each_rate_moves_its_own_group(group: str) -> None:
    """Groups found by words in parameter names that never occur there: three rates without effect."""
    torch.manual_seed(0)
    model = build_model(small(num_layers=6, layer_pattern=tuple(MIXERS)))
    training = TrainingConfig(**{f"lr_{g}": 0.1 * (g == group) for g in GROUPS})
    optimizer = GroupedOptimizer(collect_groups(model, training), training)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(IDS, labels=IDS).loss.backward()
    optimizer.step(GOOD)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, _, _ in model.param_groups()[group]}
    of_mixer = {n for n in moved if ".mixer." in n and "norm" not in n}
    if group in MIXER_OF_GROUP:
        layer = tuple(MIXERS).index(MIXER_OF_GROUP[group])
        assert {n for n in of_mixer if n.startswith(f"layers.{layer}.")}
    else:
        assert not of_mixer and moved


def test_token_table_is_in_the_embeddings_group() -> None:
    """A table whose name is not the expected one, and which trains at the rate of all the rest."""
    for factorised in (True, False):
        model = build_model(small(use_factorized_embedding=factorised, factorized_embedding_dim=8))
        names = [n for n, _, _ in model.param_groups()["embeddings"]]
        assert names == [n for n, _ in model.named_parameters() if n.startswith("embedding.")]


def test_names_decide_no_group() -> None:
    """'ode' is in 'model', 'encoder' and 'decoder': a whole network in the group of its few ODE layers."""
    model = build_model(small(tie_embeddings=False))
    assert any("decoder" in n for n, _ in model.named_parameters()) and model.param_groups()["ode"] == []


@pytest.mark.parametrize("norm_type", NORMS)
def test_biases_and_the_like_are_never_decayed(norm_type: str) -> None:
    """Weight decay on biases, time constants and the slopes of norms."""
    model = build_model(small(num_layers=6, layer_pattern=tuple(MIXERS), norm_type=norm_type))
    training = TrainingConfig()
    optimizer = GroupedOptimizer(collect_groups(model, training), training)
    for part in optimizer.parts:
        for group in part.param_groups:
            for p in group["params"] if group["weight_decay"] else ():
                name = optimizer.names[id(p)].rpartition(".")[2]
                assert p.dim() > 1 or name in ("weight", "gain"), optimizer.names[id(p)]
                assert "bias" not in name and name not in ("A_log", "D", "alpha", "shift", "scale")


def test_rate_halving_survives_the_scheduler(config, tmp_path: Path, monkeypatch) -> None:
    """A rate halved in the optimizer's groups, which the scheduler's next step overwrites."""
    used, step = [], GroupedOptimizer.step

    def watched(self: GroupedOptimizer, skip: torch.Tensor) -> None:
        used.append(self.parts[0].param_groups[0]["lr"])
        step(self, skip)

    monkeypatch.setattr(GroupedOptimizer, "step", watched)
    poison(monkeypatch, lambda data_step: data_step in (2, 3))
    cfg = config(nan_check_interval=1, max_nan_retries=2, checkpoint_every_n_steps=1, scheduler_total_steps=5)
    train(cfg, tmp_path / "run")
    assert used == [1e-3] * 4 + [5e-4] * 3  # steps 3 and 4 failed and went back to 2
    train(cfg.model_copy(update={"training": cfg.training.model_copy(update={"max_steps": 7})}), tmp_path / "run")
    assert used[-2:] == [5e-4] * 2  # a resume


def test_the_schedule_ends_where_the_run_ends(caplog: pytest.LogCaptureFixture) -> None:
    """A cosine that is at zero long before the end of a run whose length stands elsewhere."""
    training = TrainingConfig(scheduler_total_steps=50)
    assert training.steps == 50 and lr_factor(49, training) > 0
    longer = TrainingConfig(scheduler_total_steps=50, max_steps=60)
    warn_if_rates_cannot_train(collect_groups(build_model(small()), longer), longer.steps, longer, 0.02)
    assert "train nothing" in caplog.text


# ---- optimisation: GaLore -------------------------------------------------------------------------------------------
def galore(model: nn.Module, **training: Any) -> GroupedOptimizer:
    cfg = TrainingConfig(use_galore=True, **{"galore_rank": 4, **training}, **{f"wd_{g}": 0.0 for g in GROUPS})
    return GroupedOptimizer(collect_groups(model, cfg), cfg)


def test_galore_keeps_its_state_in_the_subspace() -> None:
    """A gradient cut to low rank under a full Adam state: no memory saved."""
    model = build_model(small())
    optimizer = galore(model)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step(GOOD)
    state = optimizer.state_tensors()
    assert state["layers.0.ffn.up.weight.exp_avg"].shape == (4, 32)
    assert state["layers.0.ffn.up.weight.exp_avg_sq"].shape == (4, 32)


def test_galore_projects_and_scales_every_step() -> None:
    """A factor that acts only on the steps that renew the projection."""
    moves = []
    for scale in (1.0, 0.25):
        torch.manual_seed(0)
        model = build_model(small())
        optimizer, weight = galore(model, galore_scale=scale, galore_update_interval=3), model.layers[0].ffn.up.weight
        for step in range(4):
            before = weight.detach().clone()
            weight.grad = random(*weight.shape, dtype=torch.float32, seed=step)
            optimizer.step(GOOD)
            moves.append(weight.detach() - before)
            assert int(torch.linalg.matrix_rank(moves[-1], rtol=1e-3)) == 4
    for whole, quarter in zip(moves[:4], moves[4:], strict=True):
        torch.testing.assert_close(quarter, whole / 4, rtol=1e-3, atol=1e-7)


def test_galore_leaves_tables_alone() -> None:
    """Tables excluded by a name that they do not have."""
    model = build_model(small(use_factorized_embedding=True, factorized_embedding_dim=8, tie_embeddings=False))
    optimizer = galore(model)
    projected = {optimizer.names[id(p)] for g in optimizer.parts[1].param_groups for p in g["params"]}
    assert projected and not [n for n in projected if n.startswith(("embedding.", "head."))]


def test_galore_needs_no_full_svd_and_tells_what_a_refresh_costs(monkeypatch, caplog) -> None:
    """A singular value decomposition of every matrix at every step, by default."""

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("full SVD")

    model = build_model(small())
    optimizer = galore(model)
    monkeypatch.setattr(torch.linalg, "svd", refused)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step(GOOD)
    assert "galore_update_interval=1" in caplog.text


# ---- trainer: gradients, precision, bad steps -----------------------------------------------------------------------
def test_documents_of_one_row_do_not_see_each_other_in_training(config, tmp_path: Path) -> None:
    """A trainer that calls the model with the ids alone."""
    t = make_trainer(config(gradient_accumulation_steps=1), tmp_path)
    [batch] = steps(t.data, 1)[0]
    loss, _, _ = t.backward([batch])
    parts = list(health.documents(batch))
    alone = [t.model(part.input_ids, labels=part.labels).loss_sum for part in parts]
    assert len(parts) > 1
    torch.testing.assert_close(loss, torch.stack(alone).sum().detach() / batch.num_labelled)


def test_accumulation_weighs_every_token_alike(config, tmp_path: Path) -> None:
    """A mean of the means of micro-batches of different numbers of labels."""
    grads = []
    for size, accum in ((4, 1), (1, 4)):
        t = make_trainer(config(batch_size=size, gradient_accumulation_steps=accum), tmp_path)
        micro_batches = steps(t.data, 1)[0]
        assert accum == 1 or len({b.num_labelled for b in micro_batches}) > 1
        t.backward(micro_batches)
        grads.append({n: p.grad for n, p in t.model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


def test_a_step_reads_no_value_for_each_parameter(config, tmp_path: Path) -> None:
    """One wait for the device for every parameter of every micro-batch."""
    reads = []
    for layers in (1, 4):
        (tmp_path / str(layers)).mkdir()
        t = make_trainer(config({"num_layers": layers, "layer_pattern": ("standard_attn",)}), tmp_path / str(layers))
        with Watch() as watch:
            assert t.run() == 0
        reads.append(watch.reads)
    assert reads[0] == reads[1] > 0


def test_gradient_norm_is_the_root_of_the_sum_of_squares(config, tmp_path: Path) -> None:
    """The sum of all norms, named the norm."""
    for row in training_rows(train(config(gradient_log_interval=1), tmp_path / "run")):
        parts = [row[f"grad_norm_{g}"] for g in GROUPS if f"grad_norm_{g}" in row]
        assert len(parts) == 5 and math.hypot(*parts) == pytest.approx(row["grad_norm"], rel=1e-5)


def test_gradient_statistics_are_of_the_unscaled_gradient(config, tmp_path: Path) -> None:
    """Norms and thresholds applied to gradients that still carry the loss scale of fp16."""
    found = []
    for scale in (1.0, 1024.0):
        t = make_trainer(config(gradient_log_interval=1), tmp_path)
        t.scale.active, t.scale.value = True, torch.tensor(scale)
        _, _, stats = t.backward(steps(t.data, 1)[0])
        found.append({k: float(v) for k, v in t.statistics(stats).items() if k.startswith("grad_norm")})
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_fp16_overflow_lowers_the_scale_and_the_next_step_is_made(config, tmp_path: Path) -> None:
    """A step left out without telling the scaler, which then refuses the next one."""
    t = make_trainer(config(), tmp_path)
    t.scale.active, t.scale.value = True, torch.tensor(1024.0)
    inf = torch.tensor(float("inf"))
    t.note(torch.tensor(1.0), inf, torch.tensor(True))
    assert t.scale.value == 512 and not t.made[-1].fault
    loss, _, _ = t.backward(steps(t.data, 1)[0])
    assert bool(loss.isfinite())


def test_bf16_takes_no_loss_scale() -> None:
    """bfloat16 has the range of float32; a scaler only adds failed steps."""
    scale = LossScale(torch.bfloat16, torch.device("cpu"))
    scale.update(torch.tensor(True))
    assert not scale.active and scale.value == 1


def test_a_healthy_step_that_was_clipped_counts(config, tmp_path: Path) -> None:
    """The norm before clipping compared with a limit for the norm after it: good steps left out, rates halved."""
    cfg = config(grad_clip_max_norm=1e-3, inf_post_clip_threshold=1e-2, nan_check_interval=1)
    rows = training_rows(train(cfg, tmp_path / "run"))
    assert all(row["grad_norm"] > 1e-2 and not row["skipped"] and row["lr"] == 1e-3 for row in rows)


def test_a_bad_batch_is_left_out_and_the_run_goes_on(config, tmp_path: Path, monkeypatch) -> None:
    """An exception at the first value that is not finite: the code that would have dealt with it is never reached."""
    poison(monkeypatch, lambda data_step: data_step == 2)
    rows = training_rows(train(config(), tmp_path / "run"))
    assert [row["step"] for row in rows if row["skipped"]] == [3]
    assert all(bool(t.isfinite().all()) for t in weights(tmp_path / "run").values())


def test_a_bad_step_leaves_no_gradient_behind_and_takes_no_sample_from_others(
    config, tmp_path: Path, monkeypatch
) -> None:
    """A retry that drops what the other micro-batches had accumulated, or keeps it for the next step."""
    poison(monkeypatch, lambda data_step: data_step == 2)
    seen, backward = [], trainer.Trainer.backward

    def watched(self: trainer.Trainer, batches: list[Batch]) -> Any:
        assert all(p.grad is None for p in self.model.parameters())
        seen.extend(b.first_sample for b in batches)
        return backward(self, batches)

    monkeypatch.setattr(trainer.Trainer, "backward", watched)
    train(config(), tmp_path / "run")
    assert seen == list(range(0, 6 * 2 * 2, 2))


def test_going_back_passes_over_the_bad_samples(config, tmp_path: Path, monkeypatch) -> None:
    """A retry of the same batch with the same weights, which fails in the same way."""
    poison(monkeypatch, lambda data_step: data_step in (2, 3))
    cfg = config(nan_check_interval=1, max_nan_retries=2, checkpoint_every_n_steps=1, scheduler_total_steps=5)
    rows = training_rows(train(cfg, tmp_path / "run"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and not any(row["skipped"] for row in rows)
    state = checkpoint.read_state(checkpoint.resolve(tmp_path / "run"))
    assert state["data_step"] == 7


def test_a_batch_without_labels_trains_nothing() -> None:
    """No token chosen, so [CLS] is taken for the target."""
    model = build_model(small())
    model(IDS, labels=torch.full_like(IDS, -100)).loss.backward()
    assert not any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


def test_the_chosen_device_is_the_one_taken(monkeypatch) -> None:
    """`device or "cuda" if ...`, which binds otherwise than it reads."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (pick_device("cpu").type, pick_device("auto").type) == ("cpu", "cuda")


def test_no_step_empties_the_allocator(config, tmp_path: Path, monkeypatch) -> None:
    """The allocator's cache given back every few steps, and asked for anew."""

    def refused() -> None:
        raise AssertionError("empty_cache")

    monkeypatch.setattr(torch.cuda, "empty_cache", refused)
    monkeypatch.setattr(torch.cuda.memory, "empty_cache", refused)
    train(config(scheduler_total_steps=52, gradient_accumulation_steps=1), tmp_path / "run")


def test_out_of_memory_ends_with_advice(config, tmp_path: Path, monkeypatch) -> None:
    """A handler that goes on while its exception keeps the graph, and so the memory, alive."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(trainer.Trainer, "backward", full)
    with pytest.raises(UserError, match="batch_size"):
        trainer.train(config(), run_dir=tmp_path / "run")


# ---- trainer: evaluation, checkpoints, resume -----------------------------------------------------------------------
def test_best_is_by_held_out_loss(config, tmp_path: Path) -> None:
    """The best checkpoint chosen by the training loss of a single micro-batch."""
    cfg = config(val_interval=2, num_best_checkpoints=2)
    evaluated = {row["step"]: row["eval_loss"] for row in train(cfg, tmp_path / "run") if "eval_loss" in row}
    best = checkpoint.read_state(checkpoint.resolve(tmp_path / "run"))["best"]
    assert len(best) == 2 and all(evaluated[step] == loss for loss, step in best)
    assert [step for _, step in best] == sorted(evaluated, key=evaluated.__getitem__)[:2]


def test_checkpoints_are_written_when_due(config, tmp_path: Path, monkeypatch) -> None:
    """Every new minimum of a noisy training loss written out in full: at nearly every early step."""
    saved, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda run, step, **c: saved.append(step) or save(run, step, **c))
    train(config(scheduler_total_steps=30, val_interval=15, checkpoint_every_n_steps=20), tmp_path / "run")
    assert set(saved) <= {15, 20, 30} and {20, 30} <= set(saved) and len(saved) == len(set(saved))


def test_held_out_documents_are_not_trained_on(config) -> None:
    """No held-out documents at all."""
    data = open_data(config())
    held_out = b" ".join(original(b).tobytes() for b in data.eval_batches())
    trained = {
        original(b)[a:e].tobytes() for s in steps(data, 150) for b in s for a, e in itertools.pairwise(b.cu_seqlens)
    }
    whole = [d for d in trained if len(d) > 8 * 6]
    assert whole and not any(d in held_out for d in whole)


def test_seed_decides_the_run(config, tmp_path: Path) -> None:
    """No seed: no run can be made again."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(config({"dropout": 0.1}, seed=seed), tmp_path / name)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert same(a, b) and not same(a, c)


def test_a_kill_while_saving_leaves_the_last_checkpoint(config, tmp_path: Path, monkeypatch) -> None:
    """A checkpoint written in place: whoever is killed meanwhile has neither the old nor the new one."""
    run, save_file = tmp_path / "run", checkpoint.save_file
    train(config(max_steps=2), run)

    def killed(tensors: Any, path: Path) -> None:
        if "optimizer" in path.name:
            raise KeyboardInterrupt
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(config(max_steps=4), run_dir=run)
    found = checkpoint.latest(run)
    assert found is not None and checkpoint.read_state(found)["step"] == 2
    assert training_rows(train(config(max_steps=4), run))[-1]["step"] == 4


def test_resume_reads_no_pickle(config, tmp_path: Path, monkeypatch) -> None:
    """A config object pickled into the checkpoint, which torch has refused to load since 2.6."""
    run = tmp_path / "run"
    train(config(max_steps=2), run)
    folder = checkpoint.resolve(run)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json", ".yaml"}

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refused)
    assert training_rows(train(config(max_steps=4), run))[-1]["step"] == 4


def test_resume_is_the_unbroken_run(config, tmp_path: Path) -> None:
    """Generators and the place in the data lost: dropout, samples and epoch start over."""
    model = {"dropout": 0.2}
    for stop in (3, 6):
        train(config(model, max_steps=stop), tmp_path / "parts")
        torch.manual_seed(stop)
    train(config(model, max_steps=6), tmp_path / "whole")
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    losses = [
        [row["loss"] for row in training_rows(list(read_rows(tmp_path / r / "metrics.jsonl")))]
        for r in ("parts", "whole")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_resume_remembers_which_checkpoints_it_may_delete(config, tmp_path: Path) -> None:
    """Lists of kept checkpoints lost in a resume: the disk fills with those of before."""
    common = dict(checkpoint_every_n_steps=1, max_rolling_checkpoints=2, num_best_checkpoints=1, val_interval=2)
    for stop in (3, 6):
        train(config(max_steps=stop, **common), tmp_path / "run")
    state = checkpoint.read_state(checkpoint.resolve(tmp_path / "run"))
    assert set(checkpoint.steps(tmp_path / "run")) == {5, 6, state["best"][0][1]}


# ---- trainer: fields that must act, and those that do not exist -----------------------------------------------------
def test_nan_check_interval_is_when_the_host_looks(config, tmp_path: Path, monkeypatch) -> None:
    """A documented field that nothing reads."""
    looks, look = [], trainer.Trainer.look_at_flags
    monkeypatch.setattr(trainer.Trainer, "look_at_flags", lambda self: looks.append(self.state.step) or look(self))
    train(config(nan_check_interval=4), tmp_path / "run")
    assert looks == [4, 6]  # and before the last checkpoint


@pytest.mark.parametrize(("logged", "expected"), [(True, [2, 4, 6]), (False, [])])
def test_gradient_statistics_follow_their_two_fields(config, tmp_path: Path, logged: bool, expected: list[int]) -> None:
    """Two documented fields that nothing reads."""
    rows = training_rows(train(config(log_gradient_stats=logged, gradient_log_interval=2), tmp_path / "run"))
    assert [row["step"] for row in rows if "grad_norm_other" in row] == expected


@pytest.mark.parametrize("section", ["model", "training"])
def test_a_misspelt_field_is_an_error_with_its_place(section: str, tmp_path: Path) -> None:
    """Unknown fields collected somewhere and never looked at: a typo is a default."""
    known = {"model": "hidden_size", "training": "batch_size"}[section]
    (tmp_path / "c.yaml").write_text(f"{section}:\n  {known}x: 4\n")
    with pytest.raises(UserError, match=rf"c\.yaml:2:3: {section}\.{known}x: unknown field; did you mean '{known}'"):
        load_config(tmp_path / "c.yaml")


# ---- data: masks ----------------------------------------------------------------------------------------------------
def test_kept_tokens_have_labels_and_loss(config) -> None:
    """Targets told by label != input: the tenth that stays as it is, is never predicted."""
    data = open_data(config(mask_strategy=(0.0, 0.0, 1.0), mlm_probability=0.5))
    batch = steps(data, 1)[0][0]
    chosen = batch.labels != -100
    assert batch.num_labelled == int(chosen.sum()) > 0 and torch.equal(batch.labels[chosen], batch.input_ids[chosen])
    out = build_model(small(vocab_size=300))(batch.input_ids, labels=batch.labels)
    assert int(out.num_labelled) == batch.num_labelled and float(out.loss.detach()) > 1


def test_the_three_shares_of_masking_are_kept(config) -> None:
    """80/10/10 in the config and 80/10/0 in the loss."""
    batches = [b for s in steps(open_data(config(mlm_probability=0.5)), 150) for b in s]
    ids, labels = torch.cat([b.input_ids[0] for b in batches]), torch.cat([b.labels[0] for b in batches])
    ids, labels = ids[labels >= 0], labels[labels >= 0]
    shares = [
        (ids == 4).double().mean(),
        ((ids != 4) & (ids != labels)).double().mean(),
        (ids == labels).double().mean(),
    ]
    # 5 standard deviations of a share of 0.8 or 0.1; a random token is the old one once in 295
    assert len(ids) > 3000 and all(
        abs(float(s) - p) < 5 * (0.16 / len(ids)) ** 0.5 for s, p in zip(shares, (0.8, 0.1, 0.1), strict=True)
    )


def test_specials_and_padding_are_never_masked(config) -> None:
    """[CLS], [SEP] and padding masked and predicted: of a short text mostly that."""
    batches = list(itertools.chain.from_iterable(steps(open_data(config(mlm_probability=0.9)), 60)))
    ids, labels = np.concatenate([original(b) for b in batches]), torch.cat([b.labels[0] for b in batches])
    assert {2, 3} <= set(ids.tolist()) and bool((labels[torch.from_numpy(ids < 5)] == -100).all())


def test_random_replacements_are_ordinary_tokens(config) -> None:
    """A replacement drawn from all ids: [PAD] or [SEP] in the middle of a sentence."""
    data = open_data(config(mlm_probability=0.9, mask_strategy=(0.0, 1.0, 0.0)))
    for batch in itertools.chain.from_iterable(steps(data, 60)):
        assert bool((batch.input_ids[batch.labels >= 0] >= 5).all())


def epochs(data: CorpusData, count: int) -> list[dict[bytes, list[bytes]]]:
    """Per epoch: the window before masking -> its labels, for micro-batches of one window."""
    size = sum(int(corpus.train_counts().sum()) for corpus in data.corpora)
    rows = itertools.islice(itertools.chain.from_iterable(data.train_batches(0)), size * count)
    found: list[dict[bytes, list[bytes]]] = [{} for _ in range(count)]
    for i, batch in enumerate(rows):
        found[i // size].setdefault(original(batch).tobytes(), []).append(batch.labels.numpy().tobytes())
    return found


def test_masks_differ_between_epochs(config) -> None:
    """Masks drawn once and kept in the cache: every epoch asks the same questions."""
    first, second = epochs(open_data(config(batch_size=1)), 2)
    assert first.keys() == second.keys()
    assert sum(first[w] == second[w] for w in first) < len(first) / 4


def test_the_number_of_masked_tokens_varies(config) -> None:
    """Exactly 15 % of every text, rounded down: none in a short one, and never more."""
    counts = [b.num_labelled for s in steps(open_data(config(batch_size=1, mlm_probability=0.15)), 100) for b in s]
    assert min(counts) >= 1 and len(set(counts)) >= 4


# ---- data: tokens, windows ------------------------------------------------------------------------------------------
def word_tokenizer(path: Path, specials: list[str]) -> Path:
    words = [*specials, *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=specials[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(path))
    return path


def test_special_ids_are_the_tokenizers(config, tmp_path: Path) -> None:
    """Ids 0 to 3 taken for granted where the tokenizer has 4 to 7: the mask written is an end of text."""
    file = word_tokenizer(
        tmp_path / "tokenizer.json", ["<unk>", "<a>", "<b>", "<c>", "[CLS]", "[SEP]", "[MASK]", "[PAD]"]
    )
    data = open_data(config(tokenizer=str(file), mask_strategy=(1.0, 0.0, 0.0)))
    batch = steps(data, 1)[0][0]
    assert (data.cls_id, data.sep_id, data.mask_id, data.pad_id) == (4, 5, 6, 7)
    assert bool((batch.input_ids[batch.labels >= 0] == 6).all()) and 4 in batch.input_ids and 5 in batch.input_ids
    assert bool((batch.labels[batch.labels >= 0] >= 8).all())


def test_batches_have_no_padding_to_attend_to(config) -> None:
    """An attention mask computed after padding: always one."""
    for batch in itertools.chain.from_iterable(steps(open_data(config()), 30)):
        assert not bool((batch.input_ids == 0).any())
        assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == batch.input_ids.shape[1]


def test_short_documents_share_a_window(config) -> None:
    """A sequence for each text, filled up with padding to max_length."""
    batches = list(itertools.chain.from_iterable(steps(open_data(config(max_length=64)), 10)))
    assert all(b.input_ids.shape == (1, 128) for b in batches) and any(len(b.cu_seqlens) > 5 for b in batches)


@pytest.mark.parametrize("packed", [True, False])
def test_long_documents_are_not_cut_off(config, tmp_path: Path, packed: bool) -> None:
    """Everything behind the first max_length tokens thrown away."""
    folder = write_corpus(tmp_path / "corpus", documents=40, words=200)
    cfg = config(local_parquet_dir=str(folder), cache_dir=str(tmp_path / "cache"), batch_size=1, pack_sequences=packed)
    data = open_data(cfg)
    [epoch] = epochs(data, 1)
    windows = [np.frombuffer(window, np.int64) for window, labels in epoch.items() for _ in labels]
    wanted = data.train_token_counts()
    assert wanted.sum() > 30 * 100
    assert bool((np.bincount(np.concatenate(windows), minlength=len(wanted)) >= wanted).all())


def test_the_end_of_an_epoch_loses_nothing(config) -> None:
    """A last, partial accumulation that is dropped."""
    cfg = config(batch_size=1, gradient_accumulation_steps=3)
    data = open_data(cfg)
    size = int(data.corpora[0].train_counts().sum())
    batches = [b for s in steps(data, -(-2 * size // 3)) for b in s]
    assert [b.first_sample for b in batches] == list(range(len(batches)))
    windows = [original(b).tobytes() for b in batches]
    assert sorted(windows[:size]) == sorted(windows[size : 2 * size])


# ---- data: cache ----------------------------------------------------------------------------------------------------
def test_another_tokenizer_never_sees_old_ids(config, tmp_path: Path) -> None:
    """A cache without a fingerprint: ids of the old vocabulary read under the new one."""
    text = []
    for size in (300, 280):
        cfg = config({"vocab_size": size}, cache_dir=str(tmp_path / "cache"), mlm_probability=0.01)
        data = open_data(cfg)
        assert int(max(b.input_ids.max() for s in steps(data, 40) for b in s)) < size
        text.append({w for s in steps(data, 40) for b in s for w in data.tokenizer.decode(original(b)).split()})
    assert text[0] & text[1] >= set(WORDS)


@pytest.mark.parametrize("change", [{"max_length": 32}, {"mlm_probability": 0.9}], ids=["length", "rate"])
def test_another_length_or_rate_acts_at_once(config, change: dict[str, Any]) -> None:
    """Windows and masks that are part of the cache, and stay when the config changes."""
    before, after = (steps(open_data(config(**c)), 1)[0][0] for c in ({}, change))
    if "max_length" in change:
        assert after.input_ids.shape[1] == 2 * before.input_ids.shape[1]
    else:
        assert after.num_labelled > 1.5 * before.num_labelled


def test_windows_are_read_where_they_lie(config, monkeypatch) -> None:
    """Pickled files of thousands of examples behind a cache of one: a whole file read for every example."""
    opened, memmap = [], np.memmap
    monkeypatch.setattr(np, "memmap", lambda *args, **kwargs: opened.append(args) or memmap(*args, **kwargs))
    data = open_data(config())
    steps(data, 100)
    assert len(data.corpora[0].cache.units) == 4 and len(opened) <= 3 * 4


def test_a_complete_cache_is_opened_without_unpickling_or_tokenising(config, monkeypatch) -> None:
    """The whole cache unpickled at the start of every run."""
    wanted = steps(open_data(config()), 3)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickled or tokenised")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (Vocabulary, "encode_documents")):
        monkeypatch.setattr(owner, name, refused)
    again = steps(open_data(config()), 3)
    assert all(
        torch.equal(a.input_ids, b.input_ids)
        for s, t in zip(wanted, again, strict=True)
        for a, b in zip(s, t, strict=True)
    )


def test_filling_and_loading_start_few_processes_and_load_the_tokenizer_once(
    config, tmp_path: Path, monkeypatch
) -> None:
    """A pool of processes for every batch of rows, and the tokenizer read again for every example."""
    started, made = [], []
    popen, start, parse = subprocess.Popen.__init__, multiprocessing.process.BaseProcess.start, Tokenizer.from_str

    def counted_popen(self: Any, *args: Any, **kwargs: Any) -> None:
        started.append(args)
        popen(self, *args, **kwargs)

    monkeypatch.setattr(subprocess.Popen, "__init__", counted_popen)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda self: started.append(self) or start(self))
    monkeypatch.setattr(tokenizer_module, "Tokenizer", CountedTokenizer(made, parse))
    data = open_data(config(cache_dir=str(tmp_path), dataset_batch_size=20, num_workers=2, dataloader_workers=1))
    steps(data, 20)
    data.close()
    assert len(data.corpora[0].cache.units) == 10 and len(started) <= 3 and len(made) <= 4


class CountedTokenizer:
    """The Tokenizer class with every reading of one noted."""

    def __init__(self, made: list[str], parse: Callable[[str], Tokenizer]) -> None:
        self._made, self._parse = made, parse

    def __call__(self, *args: Any) -> Tokenizer:
        return Tokenizer(*args)

    def from_str(self, text: str) -> Tokenizer:
        self._made.append("str")
        return self._parse(text)

    def from_file(self, path: str) -> Tokenizer:
        self._made.append("file")
        return Tokenizer.from_file(path)


def token_files(cache_dir: Path) -> list[bytes]:
    return [p.read_bytes() for p in sorted(cache_dir.glob("tokens/*/*.bin"))]


def test_a_killed_fill_goes_on_at_the_raw_row(config, tmp_path: Path, monkeypatch) -> None:
    """As many raw rows passed over as documents were kept: after empty rows some texts come twice."""
    folder = write_corpus(tmp_path / "corpus", documents=90)
    rows = (folder / "text.jsonl").read_text().splitlines()
    (folder / "text.jsonl").write_text("\n".join(itertools.chain.from_iterable((r, '{"text": ""}') for r in rows)))
    fields = dict(local_parquet_dir=str(folder), dataset_batch_size=30, num_workers=0)
    open_data(config(**fields, cache_dir=str(tmp_path / "whole")))
    write, calls = Filler._write_unit, []

    def killed(self: Filler, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise OSError("killed")
        return write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Filler, "_write_unit", killed)
        with pytest.raises((OSError, UserError)):
            open_data(config(**fields, cache_dir=str(tmp_path / "parts")))
    open_data(config(**fields, cache_dir=str(tmp_path / "parts")))
    assert token_files(tmp_path / "parts") == token_files(tmp_path / "whole")


def test_sizes_are_those_of_the_files(config, tmp_path: Path, caplog) -> None:
    """The size of a folder's entry taken for that of its files: nothing is ever found to be wrong."""
    cfg = config(cache_dir=str(tmp_path))
    open_data(cfg)
    wanted, victim = token_files(tmp_path), next(tmp_path.glob("tokens/*/unit-00002*.bin"))
    victim.write_bytes(victim.read_bytes()[:-2])
    open_data(cfg)
    assert "damaged" in caplog.text and token_files(tmp_path) == wanted


def test_processes_share_the_global_batch(config) -> None:
    """Every process of a distributed run reads the same samples, or is not foreseen at all."""
    alone = [b.first_sample for s in steps(open_data(config(gradient_accumulation_steps=4)), 3) for b in s]
    shared_data = open_data(config(gradient_accumulation_steps=2))
    ranks = [
        [b.first_sample for s in itertools.islice(shared_data.train_batches(0, rank=r, world_size=2), 3) for b in s]
        for r in (0, 1)
    ]
    assert sorted(ranks[0] + ranks[1]) == alone and not set(ranks[0]) & set(ranks[1])


# ---- data, packaging: nothing of one machine ------------------------------------------------------------------------
SOURCES = [p for package in ("ultra", "ultra_kernels") for p in sorted((ROOT / package).rglob("*.py"))]


def test_no_home_path_and_no_shell_in_the_package() -> None:
    """A data set, a home folder and a shell command of the author's machine in the code."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(home|Users|root)/\w", text), path
        for call in (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)):
            assert ast.unparse(call.func) not in ("os.system", "os.popen"), path
            assert not any(k.arg == "shell" for k in call.keywords), path


@pytest.mark.parametrize("size", [270, 333])
def test_vocabulary_size_is_the_configs(config, tmp_path: Path, size: int) -> None:
    """A vocabulary of 50000 written into the code."""
    data = open_data(config({"vocab_size": size}, cache_dir=str(tmp_path)))
    assert data.vocab_size == size == build_model(small(vocab_size=size)).head.vocabulary.shape[0]


def test_training_a_tokenizer_reads_a_bounded_text(config, tmp_path: Path, monkeypatch) -> None:
    """A tokenizer trained on the whole source in memory: settings for a machine with 100 GB."""
    read, mixed_texts = [], prepare.mixed_texts

    def counted(*args: Any) -> Iterator[str]:
        for text in mixed_texts(*args):
            read.append(text)
            yield text

    assert prepare.TOKENIZER_CHARS <= 10**8
    monkeypatch.setattr(prepare, "TOKENIZER_CHARS", 2000)
    monkeypatch.setattr(prepare, "mixed_texts", counted)
    open_data(config(cache_dir=str(tmp_path)))
    assert 2000 <= sum(map(len, read)) < 2500


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """What an installer is told, from a clean copy of the tree."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("out")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    for package in ("ultra", "ultra_kernels", "configs"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = f"from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Distribution.at(next(out.glob("*.dist-info")))


def test_wheel_metadata_has_dependencies(metadata: Distribution) -> None:
    """Dependencies under another table of pyproject.toml: an install that brings none of them."""
    names = {re.split(r"[^\w-]", line)[0] for line in metadata.requires or () if "extra ==" not in line}
    assert names >= {"torch", "numpy", "pydantic", "PyYAML", "tokenizers", "safetensors"}
    assert metadata.metadata["Name"] == "ultra"
    assert {"ultra", "ultra_kernels"} <= set((metadata.read_text("top_level.txt") or "").split())
    assert "src" not in (metadata.read_text("top_level.txt") or "").split()


def test_there_is_one_licence(metadata: Distribution) -> None:
    """One licence in the file, another one in the README."""
    assert (ROOT / "LICENSE").read_text().split()[:2] == ["Apache", "License"]
    assert metadata.metadata["License-Expression"] == "Apache-2.0"
    assert re.search(r"^license: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M).group(1) == "Apache-2.0"
    for page in ROOT.glob("*.md"):
        assert not re.search(r"\b(MIT|BSD|GPL)\b", page.read_text()), page.name


def test_the_list_is_whole() -> None:
    """A promise that goes missing in an edit."""
    promises = {name: f for name, f in globals().items() if name.startswith("test_")}
    assert len(promises) == 114 and all(f.__doc__ for f in promises.values())
