"""What a configuration needs, without training: parameters, memory by kind, largest batch, disk space.

Parameters, gradients and optimizer state are counted exactly on a model without storage (the meta device).
Activations are measured: every kind of layer runs forward on the CPU, on at most MEASURE_TOKENS tokens, while
hooks add up what autograd keeps; `Cost` scales that to the configured batch and length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ultra.config.run import RunConfig
from ultra.config.training import GROUPS
from ultra.layers.sequences import Sequences
from ultra.mixers.ode import Ode, OdeFields
from ultra.model import build_model
from ultra.model.block import Block
from ultra.model.embedding import Embedding
from ultra.model.encoder import Encoder
from ultra.model.head import MLMHead
from ultra.norms import NORMS
from ultra.train.checkpoint import model_tensors
from ultra.train.optim import GroupedOptimizer, collect_groups, state_shapes
from ultra.train.precision import autocast

MEASURE_TOKENS = 128  # two lengths, 64 and 128, whole chunks of every op, give the parabola; short enough for a laptop
DEVICE_SIZES = (8, 16, 24, 40, 80)  # GiB
USABLE = 0.9  # of a device: the rest goes to the driver's context and to fragmentation
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes that autograd keeps for n sequences of T tokens: fixed + n (linear T + square T²).

    fixed: quantised or cast weights; linear: activations; square: scores that a reference op keeps.
    """

    fixed: float = 0.0
    linear: float = 0.0
    square: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.fixed + other.fixed, self.linear + other.linear, self.square + other.square)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.fixed * times, self.linear * times, self.square * times)

    def bytes(self, n: int, T: int) -> float:
        return self.fixed + n * (self.linear * T + self.square * T * T)


