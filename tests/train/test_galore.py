"""GaLore: the published update, the memory that it saves, and what ours does beyond it."""

from __future__ import annotations

import importlib.util
import logging
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ultra.config import load_config
from ultra.config.training import TrainingConfig
from ultra.model import build_model
from ultra.train import checkpoint
from ultra.train.galore import GaLore, projection
from ultra.train.optim import GroupedOptimizer, collect_groups, state_shapes


def galore(
    param: nn.Parameter,
    *,
    rank: int,
    lr=1e-2,
    interval=1,
    eps=1e-8,
    wd=0.0,
    rotate=True,
    scale=1.0,
    method="svd",
):
    group = {"params": [param], "lr": lr, "weight_decay": wd, "betas": (0.9, 0.95), "eps": eps}
    return GaLore([group], rank=rank, interval=interval, scale=scale, rotate=rotate, method=method)


def test_eligible_matrices(tiny) -> None:
    model = tiny.Model()
    cfg = TrainingConfig(use_galore=True, galore_rank=4)
    optimizer = GroupedOptimizer(collect_groups(model, cfg), cfg)
    chosen = {optimizer.names[id(p)] for g in optimizer.parts[1].param_groups for p in g["params"]}
    assert chosen == {"left.weight", "right.weight"}  # not the tied table, the flagged router, norms, biases
    for settings in ({"galore_rank": 16}, {"galore_max_dim": 15}):
        cfg = TrainingConfig(use_galore=True, **{"galore_rank": 4, **settings})
        assert len(GroupedOptimizer(collect_groups(model, cfg), cfg).parts) == 1


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12)])
def test_full_rank_is_adamw_where_the_update_is_linear_in_the_gradient(shape: tuple[int, int]) -> None:
    # With eps far above sqrt(V) the update is M / eps, and P Pᵀ = I: rotation drops out.
    torch.manual_seed(0)
    start = torch.randn(shape, dtype=torch.float32)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = galore(ours, rank=12, eps=1e4, lr=1.0, wd=0.1)
    b = torch.optim.AdamW([theirs], lr=1.0, betas=(0.9, 0.95), eps=1e4, weight_decay=0.1)
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    moved = (theirs.detach() - start).abs().max()
    # 5 steps of products of length 12 in float32; sqrt(V) beside eps is a 1e-4 share of the update.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=float(moved) * 1e-5 + 5 * 1e-4 * 5e-4)


def test_state_lives_in_the_subspace() -> None:
    param = nn.Parameter(torch.randn(10, 30))
    optimizer = galore(param, rank=3)
    param.grad = torch.randn(10, 30)
    optimizer.step()
    state = optimizer.state[param]
    assert state["exp_avg"].numel() + state["exp_avg_sq"].numel() == 2 * 3 * 30
    assert {k: v.shape for k, v in state.items()} == state_shapes(param, 3)
    assert all(type(value) is torch.Tensor for value in state.values())


@pytest.mark.parametrize("method", ["randomized", "svd"])
def test_projection_is_orthonormal_and_finds_the_subspace(method: str) -> None:
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(40, 40))[0], torch.linalg.qr(torch.randn(60, 60))[0]
    grad = u @ torch.diag(2.0 ** -torch.arange(40.0)) @ v[:40]
    basis = projection(grad, 6, None, method)
    again = projection(grad, 6, basis, method)
    for found in (basis, again):
        torch.testing.assert_close(found.T @ found, torch.eye(6), atol=1e-5, rtol=0)
        # Cosine of the largest angle to the true subspace.
        assert torch.linalg.svdvals(u[:, :6].T @ found).min() > 0.999
    assert torch.equal(projection(grad, 6, basis, method), again)


