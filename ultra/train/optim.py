"""Parameter groups by module type, and the optimizer over them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ultra.config.training import GROUPS, GroupOptim, TrainingConfig
from ultra.errors import UserError
from ultra.train.galore import GaLore
from ultra.train.schedule import lr_factor, travel

log = logging.getLogger(__name__)

NamedParam = tuple[str, nn.Parameter, bool]  # name, parameter, whether weight decay applies


@dataclass(frozen=True)
class Group:
    """One of GROUPS with its parameters and its documented settings."""

    name: str
    params: list[NamedParam]
    optim: GroupOptim

    @property
    def tensors(self) -> list[nn.Parameter]:
        return [param for _, param, _ in self.params]


def collect_groups(model: nn.Module, cfg: TrainingConfig) -> list[Group]:
    """The seven groups of `model.param_groups()`, some maybe empty, each with its settings.

    Raises ValueError unless every trainable parameter is in exactly one group.
    """
    named: dict[str, list[NamedParam]] = model.param_groups()  # type: ignore[operator]
    if unknown := set(named) - set(GROUPS):
        raise ValueError(f"unknown parameter groups {sorted(unknown)}; there are {', '.join(GROUPS)}")
    seen = [id(param) for params in named.values() for _, param, _ in params]
    if len(seen) != len(set(seen)):
        raise ValueError("a parameter is in two groups")
    trainable = {id(param): name for name, param in model.named_parameters() if param.requires_grad}
    if missing := [name for key, name in trainable.items() if key not in set(seen)]:
        raise ValueError(f"parameters in no group: {', '.join(missing)}")
    if set(seen) - set(trainable):
        raise ValueError("a group holds a parameter that the model does not have or that is frozen")
    return [Group(name, named.get(name, []), cfg.optim(name)) for name in GROUPS]


def table(groups: list[Group]) -> str:
    """The groups as aligned text: tensors, parameters and settings; a group without tensors reads absent."""
    rows = [("group", "tensors", "parameters", "lr", "wd", "betas", "eps")]
    for g in groups:
        if g.params:
            count = f"{sum(p.numel() for p in g.tensors):,}"
            o = g.optim
            betas = f"{o.betas[0]:g}, {o.betas[1]:g}"
            rows.append((g.name, str(len(g.params)), count, f"{o.lr:g}", f"{o.wd:g}", betas, f"{o.eps:g}"))
        else:
            rows.append((g.name, "absent", "", "", "", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def warn_if_rates_cannot_train(
    groups: list[Group], steps: int, cfg: TrainingConfig, init_std: float, two_stage: bool = False
) -> None:
    """Adam moves a weight by about its rate per step at most; less than init_std in all is too little."""
    if steps > cfg.scheduler_total_steps and lr_factor(steps - 1, cfg) == 0:
        log.warning(
            "training.max_steps=%d is beyond scheduler_total_steps=%d, where %s is at 0: the steps "
            "after it train nothing. Raise scheduler_total_steps or min_lr_ratio",
            steps, cfg.scheduler_total_steps, cfg.scheduler_type,
        )  # fmt: skip
    reach = travel(steps, cfg, two_stage)
    slow = [group for group in groups if group.params and group.optim.lr * reach < init_std]
    if slow:
        log.warning(
            "hardly trains: %s; over %d steps these rates move a weight by less than its initial standard "
            "deviation %g. Raise them, or train longer",
            ", ".join(f"lr_{g.name}={g.optim.lr:g} (moves {g.optim.lr * reach:.2g})" for g in slow),
            steps, init_std,
        )  # fmt: skip


class GroupedOptimizer:
    """Fused AdamW over all groups, with GaLore for the eligible matrices when use_galore.

    Each group is two torch groups, with and without weight decay. A matrix [m, n], or a stack of them as the
    experts are [E, m, n], is eligible for GaLore when it is decayed, outside embeddings and norms,
    min(m, n) > galore_rank, max(m, n) <= galore_max_dim and its `no_galore` attribute is not set (head, router,
    convolutions, dt projection).
    """

    def __init__(self, groups: list[Group], cfg: TrainingConfig) -> None:
        self.names = {id(param): name for group in groups for name, param, _ in group.params}
        plain, projected = [], []
        for group in groups:
            low_rank = [entry for entry in group.params if cfg.use_galore and self.eligible(entry, group, cfg)]
            chosen = {name for name, _, _ in low_rank}
            rest = [entry for entry in group.params if entry[0] not in chosen]
            plain.append(self._torch_group(group, [p for _, p, decay in rest if decay], group.optim.wd))
            plain.append(self._torch_group(group, [p for _, p, decay in rest if not decay], 0.0))
            projected.append(self._torch_group(group, [p for _, p, _ in low_rank], group.optim.wd))
        self.parts: list[torch.optim.Optimizer] = []
        if plain := [g for g in plain if g["params"]]:
            self.parts.append(torch.optim.AdamW(plain, fused=True))
        self.per_layer: GaLore | None = None
        if projected := [g for g in projected if g["params"]]:
            galore = GaLore(
                projected,
                rank=cfg.galore_rank,
                interval=cfg.galore_update_interval,
                scale=cfg.galore_scale,
                rotate=cfg.galore_rotate_moments,
                method=cfg.galore_method,
            )
            self.parts.append(galore)
            if cfg.galore_per_layer:
                galore.update_in_backward(cfg.grad_clip_max_norm)
                self.per_layer = galore
            count = sum(len(g["params"]) for g in projected)
            log.info("GaLore: %d matrices with moments of rank %d", count, cfg.galore_rank)
            if cfg.galore_update_interval == 1:
                log.warning(
                    "training.galore_update_interval=1 factorises every projected gradient at every step; "
                    "50 to 200 cost far less"
                )
        elif cfg.use_galore:
            log.warning(
                "training.use_galore: no matrix has both sides above galore_rank=%d and none above "
                "galore_max_dim=%d; all parameters keep plain AdamW",
                cfg.galore_rank, cfg.galore_max_dim,
            )  # fmt: skip

    @staticmethod
    def eligible(entry: NamedParam, group: Group, cfg: TrainingConfig) -> bool:
        _, param, decay = entry
        return (
            decay
            and param.ndim in (2, 3)
            and group.name not in ("embeddings", "norms")
            and min(param.shape[-2:]) > cfg.galore_rank
            and max(param.shape[-2:]) <= cfg.galore_max_dim
            and not getattr(param, "no_galore", False)
        )

    @staticmethod
    def _torch_group(group: Group, params: list[nn.Parameter], weight_decay: float) -> dict[str, Any]:
        return {
            "params": params,
            "lr": group.optim.lr,
            "base_lr": group.optim.lr,
            "weight_decay": weight_decay,
            "base_weight_decay": weight_decay,
            "betas": group.optim.betas,
            "eps": group.optim.eps,
        }

    @property
    def params(self) -> list[nn.Parameter]:
        return [p for part in self.parts for g in part.param_groups for p in g["params"]]

    def grad_norm(self, params: list[nn.Parameter]) -> Tensor:
        """Norm of all their gradients before clipping, those included that galore_per_layer has used up."""
        grads = [p.grad for p in params if p.grad is not None]
        if self.per_layer is not None:
            grads += [self.per_layer.freed[p] for p in params if p in self.per_layer.freed]
        norm: Tensor = nn.utils.get_total_norm(grads, foreach=True)
        return norm

    def set_rates(self, factor: float, *, decay: float = 1.0) -> None:
        """Every group's rate becomes its configured rate times `factor`; weight decay likewise."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["base_lr"] * factor
                group["weight_decay"] = group["base_weight_decay"] * decay

    def before_backward(self, skip: Tensor, loss_scale: Tensor) -> None:
        """With galore_per_layer the coming backward pass updates the matrices, unless `skip` (0-d bool)."""
        if self.per_layer is not None:
            self.per_layer.arm(skip, loss_scale)

    def step(self, skip: Tensor) -> None:
        """One update; `skip` (0-d float on the parameters' device) is 1 if nothing may move, 0 otherwise."""
        for part in self.parts:
            # The attributes through which torch's GradScaler gates a fused optimizer without a host sync.
            part.found_inf, part.grad_scale = skip, None  # type: ignore[attr-defined]
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Every state tensor as `parameter.field`: independent of the order of groups and parameters."""
        return {
            f"{self.names[id(param)]}.{field}": value
            for part in self.parts
            for param, state in part.state.items()
            for field, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of state_tensors. Raises UserError where a name or a shape does not fit."""
        owners = {self.names[id(p)]: (part, p) for part in self.parts for g in part.param_groups for p in g["params"]}
        for part in self.parts:
            part.state.clear()
        for key, value in tensors.items():
            name, _, field = key.rpartition(".")
            if name not in owners:
                raise UserError(f"optimizer state for {name!r}, which this model does not have")
            part, param = owners[name]
            rank = part.rank if isinstance(part, GaLore) else None
            if state_shapes(param, rank).get(field) != value.shape:
                raise UserError(
                    f"optimizer state {key!r} of shape {tuple(value.shape)} does not fit this run: "
                    "use_galore, galore_rank and galore_max_dim must be those of the checkpoint; or start "
                    "from its weights alone with training.init_from"
                )
            if value.shape == param.shape:
                part.state[param][field] = torch.empty_like(param, dtype=value.dtype).copy_(value)
            else:
                part.state[param][field] = value.to("cpu" if field == "calls" else param.device, copy=True)


def state_shapes(param: Tensor, rank: int | None) -> dict[str, torch.Size]:
    """Names and shapes of the optimizer state of one parameter; rank None: plain AdamW."""
    scalar = torch.Size(())
    if rank is None:
        return {"step": scalar, "exp_avg": param.shape, "exp_avg_sq": param.shape}
    *stack, m, n = param.shape
    low, basis = torch.Size((*stack, rank, max(m, n))), torch.Size((*stack, min(m, n), rank))
    return {"projection": basis, "exp_avg": low, "exp_avg_sq": low, "step": scalar, "calls": scalar}
