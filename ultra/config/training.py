"""TrainingConfig: the `training` section: data, optimizer per parameter group, schedule, checkpoints, run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, PositiveInt, create_model

from ultra.config.fields import Fields, Problem

GROUPS = ("embeddings", "norms", "ode", "retnet", "mamba", "attention", "other")

Beta = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class GroupOptim(NamedTuple):
    """AdamW settings of one parameter group."""

    lr: float
    wd: float
    betas: tuple[float, float]
    eps: float


class SourceFields(Fields):
    """One of several sources: a path, a Hugging Face dataset or the built-in corpus."""

    path: str | None = Field(
        None, min_length=1, description="Folder of .parquet, .txt, .jsonl or .csv files, or one such file."
    )
    dataset_name: str | None = Field(None, min_length=1, description="Hugging Face dataset.")
    dataset_config: str | None = Field(None, min_length=1, description="Its configuration.")
    dataset_split: str = Field("train", min_length=1, description="Its split.")
    builtin: bool = Field(False, description="The built-in corpus.")
    text_column: str | None = Field(
        None, min_length=1, description="Column that holds the text; null: 'text', else the only one of text."
    )
    weight: float = Field(1.0, gt=0, description="Its part of the training windows, relative to the other weights.")

    def problems(self) -> Iterator[Problem]:
        given = [name for name in ("path", "dataset_name", "builtin") if getattr(self, name)]
        if not given:
            yield "path", "a source needs one of path, dataset_name, builtin: true"
        elif len(given) > 1:
            yield (
                given[1],
                f"set beside {given[0]}; a source has one of path, dataset_name, builtin: make it two entries",
            )
        elif self.dataset_config and not self.dataset_name:
            yield "dataset_config", "belongs to a dataset_name, which this source has not"


class DataFields(Fields):
    """What is read, and how it becomes batches."""

    batch_size: int = Field(4, ge=1, description="Sequences per micro-batch and process.")
    dataloader_workers: int = Field(2, ge=0, description="Processes that make batches; 0: in the trainer's own.")
    max_length: int = Field(512, ge=4, le=1 << 20, description="Tokens per sequence, [CLS] and [SEP] included.")
    mlm_probability: float = Field(
        0.15, gt=0, lt=1, description="Chance of each token to be predicted in training; evaluations use 0.15."
    )
    max_samples: int = Field(20000000, ge=1, description="Documents to read, training and validation together.")
    dataset_batch_size: int = Field(25000, ge=1, description="Rows tokenised and cached as one unit.")
    num_workers: int = Field(
        8,
        ge=0,
        description="Processes that tokenise, as far as there are cores and work for them; 0: in the trainer's own.",
    )
    cache_dir: str = Field(
        "./temp_data/v2_dataset_cache",
        min_length=1,
        description="Folder of the token cache, which any number of runs may share.",
    )
    local_parquet_dir: str | None = Field(
        None,
        min_length=1,
        description="Folder of .parquet, .txt, .jsonl or .csv files, or one such file; null: see dataset_name and "
        "sources.",
    )
    prefer_local_cache: bool = Field(
        True,
        description="true: a matching complete cache is used without opening the source; false: it is filled again.",
    )
    stream_local_parquet: bool = Field(
        True,
        description="true: read on demand, training starts after the first unit; false: fill the whole cache first.",
    )
    dataset_name: str | None = Field(
        None, min_length=1, description="Hugging Face dataset; null, and no local_parquet_dir: the built-in corpus."
    )
    dataset_config: str | None = Field(None, min_length=1, description="Its configuration.")
    dataset_split: str = Field("train", min_length=1, description="Its split.")
    text_column: str | None = Field(
        None, min_length=1, description="Column that holds the text; null: 'text', else the only one of text."
    )
    sources: tuple[SourceFields, ...] = Field(
        (),
        max_length=1024,
        description="Several sources instead of local_parquet_dir or dataset_name: a list of maps, such as "
        "[{path: my/wiki, weight: 3}, {builtin: true}]; each gives its weight's part of the training windows, "
        "whatever its size: a small one repeats.",
    )
    tokenizer: str | None = Field(
        None,
        min_length=1,
        description="A tokenizer.json, or a folder with one; null: that of init_from, else byte-level BPE trained "
        "on the source.",
    )
    val_fraction: float = Field(0.01, gt=0, lt=1, description="Share of the documents held out, chosen by hash.")
    mask_strategy: tuple[Share, Share, Share] = Field(
        (0.8, 0.1, 0.1), description="Predicted tokens shown as [MASK], as a random token, unchanged; sum 1."
    )
    dynamic_masking: bool = Field(True, description="Draw new masks every epoch; false: the same ones again.")
    pack_sequences: bool = Field(
        True, description="Fill sequences with several documents, unseen by one another; false: one piece each."
    )
    use_amp: bool = Field(
        False, description="Mixed precision: products in amp_dtype; weights, optimizer and sums stay float32."
    )
    amp_dtype: Literal["auto", "bf16", "fp16"] = Field(
        "auto", description="Type of mixed precision; auto: bf16 if there is hardware, else fp16 (GPU) or none (CPU)."
    )
    gradient_accumulation_steps: int = Field(4, ge=1, description="Micro-batches per optimizer step.")


def _group_fields() -> dict[str, Any]:
    """lr_<group>, wd_<group>, betas_<group>, eps_<group> for each of GROUPS, in the documented order."""
    beta_pair = tuple[Beta, Beta]
    settings: list[tuple[str, Any, Any, dict[str, Any], str]] = [
        ("lr", float, 1e-3, {"ge": 0}, "Peak learning rate of the {} group."),
        (
            "wd",
            float,
            0.01,
            {"ge": 0},
            "Weight decay of the {} group; never on biases, A_log, D, scale, damping, alpha, shift.",
        ),
        ("betas", beta_pair, (0.9, 0.95), {}, "Adam betas of the {} group."),
        ("eps", float, 1e-8, {"gt": 0}, "Adam epsilon of the {} group."),
    ]
    return {
        f"{name}_{group}": (
            kind,
            Field(
                0.001 if (name, group) == ("wd", "norms") else default,
                description=text.format(group),
                **limits,
            ),
        )
        for name, kind, default, limits, text in settings
        for group in GROUPS
    }


if TYPE_CHECKING:  # a type checker cannot see inside create_model: read these through TrainingConfig.optim
    GroupFields = DataFields
else:
    GroupFields = create_model("GroupFields", __base__=DataFields, **_group_fields())


class TrainingConfig(GroupFields):
    """Data, optimizer, schedule, safety nets and checkpoints. A step is an optimizer step everywhere."""

    scheduler_total_steps: int = Field(
        10000,
        ge=1,
        description="Optimizer steps over which the rates change; unless max_steps is set, also those of the run.",
    )
    scheduler_warmup_ratio: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of scheduler_total_steps, rounded up, over which the rates rise; constant has none.",
    )
    scheduler_type: Literal["cosine", "constant", "linear_warmup_then_constant", "linear", "wsd"] = Field(
        "cosine",
        description="cosine and linear fall to min_lr_ratio; constant has no warm-up; "
        "wsd: warm-up, stable, linear fall over the last fifth.",
    )
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Last rate over peak rate: cosine, linear, wsd.")
    max_steps: PositiveInt | None = Field(None, description="Optimizer steps of the run; null: scheduler_total_steps.")
    grad_clip_max_norm: float = Field(5.0, gt=0, description="Gradients of a larger global norm are scaled down to it.")
    inf_post_clip_threshold: float = Field(
        100.0,
        gt=0,
        description="A step is skipped when its gradient norm before clipping is not finite, or exceeds both this "
        "and 10 times its running median.",
    )
    max_nan_retries: int = Field(
        3,
        ge=0,
        description="Windows of nan_check_interval steps with a bad step, in a row, before the run goes back to its "
        "last good checkpoint at half the rates; 0: it stops instead. Twice back to the same one stops it too.",
    )
    checkpoint_every_n_steps: int = Field(
        500, ge=1, description="Steps between rolling checkpoints; a signal and the end of the run write one too."
    )
    max_rolling_checkpoints: int = Field(
        3, ge=1, description="Newest checkpoints kept, beside the best and the last good one."
    )
    num_best_checkpoints: int = Field(
        2, ge=0, description="Checkpoints of lowest held-out loss kept; an evaluation that is among them writes one."
    )
    val_interval: int = Field(500, ge=1, description="Steps between evaluations; step 0 and the last one have one too.")
    eval_samples: int = Field(512, ge=1, description="Held-out sequences per evaluation; all, where there are fewer.")
    nan_check_interval: int = Field(
        10,
        ge=1,
        description="Steps between the host's looks for bad steps, which the device itself has skipped at once.",
    )
    log_gradient_stats: bool = Field(
        True, description="Log the gradient norm of every parameter group and the loads of the experts."
    )
    gradient_log_interval: int = Field(10, ge=1, description="Steps between these figures.")
    use_galore: bool = Field(
        False, description="Low-rank Adam moments for the large matrices, experts included (GaLore)."
    )
    galore_rank: int = Field(
        64,
        ge=1,
        description="Rank r of the moments: r x max(m, n) for a matrix m x n; one with a side of at most r stays "
        "with AdamW.",
    )
    galore_update_interval: int = Field(
        1, ge=1, description="Steps between new subspaces; 50 to 200 cost far less than 1."
    )
    galore_scale: float = Field(
        1.0, gt=0, description="Factor on the update of the projected matrices, beside their group's rate."
    )
    galore_max_dim: int = Field(4096, ge=1, description="Matrices with a longer side are left to AdamW.")
    galore_method: Literal["randomized", "svd"] = Field(
        "randomized", description="How the subspace is found: by a random sketch, or by an exact SVD."
    )
    galore_rotate_moments: bool = Field(
        True,
        description="Carry the moments over into a new subspace; false, as published, does not converge with an "
        "interval of 1.",
    )
    galore_per_layer: bool = Field(
        False,
        description="Update each projected matrix once its gradient is whole, and free that: less memory. "
        "Clipping is per matrix, a step found bad may have moved some, and "
        "gradient_accumulation_steps must be 1.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of the initialisation, sample order, masks and dropout.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Where to train; auto: cuda, else mps, else cpu."
    )
    compile: bool = Field(False, description="torch.compile the encoder as one graph; evaluation stays eager.")
    init_from: str | None = Field(
        None,
        min_length=1,
        description="Run, checkpoint or exported folder whose weights and tokenizer the training starts from; "
        "optimizer, schedule and data are new, the model section must be its own.",
    )
    log_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = Field(
        (), description="Trackers besides metrics.jsonl and metrics.csv; they need the extra [track]."
    )

    def optim(self, group: str) -> GroupOptim:
        """The four settings of one of GROUPS."""
        return GroupOptim(*(getattr(self, f"{name}_{group}") for name in GroupOptim._fields))

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.scheduler_total_steps if self.max_steps is None else self.max_steps

    def problems(self) -> Iterator[Problem]:
        for name in ("local_parquet_dir", "dataset_name", "dataset_config", "text_column") if self.sources else ():
            if getattr(self, name) is not None:
                yield name, "set beside sources; move it into an entry of sources, or set it to null"
        if abs(sum(self.mask_strategy) - 1) > 1e-6:
            yield "mask_strategy", f"the shares sum to {sum(self.mask_strategy):g}; they must sum to 1"
        if self.use_galore and self.galore_per_layer and self.gradient_accumulation_steps > 1:
            yield (
                "galore_per_layer",
                "updates a matrix at its first gradient, so gradient_accumulation_steps must be 1 "
                f"(got {self.gradient_accumulation_steps})",
            )