def least_squares(rotate: bool, interval: int) -> float:
    """Relative error after 400 steps of rank 4 on |A X - Y|², X [16, 24]."""
    torch.manual_seed(0)
    a, x = torch.randn(64, 16), torch.randn(16, 24)
    param = nn.Parameter(torch.zeros(16, 24))
    optimizer = galore(param, rank=4, interval=interval, rotate=rotate, lr=0.1, method="randomized")
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 400)
        param.grad = a.T @ (a @ param.detach() - a @ x) / 64
        optimizer.step()
    return float((param.detach() - x).norm() / x.norm())


def test_new_subspace_every_step_converges_with_rotated_moments_only() -> None:
    rotated, kept = least_squares(True, 1), least_squares(False, 1)
    assert rotated < 1e-3
    assert kept > 0.3


def test_update_interval_keeps_the_basis() -> None:
    param = nn.Parameter(torch.randn(10, 30))
    optimizer = galore(param, rank=3, interval=3)
    seen = []
    for _ in range(7):
        param.grad = torch.randn(10, 30)
        optimizer.step()
        seen.append(optimizer.state[param]["projection"].clone())
    same = [torch.equal(a, b) for a, b in pairwise(seen)]
    assert same == [True, True, False, True, True, False]


def test_scale_multiplies_the_update() -> None:
    moves = []
    for scale in (1.0, 0.25):
        torch.manual_seed(0)
        param = nn.Parameter(torch.zeros(10, 30))
        optimizer = galore(param, rank=3, scale=scale)
        param.grad = torch.randn(10, 30)
        optimizer.step()
        moves.append(param.detach().clone())
    torch.testing.assert_close(moves[1], moves[0] / 4)


def test_per_layer_update_in_backward_equals_the_update_after_it_and_frees_the_gradient() -> None:
    results = []
    for per_layer in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(12, 8, bias=False)
        optimizer = galore(layer.weight, rank=4)
        if per_layer:
            optimizer.update_in_backward(max_norm=0.5)
        x = torch.randn(6, 12)
        for _ in range(3):
            if per_layer:
                optimizer.arm(torch.tensor(False), torch.tensor(2.0))
            (layer(x).square().sum() * (2.0 if per_layer else 1.0)).backward()
            if per_layer:
                assert layer.weight.grad is None
            else:
                nn.utils.clip_grad_norm_([layer.weight], 0.5)
            optimizer.step()
            layer.weight.grad = None
        results.append(layer.weight.detach())
    # A few roundings apart: the loss scale enters the clip factor.
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_per_layer_update_skips_what_is_not_finite_and_passes_that_only_diagnose() -> None:
    layer = nn.Linear(12, 8, bias=False)
    start = layer.weight.detach().clone()
    optimizer = galore(layer.weight, rank=4)
    optimizer.update_in_backward(max_norm=0.5)
    layer(torch.ones(1, 12)).sum().backward()  # not armed
    assert layer.weight.grad is not None
    layer.weight.grad = None
    optimizer.arm(torch.tensor(False), torch.tensor(1.0))
    (layer(torch.ones(1, 12)).sum() * float("nan")).backward()
    optimizer.arm(torch.tensor(True), torch.tensor(1.0))
    layer(torch.ones(1, 12)).sum().backward()
    assert torch.equal(layer.weight, start)


def test_interval_of_one_warns(tiny, caplog) -> None:
    cfg = TrainingConfig(use_galore=True, galore_rank=4)
    with caplog.at_level(logging.WARNING):
        GroupedOptimizer(collect_groups(tiny.Model(), cfg), cfg)
    assert "galore_update_interval=1" in caplog.text


def test_a_stack_is_its_matrices_one_by_one() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(3, 10, 30), torch.randn(4, 3, 10, 30)
    stack, alone = nn.Parameter(start.clone()), [nn.Parameter(matrix.clone()) for matrix in start]
    optimizers = [galore(param, rank=3, interval=2, method="randomized") for param in (stack, *alone)]
    for grad in grads:
        for param, part in zip((stack, *alone), (grad, *grad), strict=True):
            param.grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
    # 4 steps of Adam's size, in float32 products of length 30
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in alone]), rtol=0, atol=4 * 1e-2 * 1e-3)
    assert {k: v.shape for k, v in optimizers[0].state[stack].items()} == state_shapes(stack, 3)


