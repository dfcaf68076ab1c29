"""What every config section is made of: strict, immutable fields, and the model fields that are shared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, field_validator, model_validator

Problem = tuple[str, str]  # (field to blame, what is wrong and what to do)


class FieldProblems(ValueError):
    """Fields that are each in range but contradict one another; `problems` places each on a field."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(f"{field}: {message}" for field, message in problems))
        self.problems = problems


class Fields(BaseModel):
    """Strict (no coercion, unknown names refused) and frozen. YAML lists become tuples."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _consistent(self) -> Fields:
        # Along the MRO, so that each component states its own checks and a composed config runs all of them.
        found = [
            problem
            for cls in type(self).__mro__
            if issubclass(cls, Fields) and "problems" in vars(cls)
            for problem in cls.problems(self)
        ]
        if found:
            raise FieldProblems(list(dict.fromkeys(found)))
        return self

    def problems(self) -> Iterator[Problem]:
        """Contradictions among this class's own fields; subclasses need not call super."""
        yield from ()


class ModelFields(Fields):
    """The model fields that two or more components read; a component adds its own in its file."""

    vocab_size: int = Field(
        50000,
        ge=8,
        le=1 << 24,
        description="Rows of the token table: at least the tokenizer's ids, and the most that one trained here gets.",
    )
    hidden_size: int = Field(768, ge=1, le=1 << 16, description="Width of the residual stream.")
    num_layers: int = Field(12, ge=1, le=1024, description="Physical layers.")
    num_loops: int = Field(1, ge=1, le=1024, description="Passes through the same layers.")
    num_heads: int = Field(12, ge=1, description="Heads of the attention mixers and of ode; divides hidden_size.")
    dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Chance of dropout on the embedding output and on each mixer's and FFN's output; never on "
        "attention weights or inside an ode.",
    )
    layer_pattern: tuple[str, ...] = Field(
        ("standard_attn",), min_length=1, description="Mixers of the layers, repeated cyclically over num_layers."
    )
    norm_type: str = Field("layer_norm", description="Normalisation before each mixer, each FFN and the head.")
    norm_eps: PositiveFloat | Literal["auto"] = Field(
        "auto", description="Epsilon of layer and RMS norms; auto: 1e-5 in LayerNorm, 1e-6 in RMS norms."
    )
    norm_alpha_init: PositiveFloat | Literal["auto"] = Field(
        "auto",
        description="Initial alpha of dynamic_tanh and derf; auto: 1.0, and for dynamic_tanh above width 1024 the "
        "paper's value for each site.",
    )
    position_encoding: Literal["auto", "rope", "none"] = Field(
        "auto",
        description="Positions in attention. auto: HoPE in titan_attn where use_hope, rotary elsewhere; "
        "rope or none: that in every attention mixer, whatever use_hope says.",
    )
    rope_theta: float = Field(10000.0, gt=1, description="Base of the rotary frequencies.")
    qk_norm: bool | Literal["auto"] = Field(
        "auto", description="RMS norm of queries and keys per head; auto: in sigmoid_attn only."
    )
    use_bitnet: bool = Field(False, description="Ternary weights, 8-bit activations in the blocks (BitNet b1.58).")
    bitnet_scale: Literal["mean", "median"] = Field("mean", description="Weight scale: mean or median of |W|.")
    use_factorized_embedding: bool = Field(False, description="Token table of reduced width, then a projection.")
    factorized_embedding_dim: int = Field(128, ge=1, description="Width of the factorised token table.")
    use_moe: bool = Field(True, description="Mixture of experts as the FFN; false: one dense FFN.")
    ffn_hidden_size: int = Field(3072, ge=1, le=1 << 20, description="Inner width of the FFN and of each expert.")
    ffn_activation: Literal["silu", "gelu"] = Field("silu", description="Activation of the FFN.")
    ffn_gated: bool = Field(
        False, description="GeGLU / SwiGLU with inner width 2/3 of ffn_hidden_size, rounded up to a multiple of 8."
    )
    init_std: PositiveFloat | Literal["auto"] = Field(
        "auto",
        description="Standard deviation of the truncated normal initialisation; "
        "auto: 0.02, with dynamic_tanh or derf below width 768 times sqrt(768 / hidden_size).",
    )

    @property
    def head_dim(self) -> int:
        """K: width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def layer_norm_eps(self) -> float:
        return 1e-5 if self.norm_eps == "auto" else self.norm_eps

    @property
    def rms_norm_eps(self) -> float:
        return 1e-6 if self.norm_eps == "auto" else self.norm_eps

    @property
    def initial_std(self) -> float:
        """init_std as a number. 0.02 is BERT's value at width 768. Narrower maps have less gain with it, and under a
        norm that does not rescale the signal then fades until nothing trains: at width 64 the loss stays that of
        guessing.
        """
        if self.init_std == "auto":
            return 0.02 if self.norm_type == "layer_norm" else 0.02 * max(1.0, 768 / self.hidden_size) ** 0.5
        return self.init_std

    @property
    def mixers(self) -> tuple[str, ...]:
        """The mixer of each physical layer: layer_pattern repeated over num_layers."""
        return tuple(self.layer_pattern[i % len(self.layer_pattern)] for i in range(self.num_layers))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def head_problems(hidden_size: int, field: str, heads: int, pairs: str | None, *, used_by: str) -> Iterator[Problem]:
    """Heads must divide hidden_size; into an even width if `pairs` names a position encoding (None: any)."""
    fits = [d for d in divisors(hidden_size) if pairs is None or (hidden_size // d) % 2 == 0]
    near = ", ".join(str(d) for d in sorted(sorted(fits, key=lambda d: abs(d - heads))[:3]))
    advice = f"{field} may be {near}" if fits else "make hidden_size even"
    if hidden_size % heads:
        yield field, f"{heads} heads do not divide hidden_size {hidden_size} ({used_by}); {advice}"
    elif pairs and (hidden_size // heads) % 2:
        width = hidden_size // heads
        yield (
            field,
            f"head width {hidden_size}/{heads} = {width} is odd, but {pairs} needs pairs; {advice}",
        )


def attention_problems(cfg: ModelFields, mixer: str, *, hope: bool = False) -> Iterator[Problem]:
    """num_heads against hidden_size, when some layer of `cfg` is `mixer`."""
    if mixer in cfg.layer_pattern:
        pairs = None if cfg.position_encoding == "none" else "HoPE" if hope else "rotary position encoding"
        yield from head_problems(cfg.hidden_size, "num_heads", cfg.num_heads, pairs, used_by=f"layer {mixer}")
