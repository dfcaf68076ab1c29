from __future__ import annotations

import re

import jsonschema
import pytest
import yaml

from ultra.config import RunConfig, TrainingConfig, UltraConfig, load_config, presets
from ultra.config.fields import ModelFields
from ultra.config.load import explain
from ultra.config.schema import json_schema, schema_yaml
from ultra.config.training import GROUPS
from ultra.ffn import FFNS
from ultra.mixers import MIXERS
from ultra.norms import NORMS

from .conftest import ROOT

# The public keys. Renaming or removing one breaks users' files: that needs a line in CHANGELOG.md. A new component may
# bring more.
MODEL = """
vocab_size hidden_size num_layers num_loops num_heads dropout layer_pattern norm_type norm_eps
norm_alpha_init position_encoding rope_theta qk_norm use_bitnet bitnet_scale use_factorized_embedding
factorized_embedding_dim ffn_hidden_size ffn_activation ffn_gated init_std retention_heads
retention_bidirectional retention_window retention_rotary retention_value_factor retention_chunk
mamba_d_state mamba_d_conv mamba_expand mamba_dt_rank mamba_bidirectional mamba_bc_norm ode_solver ode_steps
ode_checkpoint ode_time use_hope hope_base hope_damping hope_mode hope_rope_fraction
hope_learnable_damping titan_persistent_tokens titan_memory sigmoid_bias sigmoid_normalize use_moe
num_experts top_k_experts moe_norm_topk moe_aux_loss moe_z_loss moe_balance moe_bias_rate
use_embedding_conv embedding_conv_kernel embedding_conv_residual embedding_conv_depthwise
embedding_conv_causal embedding_scale tie_embeddings head_bias mlm_head bitnet_head loop_embedding
loop_injection layerscale_init bitnet_two_stage gradient_checkpointing
"""
TRAINING = """
batch_size dataloader_workers max_length mlm_probability max_samples dataset_batch_size num_workers
cache_dir local_parquet_dir prefer_local_cache stream_local_parquet dataset_name dataset_config
dataset_split text_column sources tokenizer val_fraction mask_strategy dynamic_masking pack_sequences use_amp
amp_dtype gradient_accumulation_steps scheduler_total_steps scheduler_warmup_ratio scheduler_type
min_lr_ratio max_steps grad_clip_max_norm inf_post_clip_threshold max_nan_retries
checkpoint_every_n_steps max_rolling_checkpoints num_best_checkpoints val_interval eval_samples
nan_check_interval log_gradient_stats gradient_log_interval use_galore galore_rank galore_update_interval
galore_scale galore_max_dim galore_method galore_rotate_moments galore_per_layer seed device compile
init_from log_to
"""


def test_public_keys() -> None:
    groups = "embeddings norms ode retnet mamba attention other".split()
    assert list(GROUPS) == groups
    per_group = {f"{name}_{group}" for name in ("lr", "wd", "betas", "eps") for group in groups}
    assert set(UltraConfig.model_fields) >= set(MODEL.split())
    assert set(TrainingConfig.model_fields) == set(TRAINING.split()) | per_group
    assert list(RunConfig.model_fields) == ["model_class", "model", "training"]


def test_every_component_contributes_its_fields_once() -> None:
    owners: dict[str, str] = {}
    for cls in UltraConfig.__mro__:
        if issubclass(cls, ModelFields) and cls not in (UltraConfig, ModelFields):
            for name in vars(cls).get("__annotations__", {}):
                assert name not in ModelFields.model_fields, f"{cls.__name__}.{name} is a shared field"
                assert owners.setdefault(name, cls.__name__) == cls.__name__
    for block in (*MIXERS.values(), *NORMS.values(), *FFNS.values()):
        assert issubclass(UltraConfig, block.Fields)
        assert block.param_group in GROUPS


def test_schema_file_is_up_to_date() -> None:
    written = (ROOT / "configs" / "schema.yaml").read_text(encoding="utf-8")
    assert written == schema_yaml(), "run: python -m ultra.cli schema > configs/schema.yaml"


def test_schema_is_2020_12_and_agrees_with_the_loader() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for path in presets().values():
        validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    validator.validate(yaml.safe_load(RunConfig().to_yaml()))
    for bad in (
        {"optim": {}},
        {"model": {"hiden_size": 3}},
        {"model": {"layer_pattern": ["lstm"]}},
        {"model": {"layer_pattern": []}},
        {"training": {"betas_ode": [0.9, 1.0]}},
        {"training": {"betas_ode": [0.9]}},
        {"training": {"mlm_probability": 1}},
        {"model_class": "maxi"},
    ):
        assert not validator.is_valid(bad), bad
    defs = schema["$defs"]
    assert defs["UltraConfig"]["properties"]["layer_pattern"]["items"]["enum"] == list(MIXERS)
    assert defs["UltraConfig"]["properties"]["norm_type"]["enum"] == list(NORMS)