# Against the published algorithm
#
# `published` writes out galore-torch 1.0 with proj_type "std". Where that package is installed
# (pip install galore-torch; it pulls in transformers and bitsandbytes, so no extra of ours names it) the same cases run
# against the package itself. Both agree with ours step by step within one subspace. On purpose ours differs in three
# points: eps is added to the debiased root as in torch's AdamW, weight decay comes before the update as in torch's
# AdamW, and with galore_rotate_moments the moments follow a new subspace. Without rotation a new SVD may flip the signs
# of the basis under the old moments, so only the wide case, where both call the same SVD, agrees across a refresh.

BETAS, EPS, STEPS = (0.9, 0.95), 1e-8, 6
SHAPES = [(10, 24), (24, 10), (12, 12)]  # projected from the left, from the right, and from the right


def published(start: Tensor, grads: Tensor, *, rank: int, lr: float, scale: float, wd: float) -> Tensor:
    """W after the steps, one subspace for all, in float64."""
    weight = start.double()
    right = weight.shape[0] >= weight.shape[1]
    left_basis, _, right_basis = torch.linalg.svd(grads[0].double(), full_matrices=False)
    P = right_basis[:rank] if right else left_basis[:, :rank]
    M = V = torch.zeros((), dtype=torch.float64)
    for t, grad in enumerate(grads.double(), start=1):
        R = grad @ P.T if right else P.T @ grad
        M, V = BETAS[0] * M + (1 - BETAS[0]) * R, BETAS[1] * V + (1 - BETAS[1]) * R * R
        N = M / (V.sqrt() + EPS)
        size = lr * (1 - BETAS[1] ** t) ** 0.5 / (1 - BETAS[0] ** t)
        weight = weight - size * scale * (N @ P if right else P @ N)
        weight = weight - lr * wd * weight
    return weight


