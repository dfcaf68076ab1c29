"""Training under bfloat16 autocast: close to float32 in every combination, and float32 where semantics demand it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from ultra.layers.sequences import Sequences
from ultra.mixers import MIXERS
from ultra.norms import NORMS
from ultra_kernels import use_backend

_spec = importlib.util.spec_from_file_location("invariants", Path(__file__).with_name("test_invariants.py"))
invariants = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(invariants)

IDS = torch.cat(invariants.sequences())[None]
CU = torch.tensor([0, 5, 6, 15, 18], dtype=torch.int32)
EXPERTS = 5  # no other size of the model


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("bitnet", [False, True], ids=["full", "bitnet"])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_forward_and_backward_are_close(mixer: str, norm: str, moe: bool, bitnet: bool) -> None:
    model = invariants.model_of(
        dtype=torch.float32, layer_pattern=(mixer,), norm_type=norm, use_moe=moe, use_bitnet=bitnet
    ).train()
    outs, grads = [], []
    for half in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            out = model(IDS, labels=IDS, cu_seqlens=CU, max_seqlen=9)
        out.loss.backward()
        outs.append(out)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    exact, rounded = outs
    assert rounded.loss.dtype == torch.float32 and bool(grads[1].isfinite().all())
    # Each of the about 16 roundings on a path (operands and results of 5 products, attention, activation) errs by at
    # most 2^-8 of its value; at random they add like sqrt(16). BitNet's codes amplify: a value next to a border moves
    # by a whole step, 1/127 of the row's largest, and a token next to a tie goes to another expert, of other codes.
    # A gradient's path is twice as long.
    tolerance = 2**-8 * 16**0.5 * ((8 if moe else 4) if bitnet else 1)
    error = (rounded.last_hidden_state - exact.last_hidden_state).norm() / exact.last_hidden_state.norm()
    assert float(error) < tolerance
    assert abs(float(rounded.loss - exact.loss)) < tolerance * float(exact.loss)
    assert float((grads[1] - grads[0]).norm() / grads[0].norm()) < 4 * tolerance


WIDE = {
    "softmax": {"_softmax"},
    "router z-loss": {"logsumexp"},
    "norm statistics": {"native_layer_norm", "_fused_rms_norm", "rsqrt"},
    "alpha": {"tanh", "erf"},
    "positions and decays": {"cos", "sin", "exp", "exp2"},
    "time step": {"softplus"},
    "BitNet scales": {"amax", "amin", "mean", "round_", "round", "abs"},
}


@pytest.mark.parametrize("norm", NORMS)
def test_what_must_be_float32_is(norm: str) -> None:
    model = invariants.model_of(
        dtype=torch.float32, layer_pattern=tuple(MIXERS), num_layers=6, norm_type=norm, use_moe=True,
        num_experts=EXPERTS, use_bitnet=True, num_loops=2, hope_rope_fraction=0.5, titan_memory="linear",
    )  # fmt: skip
    seen: dict[str, set[torch.dtype]] = {}

    class Dtypes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name.split("::")[1]
            floats = [t for t in args if isinstance(t, torch.Tensor) and t.is_floating_point()]
            if any(t.dim() and t.shape[-1] == EXPERTS for t in floats) and name in ("mm", "addmm"):
                name = "router"
            seen.setdefault(name, set()).update(t.dtype for t in floats)
            return func(*args, **(kwargs or {}))

    with use_backend("reference"), autocast(), Dtypes():  # the kernels compute as their references, unseen from here
        out = model(IDS, labels=IDS, cu_seqlens=CU, max_seqlen=9)
    assert torch.bfloat16 in seen["mm"]  # autocast did act
    for purpose, ops in {**WIDE, "router": {"router"}}.items():
        found = {op: seen[op] for op in ops & seen.keys()}
        if purpose != "alpha" or norm != "layer_norm":
            assert found, f"{purpose}: none of {sorted(ops)} ran"
        wrong = {op: dtypes for op, dtypes in found.items() if not dtypes <= {torch.float32, torch.float64}}
        assert not wrong, f"{purpose}: {wrong}"
    assert out.loss.dtype == out.aux_loss.dtype == out.last_hidden_state.dtype == torch.float32
    assert all(s.mean_prob.dtype == s.z.dtype == torch.float32 for s in out.moe_stats)


def test_scan_takes_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A, D, the time step, the state's inputs and z of both scans."""
    from ultra.mixers import mamba

    taken = []
    for name in ("bidirectional_scan", "selective_scan"):
        real = getattr(mamba, name)

        def spy(*args, _real=real, **options):
            taken.extend(a.dtype for a in args if isinstance(a, torch.Tensor))
            return _real(*args, **options)

        monkeypatch.setattr(mamba, name, spy)
    for mode in ("quasi", "none"):
        model = invariants.model_of(dtype=torch.float32, layer_pattern=("mamba",), mamba_bidirectional=mode)
        with autocast():
            model(IDS)
    assert len(taken) == 16 and set(taken) == {torch.float32}


@pytest.mark.parametrize("factorised", [False, True])
def test_the_solver_sums_in_float32(factorised: bool) -> None:
    model = invariants.model_of(
        dtype=torch.float32, layer_pattern=("ode",), ode_steps=3, ode_checkpoint="none",
        use_factorized_embedding=factorised, factorized_embedding_dim=8,
    )  # fmt: skip
    ode, stages = model.layers[0].mixer, []
    ode.norm.register_forward_pre_hook(lambda module, args: stages.append(args[0].dtype))
    with autocast():
        model(IDS)
        x = torch.randn(1, 5, 24)
        slope = ode.f(x, 0.0, Sequences.dense(5, x.device))
    assert set(stages) == {torch.float32} and len(stages) == 13 and slope.dtype == torch.float32