def test_every_field_is_described_and_explained() -> None:
    for section in (UltraConfig, TrainingConfig, RunConfig):
        for name, field in section.model_fields.items():
            assert field.description and field.description[-1] in ".gmse", name
    assert explain("betas_ode").splitlines() == [
        "training.betas_ode",
        "  Adam betas of the ode group.",
        "  allowed: a list of 2, each a number >= 0 and < 1",
        "  default: [0.9, 0.95]",
    ]
    assert explain("model.hidden_size") == explain("hidden_size")
    assert "frankenstein, mini" in explain("model_class")


PATTERN = ("retnet", "titan_attn", "retnet", "mamba", "titan_attn", "ode")
TABLE = """
                          frankenstein mini         standard     standard_hope tinybert     embbert
model_class               frankenstein mini         frankenstein frankenstein  frankenstein frankenstein
hidden_size               1024         384          768          768           768          128
num_layers                12           6            12           12            6            4
num_loops                 2            2            1            1             1            1
num_heads                 16           6            12           12            12           1
retention_heads           8            6            12           12            12           1
norm_type                 dynamic_tanh derf         layer_norm   layer_norm    layer_norm   layer_norm
use_bitnet                true         false        false        false         false        false
use_moe                   true         true         false        false         false        false
use_hope                  true         true         false        true          false        false
ode_solver                rk4          rk4          rk4          rk4           rk4          rk4
ode_steps                 4            2            2            2             2            2
use_factorized_embedding  false        true         false        false         false        true
use_embedding_conv        false        true         false        false         false        true
ffn_hidden_size           2048         768          3072         3072          3072         512
ffn_activation            silu         silu         gelu         gelu          gelu         gelu
vocab_size                50000        50000        50000        50000         50000        50000
dropout                   0.1          0.1          0.1          0.1           0.1          0.1
max_length                512          512          512          512           512          512
mlm_probability           0.15         0.15         0.15         0.15          0.15         0.15
"""
HEAD, *ROWS = (line.split() for line in TABLE.strip().splitlines())
SPECIAL = {
    "frankenstein": {"layer_pattern": PATTERN, "num_experts": 4, "top_k_experts": 2},
    "mini": {
        "layer_pattern": PATTERN,
        "num_experts": 4,
        "top_k_experts": 2,
        "factorized_embedding_dim": 128,
        "embedding_conv_kernel": 3,
    },
    "standard": {"layer_pattern": ("standard_attn",)},
    "standard_hope": {"layer_pattern": ("titan_attn",)},
    "tinybert": {"layer_pattern": ("standard_attn",)},
    "embbert": {
        "layer_pattern": ("standard_attn",),
        "factorized_embedding_dim": 16,
        "embedding_conv_kernel": 32,
    },
}


@pytest.mark.parametrize(("name", "column"), [(name, i) for i, name in enumerate(HEAD, start=1)])
def test_presets_have_their_documented_values(name: str, column: int) -> None:
    config = load_config(name)
    values = {"model_class": config.model_class} | config.model.model_dump() | config.training.model_dump()
    expected = {row[0]: yaml.safe_load(row[column]) for row in ROWS} | SPECIAL[name]
    assert {key: values[key] for key in expected} == expected
    assert config == load_config(ROOT / "configs" / f"{name}.yaml")


def test_quickstart_has_every_mixer() -> None:
    config = load_config("quickstart")
    assert len(set(config.model.mixers)) == config.model.num_layers == 6
    assert config.model.dropout == 0
    assert config.model.vocab_size == 8192
    assert config.training.val_fraction == 0.05
    assert set(presets()) >= {*HEAD, "quickstart"}


def test_presets_state_only_what_differs_or_is_architecture() -> None:
    architecture = {row[0] for row in ROWS} | {"layer_pattern", "num_experts", "top_k_experts"}
    default = RunConfig().model_dump(mode="json")
    for path in presets().values():
        stated = yaml.safe_load(path.read_text(encoding="utf-8"))
        for section in ("model", "training"):
            for key, value in stated[section].items():
                assert key in architecture | SPECIAL["mini"].keys() or value != default[section][key], (
                    path,
                    key,
                )


def test_rates_are_read_as_numbers_by_every_yaml_reader() -> None:
    for path in presets().values():
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.match(r"\s+(lr|wd|eps)_", line):
                assert isinstance(next(iter(yaml.safe_load(line).values())), float), (path, line)