def case(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn((STEPS, *shape), generator=generator)


def ours(
    start: Tensor, grads: Tensor, *, interval: int, lr: float, scale: float, wd: float, rotate: bool
) -> list[Tensor]:
    """W after each step."""
    param, after = nn.Parameter(start.clone()), []
    optimizer = galore(param, rank=4, interval=interval, lr=lr, scale=scale, wd=wd, rotate=rotate)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        after.append(param.detach().clone())
    return after


SETTINGS = {"lr": 1e-2, "scale": 0.25, "wd": 0.0}
# An entry of R near 0 keeps few of its float32 digits, and Adam's first step divides by it: 1e-3 of a step is room for
# an entry 1e-4 times the typical one.
TOLERANCE = SETTINGS["lr"] * SETTINGS["scale"] * 1e-3 * STEPS


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rotate", [False, True])
def test_equal_to_the_published_formula_within_one_subspace(shape: tuple[int, int], rotate: bool) -> None:
    start, grads = case(shape)
    got = ours(start, grads, interval=STEPS, rotate=rotate, **SETTINGS)
    for steps in range(1, STEPS + 1):
        want = published(start, grads[:steps], rank=4, **SETTINGS)
        torch.testing.assert_close(got[steps - 1].double(), want, rtol=0, atol=TOLERANCE)
    assert (got[-1] - start).abs().max() > 100 * TOLERANCE / 6


def test_weight_decay_comes_before_the_update_as_in_torchs_adamw() -> None:
    """(1 − lr·wd) W − U instead of (1 − lr·wd)(W − U): apart by lr·wd·U."""
    start, grads = case((10, 24))
    settings = {"lr": 0.1, "scale": 1.0, "wd": 0.5}
    got = ours(start, grads[:1], interval=1, rotate=True, **settings)[0].double()
    update = start.double() - published(start, grads[:1], rank=4, lr=0.1, scale=1.0, wd=0.0)
    apart = published(start, grads[:1], rank=4, **settings) - got
    torch.testing.assert_close(apart, 0.1 * 0.5 * update, rtol=0, atol=1e-5)


def package(start: Tensor, grads: Tensor, *, interval: int, lr: float, scale: float, wd: float) -> list[Tensor]:
    if importlib.util.find_spec("galore_torch") is None:
        pytest.skip("galore-torch is not installed; pip install galore-torch, and run this file again")
    from galore_torch import GaLoreAdamW

    param, after = nn.Parameter(start.clone()), []
    group = {"params": [param], "rank": 4, "update_proj_gap": interval, "scale": scale, "proj_type": "std"}
    optimizer = GaLoreAdamW([group], lr=lr, betas=BETAS, eps=EPS, weight_decay=wd, no_deprecation_warning=True)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        after.append(param.detach().clone())
    return after


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_galore_torch_within_one_subspace(shape: tuple[int, int]) -> None:
    start, grads = case(shape)
    theirs = package(start, grads, interval=STEPS, **SETTINGS)
    for step, (a, b) in enumerate(
        zip(ours(start, grads, interval=STEPS, rotate=True, **SETTINGS), theirs, strict=True)
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE, msg=lambda text, step=step: f"step {step + 1}: {text}")
    decayed = {**SETTINGS, "wd": 0.1}  # and the formula above is the package's
    want = published(start, grads, rank=4, **decayed)
    torch.testing.assert_close(
        package(start, grads, interval=STEPS, **decayed)[-1].double(), want, rtol=0, atol=TOLERANCE
    )


def test_equal_to_galore_torch_across_refreshes_without_rotation() -> None:
    start, grads = case((10, 24))
    theirs = package(start, grads, interval=2, **SETTINGS)
    for a, b in zip(ours(start, grads, interval=2, rotate=False, **SETTINGS), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)
    rotated = ours(start, grads, interval=2, rotate=True, **SETTINGS)
    assert torch.allclose(rotated[1], theirs[1], rtol=0, atol=TOLERANCE)  # the first refresh is at step 3
    assert not torch.allclose(rotated[2], theirs[2], rtol=0, atol=10 * TOLERANCE)


# Memory


def test_memory_of_a_preset_in_bytes_here_and_in_its_checkpoint(tmp_path: Path) -> None:
    """r · max(m, n) · 2 + r · min(m, n) numbers a matrix, experts included, and AdamW's 2 · numel for the rest."""
    cfg = load_config("mini", ["training.use_galore=true", "training.galore_rank=64"])
    torch.manual_seed(0)
    model = build_model(cfg)
    groups = collect_groups(model, cfg.training)
    optimizer = GroupedOptimizer(groups, cfg.training)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step(torch.tensor(0.0))

    expected, plain, matrices = 0, 0, 0
    for group in groups:
        for entry in group.params:
            numel = entry[1].numel()
            plain += (2 * numel + 1) * 4  # exp_avg, exp_avg_sq, step
            if not GroupedOptimizer.eligible(entry, group, cfg.training):
                expected += (2 * numel + 1) * 4
                continue
            *stack, m, n = entry[1].shape
            number = stack[0] if stack else 1
            assert min(m, n) > 64 and group.name not in ("embeddings", "norms")
            expected += number * (2 * 64 * max(m, n) + 64 * min(m, n)) * 4 + 4 + 8  # step, calls
            matrices += number
    tensors = optimizer.state_tensors()
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == expected
    assert matrices == 6 * 2 * 4 + 2 + 2 * 2 + 2 + 2 * 2  # experts; qkvg/out, titan, mamba, ode
    assert expected < 0.55 * plain  # what is left is mostly the 50000 x 128 table

    path = checkpoint.save(tmp_path, 1, model={}, optimizer=tensors, state={}, config="", tokenizer="")
    size = (path / "optimizer.safetensors").stat().st_size
    assert expected <= size <= expected + 200 * len(tensors) + 16  # the header: a name, a type, a shape each
