"""AdamW whose moments live in a low-rank subspace of the gradient: GaLore (arXiv:2403.03507)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

OVERSAMPLING = 8  # columns beyond the rank; 5 to 10 make the sketch's error negligible (arXiv:0909.4061, 1.3)


def projection(grad: Tensor, rank: int, previous: Tensor | None, method: str) -> Tensor:
    """Orthonormal basis P [..., m, rank] of the leading left singular subspace of each matrix of grad [..., m, n].

    randomized: range finder with one power iteration, started from `previous` and OVERSAMPLING fixed random
    directions, so that equal inputs give equal bits. svd: exact.
    """
    if grad.device.type == "mps":  # has no QR and no eigenvalues
        old = None if previous is None else previous.cpu()
        return projection(grad.cpu(), rank, old, method).to(grad.device)
    m, n = grad.shape[-2:]
    if method == "svd":
        left: Tensor = torch.linalg.svd(grad, full_matrices=False)[0]
        return left[..., :rank].contiguous()
    generator = torch.Generator(grad.device).manual_seed(0)
    fresh = min(rank + OVERSAMPLING, m) - (0 if previous is None else rank)
    sketch = torch.randn(n, fresh, generator=generator, device=grad.device).expand(*grad.shape[:-2], n, fresh)
    if previous is not None:
        sketch = torch.cat([grad.mT @ previous, sketch], dim=-1)
    basis: Tensor = torch.linalg.qr(grad @ sketch)[0]  # [..., m, k], k = min(rank + OVERSAMPLING, m)
    basis = torch.linalg.qr(grad @ (grad.mT @ basis))[0]
    small = basis.mT @ grad
    order: Tensor = torch.linalg.eigh(small @ small.mT)[1].flip(-1)  # eigh sorts upwards
    return (basis @ order[..., :rank]).contiguous()


class GaLore(torch.optim.Optimizer):
    """R = PᵀG on the smaller side of each matrix, Adam on R, W ← (1 − lr·wd) W − lr·scale·P N.

    State per matrix [m, n], or per stack of matrices [E, m, n] with E in front of every shape: exp_avg and
    exp_avg_sq [rank, max(m, n)], projection [min(m, n), rank], and the counters step (updates) and calls; all plain
    tensors. P is refreshed every `interval` calls; with `rotate` the moments follow it: Q = P_newᵀ P_old, M ← Q M,
    V ← (Q∘Q) V. Without it an interval of 1 does not converge.

    `found_inf`, when set to a tensor, is 1 for a step that must not move anything, as in torch's fused AdamW; a
    refresh that falls on such a step happens at the next one.
    """

    found_inf: Tensor | None = None
    _armed: tuple[Tensor, Tensor] | None = None  # (skip, loss scale) of the coming backward pass

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        rank: int,
        interval: int,
        scale: float,
        rotate: bool,
        method: str,
    ) -> None:
        super().__init__(groups, {})
        self.rank, self.interval, self.scale, self.rotate, self.method = rank, interval, scale, rotate, method
        self.freed: dict[Tensor, Tensor] = {}  # norms of the gradients that the last armed backward pass used up

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("GaLore.step takes no closure: gradients come from accumulated micro-batches")
        self._armed = None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def update_in_backward(self, max_norm: float) -> None:
        """From now on each armed backward pass updates a matrix once its gradient is whole, and frees that.

        The gradient is clipped to max_norm matrix by matrix, and one that is not finite moves nothing.
        """
        for group in self.param_groups:
            for param in group["params"]:
                param.register_post_accumulate_grad_hook(partial(self._on_gradient, group, max_norm))

    def arm(self, skip: Tensor, loss_scale: Tensor) -> None:
        """Let the next backward pass update; a pass that only diagnoses is not armed."""
        self._armed = (skip, loss_scale)
        self.freed.clear()

    @torch.no_grad()
    def _on_gradient(self, group: dict[str, Any], max_norm: float, param: Tensor) -> None:
        if self._armed is None:
            return
        skip, loss_scale = self._armed
        assert param.grad is not None
        norm = torch.linalg.vector_norm(param.grad) / loss_scale
        self.found_inf = (skip | ~torch.isfinite(norm)).float()
        param.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1) / loss_scale)
        self._update(param, group)
        self.freed[param] = norm
        param.grad = None

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        assert param.grad is not None
        state = self.state[param]
        bad = torch.zeros((), device=param.device) if self.found_inf is None else self.found_inf
        skip, good = bad > 0, 1.0 - bad
        # Only a due refresh reads the flag on the host, where the factorisations wait for the device anyway.
        due = not state or int(state["calls"]) % self.interval == 0
        if due and bool(skip):
            return
        right = param.shape[-2] >= param.shape[-1]  # the side of the published code, for square matrices too
        # A skipped step's gradient may hold NaN.
        grad = torch.where(skip, 0.0, param.grad.float())
        grad = grad.mT if right else grad  # [..., m, n], m <= n
        if not state:
            state["projection"] = projection(grad, self.rank, None, self.method)
            low_shape = (*grad.shape[:-2], self.rank, grad.shape[-1])
            state["exp_avg"] = grad.new_zeros(low_shape)
            state["exp_avg_sq"] = grad.new_zeros(low_shape)
            state["step"] = grad.new_zeros(())
            state["calls"] = torch.zeros((), dtype=torch.int64)  # on the host: it decides on the refresh
        elif due:
            self._refresh(state, grad)
        state["calls"] += 1
        state["step"] += good

        basis, first, second = state["projection"], state["exp_avg"], state["exp_avg_sq"]
        beta1, beta2 = group["betas"]
        low = basis.mT @ grad
        first.lerp_(low, (1 - beta1) * good)
        second.lerp_(low * low, (1 - beta2) * good)
        debias1, debias2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        update = basis @ ((first / debias1) / ((second / debias2).sqrt() + group["eps"]))
        update = update.mT if right else update
        param.mul_(1 - group["lr"] * group["weight_decay"] * good)
        param.sub_(torch.where(skip, 0.0, update * (group["lr"] * self.scale)).to(param.dtype))

    def _refresh(self, state: dict[str, Tensor], grad: Tensor) -> None:
        old = state["projection"]
        state["projection"] = new = projection(grad, self.rank, old, self.method)
        if self.rotate:
            turn = new.mT @ old
            state["exp_avg"] = turn @ state["exp_avg"]
            state["exp_avg_sq"] = (turn * turn) @ state["exp_avg_sq"]