@dataclasses.dataclass(frozen=True)
class GroupMemory:
    """Bytes of one optimizer group."""

    parameters: int  # their number
    weights: int
    gradients: int  # at the end of the backward pass
    optimizer: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    cfg: RunConfig
    groups: dict[str, GroupMemory]
    buffers: int
    kept: Cost  # until the backward pass reaches it
    passing: tuple[Cost, ...]  # what comes and goes, one at a time: a recomputed layer, the logits' gradient
    checkpoint: int  # bytes of one on disk

    @property
    def static(self) -> int:
        """Bytes that do not depend on the batch."""
        parts = self.groups.values()
        return self.buffers + sum(g.weights + g.gradients + g.optimizer for g in parts)

    def activations(self, batch: int) -> float:
        T = self.cfg.training.max_length
        return self.kept.bytes(batch, T) + max(cost.bytes(batch, T) for cost in self.passing)

    def total(self, batch: int) -> float:
        return self.static + self.activations(batch)

    def largest_batch(self, gib: float) -> int:
        """Sequences per micro-batch that fit in USABLE of a device of `gib` GiB; 0: none."""
        room, T = gib * GIB * USABLE - self.static, self.cfg.training.max_length
        costs = [self.kept + cost for cost in self.passing]
        return max(0, int(min((room - c.fixed) // (c.bytes(1, T) - c.fixed) for c in costs)))


def estimate(cfg: RunConfig) -> str:
    """The text that `ultra estimate` prints."""
    return render(measure(cfg))


def measure(cfg: RunConfig) -> Estimate:
    """Count and measure; needs about the memory of one layer of each kind plus the embedding."""
    with torch.device("meta"):
        model = build_model(cfg)
    optimizer = optimizer_bytes(model, cfg)
    groups = {
        name: GroupMemory(
            sum(p.numel() for p in group.tensors),
            sum(size(p) for p in group.tensors),
            gradient_bytes([(p, optimizer[p].projected) for p in group.tensors], cfg),
            sum(optimizer[p].bytes for p in group.tensors),
        )
        for name, group in ((g.name, g) for g in collect_groups(model, cfg.training))
    }
    kept, passing = activation_cost(cfg)
    return Estimate(
        cfg,
        groups,
        sum(size(b) for b in model.buffers()),
        kept,
        passing,
        sum(size(t) for t in model_tensors(model).values()) + sum(o.bytes for o in optimizer.values()),
    )


@dataclasses.dataclass(frozen=True)
class OptimizerState:
    projected: bool  # by GaLore
    bytes: int


def optimizer_bytes(model: Encoder, cfg: RunConfig) -> dict[nn.Parameter, OptimizerState]:
    """The state that the trainer's optimizer keeps for every parameter, in float32."""
    t = cfg.training
    states = {}
    for group in collect_groups(model, t):
        for entry in group.params:
            projected = t.use_galore and GroupedOptimizer.eligible(entry, group, t)
            shapes = state_shapes(entry[1], t.galore_rank if projected else None)
            # `calls`, the host's counter, is the one int64
            bytes_ = sum(shape.numel() * (8 if field == "calls" else 4) for field, shape in shapes.items())
            states[entry[1]] = OptimizerState(projected, bytes_)
    return states


def gradient_bytes(params: list[tuple[nn.Parameter, bool]], cfg: RunConfig) -> int:
    """Gradients held at once; galore_per_layer frees each projected one before the next is made."""
    if not cfg.training.galore_per_layer:
        return sum(size(p) for p, _ in params)
    freed = [size(p) for p, projected in params if projected]
    return sum(size(p) for p, projected in params if not projected) + max(freed, default=0)


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# Activations


def activation_cost(cfg: RunConfig) -> tuple[Cost, tuple[Cost, ...]]:
    """(what a whole forward pass keeps, the parts that exist only for a while during the backward pass)."""
    m, t = cfg.model, cfg.training
    dtype = torch.bfloat16 if t.use_amp else None  # fp16 has the same size, and the CPU lacks it
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            embedding = Embedding(m)
            norm = NORMS[m.norm_type](m, m.hidden_size, site="final")
            head = MLMHead(m, embedding)
        for module in (embedding, norm, head):
            quick_weights(module)
        per_label = head_cost(head, embedding, m.hidden_size, dtype)
        layers = {mixer: layer_cost(cfg, mixer, dtype) for mixer in dict.fromkeys(m.mixers)}
        kept = cost_of(lambda x, seqs: norm(x), [norm], cfg, dtype)
        kept += cost_of(lambda x, seqs: embedding(tokens_like(x, m.vocab_size), seqs), [embedding], cfg, dtype)
    kept += dataclasses.replace(per_label, linear=per_label.linear * t.mlm_probability)
    kept += Cost(linear=m.hidden_size * bool(m.dropout))  # the mask of the embedding's dropout
    for mixer in m.mixers:
        kept += layers[mixer][0] * m.num_loops
    logits = Cost(linear=4 * m.vocab_size * t.mlm_probability)
    return kept, (logits, *(passing for _, passing in layers.values()))


def layer_cost(cfg: RunConfig, mixer: str, dtype: torch.dtype | None) -> tuple[Cost, Cost]:
    """(kept, passing) of one application of a layer, with what the config recomputes counted as passing."""
    m = cfg.model
    with torch.device("meta"):
        block = Block(m, mixer, use_moe=m.use_moe, layerscale_init=m.layerscale_init)
    quick_weights(block)
    kept, passing = cost_of(block, [block], cfg, dtype), Cost()
    if isinstance(block.mixer, Ode) and block.mixer.checkpoint:
        ode = block.mixer
        passing = cost_of(lambda x, seqs: ode.step(x, 0, seqs), [block], cfg, dtype)
    if m.gradient_checkpointing:
        return Cost(linear=4 * m.hidden_size), kept + passing
    return kept, passing


def quick_weights(module: nn.Module) -> None:
    """Storage for a module built on the meta device. The real initialisation would take most of the time."""
    module.to_empty(device="cpu")
    noise = 0.02 * torch.randn(10_007)  # a prime, so that no two rows are equal
    with torch.no_grad():
        for parameter in module.parameters():
            n = parameter.numel()
            parameter.copy_(noise.repeat(n // len(noise) + 1)[:n].view_as(parameter))
        for buffer in module.buffers():
            buffer.zero_()


def head_cost(head: MLMHead, embedding: Embedding, width: int, dtype: torch.dtype | None) -> Cost:
    """What the head and the loss keep, per labelled row."""
    vocabulary = len(head.vocabulary)
    few, many = (
        saved_bytes(
            lambda rows=rows: head.loss(  # type: ignore[misc]
                torch.randn(rows, width, requires_grad=True), torch.randint(vocabulary, (rows,))
            ),
            [head, embedding],
            dtype,
        )
        for rows in (16, 32)
    )
    slope = (many - few) / 16
    return Cost(fixed=few - 16 * slope, linear=slope)


def tokens_like(x: Tensor, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, x.shape[:2])


def cost_of(
    run: Callable[[Tensor, Sequences], Any],
    owners: list[nn.Module],
    cfg: RunConfig,
    dtype: torch.dtype | None,
) -> Cost:
    """The Cost of `run(x [1,nT,D], seqs)`, from one and two sequences and two lengths."""
    long = min(cfg.training.max_length, MEASURE_TOKENS)
    short = max(long // 2, 1)

    def kept(n: int, T: int) -> float:
        seqs = Sequences.packed(torch.arange(0, n * T + 1, T, dtype=torch.int32), T, n * T)
        x = torch.randn(1, n * T, cfg.model.hidden_size, requires_grad=True)
        return saved_bytes(lambda: run(x, seqs), owners, dtype)

    one = kept(1, long)
    per_long = max(kept(2, long) - one, 0.0)
    fixed = max(one - per_long, 0.0)
    per_short = max(kept(1, short) - fixed, 0.0)
    square = max(0.0, (per_long / long - per_short / short) / (long - short))
    return Cost(fixed, per_long / long - square * long, square)


def saved_bytes(call: Callable[[], Any], owners: list[nn.Module], dtype: torch.dtype | None) -> int:
    """Bytes of the distinct storages that autograd keeps during `call()`, without the owners' parameters."""
    own = {t.untyped_storage().data_ptr() for owner in owners for t in (*owner.parameters(), *owner.buffers())}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        autocast(torch.device("cpu"), dtype),
    ):
        kept_alive = call()  # so that no storage is freed and its address used again
    del kept_alive
    return sum(sizes.values())


# Text


def render(e: Estimate) -> str:
    m, t = e.cfg.model, e.cfg.training
    rows: list[tuple[str, ...]] = [("group", "parameters", "weights", "gradients", "optimizer")]
    for name in GROUPS:
        g = e.groups[name]
        if g.parameters:
            rows.append((name, f"{g.parameters:,}", *map(gib, (g.weights, g.gradients, g.optimizer))))
    sums = [sum(getattr(g, f.name) for g in e.groups.values()) for f in dataclasses.fields(GroupMemory)]
    rows.append(("total", f"{sums[0]:,}", *map(gib, sums[1:])))
    loops = f" x {m.num_loops} loops" if m.num_loops > 1 else ""
    galore = f", GaLore of rank {t.galore_rank}" if t.use_galore else ""
    precision = f"mixed precision ({t.amp_dtype})" if t.use_amp else "float32"
    recompute = "each layer" if m.gradient_checkpointing else "ode steps" if recomputes_ode(e.cfg) else "nothing"
    checkpoints = t.max_rolling_checkpoints + t.num_best_checkpoints
    lengths = min(t.max_length, MEASURE_TOKENS)
    lines = [
        f"{e.cfg.model_class}: {m.num_layers} layers{loops}, width {m.hidden_size}, {sums[0]:,} parameters",
        "",
        *align(rows),
        "",
        f"optimizer    AdamW{galore}; this and the table above are exact",
        f"activations  {gib(e.activations(t.batch_size))} for batch_size {t.batch_size} x {t.max_length} "
        f"tokens, {precision}, recomputed in the backward pass: {recompute}",
        f"             measured on this CPU, one layer of each kind, at most {lengths} tokens, then scaled;",
        "             the ops' temporary buffers and fragmentation come on top",
        f"peak         {gib(e.total(t.batch_size))}",
        "",
        f"largest batch_size with {USABLE:.0%} of the memory in use:",
    ]
    sizes: list[tuple[str, ...]] = [
        (f"{gb} GB", f"{e.largest_batch(gb):,}" if e.largest_batch(gb) else "none") for gb in DEVICE_SIZES
    ]
    lines += ["  " + line for line in align(sizes)]
    lines += [
        "",
        f"checkpoint   {gib(e.checkpoint)} on disk, {checkpoints} kept at most "
        f"({t.max_rolling_checkpoints} rolling, {t.num_best_checkpoints} best): "
        f"{gib(e.checkpoint * checkpoints)}, and room for one more while it is written",
    ]
    return "\n".join(lines)


def recomputes_ode(cfg: RunConfig) -> bool:
    m = cfg.model
    return "ode" in m.mixers and isinstance(m, OdeFields) and m.ode_checkpoint == "step"


def align(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def gib(count: float) -> str:
    """Bytes in the unit that leaves three digits or so."""
    return f"{count / 2**20:,.1f} MiB" if count < GIB else f"{count / GIB:,.2f} GiB"
