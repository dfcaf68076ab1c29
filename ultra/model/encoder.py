"""The encoder: embedding, looped stack of blocks, final norm, head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint

from ultra.config.fields import ModelFields, Problem
from ultra.ffn.moe import MoEFFN
from ultra.layers.module import GROUPS, Component
from ultra.layers.sequences import Sequences, unpad
from ultra.model.block import Block
from ultra.model.embedding import Embedding
from ultra.model.head import MLMHead
from ultra.norms import NORMS
from ultra_kernels import MoEStats

if TYPE_CHECKING:
    from ultra.config import RunConfig, UltraConfig


class EncoderFields(ModelFields):
    loop_embedding: bool = Field(True, description="A learned vector per loop, zero at first; needs num_loops > 1.")
    loop_injection: Literal["gated", "none"] = Field(
        "gated", description="Feed the embedding into every further loop through a gate, zero at first."
    )
    layerscale_init: float | None = Field(
        None,
        gt=0,
        description="Initial value of a learned scale per channel on each block's output; null: no scale.",
    )
    bitnet_two_stage: bool = Field(
        False,
        description="Train a BitNet in two stages: at half of scheduler_total_steps the rates begin the schedule anew "
        "from a quarter of their peaks, without warm-up, and weight decay ends. Needs use_bitnet.",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute each layer in the backward pass: less memory.")

    def problems(self) -> Iterator[Problem]:
        if self.bitnet_two_stage and not self.use_bitnet:
            yield "bitnet_two_stage", "is for ternary weights: set use_bitnet: true, or leave it out"


@dataclass
class MLMOutput:
    """What a forward pass returns; the numbers of a loss are None without labels."""

    last_hidden_state: torch.Tensor  # [B,T,D] after the final norm, zero at padding
    loss: torch.Tensor | None  # mean cross-entropy over labelled tokens + aux_loss
    loss_sum: torch.Tensor | None  # its sum over labelled tokens
    num_labelled: torch.Tensor | None
    aux_loss: torch.Tensor  # MoE balance and z-loss, mean over logical layers; 0 without MoE
    moe_stats: tuple[MoEStats, ...]  # one per logical layer, detached
    _labels: torch.Tensor | None
    _head: MLMHead

    @property
    def logits(self) -> torch.Tensor:
        """`[M,V]` of the M labelled tokens, or of all tokens `[B,T,V]` without labels; computed when read."""
        hidden = self.last_hidden_state
        return self._head.logits(hidden if self._labels is None else hidden[self._labels != -100])


class Encoder(Component):
    """Token ids -> hidden states -> masked-language-model loss."""

    Fields: ClassVar[type[ModelFields]] = EncoderFields
    param_group: ClassVar[str] = "other"

    def __init__(self, cfg: UltraConfig) -> None:
        super().__init__()
        self.cfg = cfg
        # of the module's own: torch.compile takes these as constants, those of another object for inputs
        self.dropout, self.num_loops = cfg.dropout, cfg.num_loops
        self.checkpointing = cfg.gradient_checkpointing
        self.embedding = Embedding(cfg)
        self.layers = nn.ModuleList(
            Block(cfg, mixer, use_moe=cfg.use_moe, layerscale_init=cfg.layerscale_init) for mixer in cfg.mixers
        )
        self.loops = Loops(cfg) if cfg.num_loops > 1 else None
        self.final_norm = NORMS[cfg.norm_type](cfg, cfg.hidden_size, site="final")
        self.head = MLMHead(cfg, self.embedding)
        for module in self.modules():
            for name in module.no_galore if isinstance(module, Component) else ():
                parameter = module.get_parameter(name) if has_parameter(module, name) else None
                if parameter is not None:
                    parameter.no_galore = True  # type: ignore[attr-defined]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> MLMOutput:
        """Raises ValueError on shapes that do not fit. The loss is the mean cross-entropy of the labelled tokens.

        input_ids, attention_mask (non-zero = token), labels (-100 = none) `[B,T]`.

        Or packed rows: input_ids, labels `[1,T]` with cu_seqlens (int32 `[S+1]`) and max_seqlen, no attention_mask.
        Padding is taken out here and put back into last_hidden_state: the layers never see it. How much there is is
        data, so an attention_mask breaks a compiled graph, here and nowhere else; without one there is no break.
        """
        B, T = check_inputs(input_ids, attention_mask, labels, cu_seqlens, max_seqlen)
        mask = None if attention_mask is None else attention_mask != 0
        packed = None if mask is None else unpad(mask)
        ids, targets = input_ids, labels
        if packed is not None and mask is not None:
            tokens, cu_seqlens, max_seqlen = packed
            ids = input_ids.reshape(-1)[tokens][None]
            if labels is not None:
                labels = labels.masked_fill(~mask, -100)
                targets = labels.reshape(-1)[tokens][None]
        if cu_seqlens is None:
            seqs = Sequences.dense(T, ids.device)
        else:
            assert max_seqlen is not None
            seqs = Sequences.packed(cu_seqlens, max_seqlen, ids.shape[1])
        hidden, stats = self.encode(ids, seqs)
        aux_loss = self.auxiliary_loss(stats, hidden)
        loss = loss_sum = num_labelled = None
        if labels is not None and targets is not None:
            loss_sum = self.head.loss(hidden, targets)
            num_labelled = (labels != -100).sum()
            loss = loss_sum / num_labelled.clamp(min=1) + aux_loss
        if packed is not None:
            flat = hidden.new_zeros(B * T, hidden.shape[-1]).index_copy(0, packed[0], hidden[0])
            hidden = flat.view(B, T, -1)
        detached = tuple(MoEStats(*(t.detach() for t in s)) for s in stats)
        return MLMOutput(hidden, loss, loss_sum, num_labelled, aux_loss, detached, labels, self.head)

    def encode(self, ids: torch.Tensor, seqs: Sequences) -> tuple[torch.Tensor, list[MoEStats]]:
        """ids `[B,T]` -> hidden states after the final norm, and the routing statistics of every logical layer."""
        embedded = dropout(self.embedding(ids, seqs), self.dropout, self.training)
        x, all_stats = embedded, []
        for loop in range(self.num_loops):
            if self.loops is not None and loop > 0:
                x = self.loops(x, embedded, loop)
            for layer in self.layers:
                if self.checkpointing and torch.is_grad_enabled():
                    x, stats = checkpoint(layer, x, seqs, use_reentrant=False)
                else:
                    x, stats = layer(x, seqs)
                if stats is not None:
                    all_stats.append(stats)
        return self.final_norm(x), all_stats

    def auxiliary_loss(self, stats: list[MoEStats], like: torch.Tensor) -> torch.Tensor:
        experts = [layer.ffn for layer in self.layers if isinstance(layer.ffn, MoEFFN)]
        # (an exported model's experts are packed and have no loss)
        losses = [experts[i % len(experts)].auxiliary_loss(s) for i, s in enumerate(stats) if experts]
        return torch.stack(losses).mean() if losses else like.new_zeros((), dtype=torch.float32)

    def expert_loads(self, moe_stats: Sequence[MoEStats]) -> torch.Tensor:
        """`[layers, E]`: tokens that each expert of each layer got, summed over the loops; `[0, 0]` without experts."""
        if not moe_stats:
            return next(self.parameters()).new_empty(0, 0)
        return torch.stack([stats.counts for stats in moe_stats]).unflatten(0, (self.num_loops, -1)).sum(0)

    def update_moe_bias(self, loads: torch.Tensor) -> None:
        """After an optimizer step: balances the experts by their loads `[layers, E]` in that step."""
        experts = [layer.ffn for layer in self.layers if isinstance(layer.ffn, MoEFFN)]
        for ffn, load in zip(experts, loads, strict=True):
            ffn.update_bias(load)

    def param_groups(self) -> dict[str, list[tuple[str, nn.Parameter, bool]]]:
        """Optimizer group -> (name, parameter, decayed?); the nearest module around it that has a group decides."""
        groups: dict[str, list[tuple[str, nn.Parameter, bool]]] = {group: [] for group in GROUPS}
        modules = dict(self.named_modules())
        for name, parameter in self.named_parameters():
            path, _, leaf = name.rpartition(".")
            decay = "bias" not in leaf and leaf not in getattr(modules[path], "no_decay", ())
            while getattr(modules[path], "param_group", None) is None:
                path = path.rpartition(".")[0]
            groups[modules[path].param_group].append((name, parameter, decay))
        return groups


class Loops(Component):
    """Start of loop l ≥ 1: h + g_l · e + t_l, e the embedding; g and t are zero at first, so that nothing changes."""

    param_group: ClassVar[str] = "embeddings"

    def __init__(self, cfg: EncoderFields) -> None:
        super().__init__()
        shape = (cfg.num_loops - 1, cfg.hidden_size)
        self.gate = nn.Parameter(torch.zeros(shape)) if cfg.loop_injection == "gated" else None
        self.token = nn.Parameter(torch.zeros(shape)) if cfg.loop_embedding else None

    def forward(self, x: torch.Tensor, embedded: torch.Tensor, loop: int) -> torch.Tensor:
        if self.gate is not None:
            x = x + self.gate[loop - 1] * embedded
        return x if self.token is None else x + self.token[loop - 1]


def has_parameter(module: nn.Module, name: str) -> bool:
    return any(name == known for known, _ in module.named_parameters())


def check_inputs(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
) -> tuple[int, int]:
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; it must be [B,T]")
    for name, t in (("attention_mask", attention_mask), ("labels", labels)):
        if t is not None and t.shape != input_ids.shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, input_ids has {tuple(input_ids.shape)}")
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("cu_seqlens and attention_mask exclude each other: packed rows have no padding")
        if input_ids.shape[0] != 1 or max_seqlen is None:
            raise ValueError("with cu_seqlens, input_ids is [1,T] and max_seqlen (an int) is needed as well")
    return input_ids.shape[0], input_ids.shape[1]


def build_model(cfg: RunConfig | UltraConfig) -> Encoder:
    """The encoder that a loaded config, or its model section, describes, freshly initialised from torch's generator.

    Raises nothing that loading the config has not refused: `load_config`, or UltraConfig(...), checks every field.
    """
    return Encoder(cfg if isinstance(cfg, EncoderFields) else cfg.model)
