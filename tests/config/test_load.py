from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from ultra.config import ConfigError, RunConfig, TrainingConfig, UltraConfig, load_config
from ultra.config.training import GROUPS
from ultra.errors import UserError

from .conftest import SAMPLE

Write = Callable[[str], str]


def errors(path: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert isinstance(caught.value, UserError)
    return [line.removeprefix(path.rpartition("/")[0] + "/") for line in str(caught.value).splitlines()]


def test_the_documented_sample_keeps_every_value(write: Write, sample: str) -> None:
    config = load_config(write(sample))
    got = config.model_dump(mode="json")
    documented = yaml.safe_load(sample)
    assert got["model_class"] == "frankenstein"
    count = 0
    for section in ("model", "training"):
        for name, text in documented[section].items():
            expected = float(text) if isinstance(text, str) and text[0].isdigit() else text  # YAML 1.1: '1e-6'
            assert got[section][name] == expected, name
            count += 1
    assert count == 24 + 58
    assert config.training.optim("ode").lr == 1e-7


def test_a_field_left_out_takes_the_sample_value_except_rates_and_paths(write: Write, sample: str) -> None:
    given = load_config(write(sample)).model_dump()
    default = RunConfig().model_dump()
    assert {name for name in default["model"] if default["model"][name] != given["model"][name]} == set()
    differ = {name for name in default["training"] if default["training"][name] != given["training"][name]}
    assert differ == {f"lr_{group}" for group in GROUPS} | {"local_parquet_dir"}
    assert {default["training"][f"lr_{group}"] for group in GROUPS} == {1e-3}


def test_alternatives_left_in_the_sample_are_named(write: Write) -> None:
    assert errors(write(SAMPLE)) == [
        "cfg.yaml:1:1: model_class: got 'frankenstein|mini' (a text); allowed: frankenstein, mini; "
        "the sample lists the alternatives: write one of them",
        "cfg.yaml:17:3: model.norm_type: got 'layer_norm|dynamic_tanh|derf' (a text); allowed: layer_norm, "
        "dynamic_tanh, derf; the sample lists the alternatives: write one of them",
        "cfg.yaml:27:3: model.ffn_activation: got 'silu|gelu' (a text); allowed: silu, gelu; "
        "the sample lists the alternatives: write one of them",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "training:\n  lr_embedings: 1e-3",
            "2:3: training.lr_embedings: unknown field; did you mean 'lr_embeddings'?",
        ),
        ("training:\n  Batch-Size: 3", "2:3: training.Batch-Size: unknown field; did you mean 'batch_size'?"),
        ("model: {batch_size: 3}", "1:9: model.batch_size: unknown field; it belongs under training:"),
        ("model: {model_class: mini}", "1:9: model.model_class: unknown field; it belongs at the top level"),
        ("model: {quux: 3}", "1:9: model.quux: unknown field; `ultra schema` lists them all"),
        ("modle: {}", "1:1: modle: unknown top-level key; did you mean 'model'?"),
        ("optim: {}", "1:1: optim: unknown top-level key; allowed: model_class, model, training"),
        ("hidden_size: 3", "1:1: hidden_size: unknown top-level key; it belongs under model:"),
        (
            "model:\n  dims:\n    hidden: 512",
            "2:3: model.dims: holds a map, but model is flat: write its fields directly under model: "
            "(perhaps hidden_size); `ultra config explain FIELD` describes one",
        ),
        (
            'model:\n  hidden_size: "768"',
            "2:3: model.hidden_size: got '768' (a text); allowed: an integer >= 1 and <= 65536; "
            "write 768 without quotes, underscores or commas",
        ),
        (
            "training: {max_steps: 1e3}",
            "1:12: training.max_steps: got 1000.0 (a number); allowed: an integer > 0 or null; write 1000",
        ),
        (
            "training: {num_workers: 10_000}",
            "1:12: training.num_workers: got '10_000' (a text); allowed: an integer >= 0; "
            "write 10000 without quotes, underscores or commas",
        ),
        (
            "model: {use_moe: yes}",
            "1:9: model.use_moe: got 'yes' (a text); allowed: true or false; write true",
        ),
        ("model: {use_moe: 1}", "1:9: model.use_moe: got 1 (an integer); allowed: true or false"),
        (
            "model: {num_layers: true}",
            "1:9: model.num_layers: got true (true or false); allowed: an integer >= 1 and <= 1024",
        ),
        (
            "training: {batch_size: }",
            "1:12: training.batch_size: got null (nothing); allowed: an integer >= 1",
        ),
        ("training: {cache_dir: 3}", "1:12: training.cache_dir: got 3 (an integer); allowed: a text"),
        (
            "model: {num_layers: 0}",
            "1:9: model.num_layers: got 0 (an integer); allowed: an integer >= 1 and <= 1024",
        ),
        (
            "model: {vocab_size: 1}",
            "1:9: model.vocab_size: got 1 (an integer); allowed: an integer >= 8 and <= 16777216",
        ),
        ("model: {dropout: 1}", "1:9: model.dropout: got 1 (an integer); allowed: a number >= 0 and < 1"),
        (
            "training: {mlm_probability: 0}",
            "1:12: training.mlm_probability: got 0 (an integer); allowed: a number > 0 and < 1",
        ),
        ("training: {lr_ode: .nan}", "1:12: training.lr_ode: got nan (a number); allowed: a number >= 0"),
        ("training: {lr_ode: 1e999}", "1:12: training.lr_ode: got inf (a number); allowed: a number >= 0"),
        ("training: {lr_ode: -1e-3}", "1:12: training.lr_ode: got -0.001 (a number); allowed: a number >= 0"),
        ("model: {norm_eps: off}", "1:9: model.norm_eps: got 'off' (a text); allowed: a number > 0 or auto"),
        (
            "training: {betas_ode: [0.9, 1]}",
            "1:29: training.betas_ode[1]: got 1 (an integer); allowed: a number >= 0 and < 1",
        ),
        (
            "training: {betas_ode: [0.9]}",
            "1:12: training.betas_ode: got [0.9] (a list); allowed: a list of 2, each a number >= 0 and < 1",
        ),
        (
            "model: {layer_pattern: [retnet, mmamba]}",
            "1:33: model.layer_pattern[1]: got 'mmamba' (a text); allowed: retnet, mamba, ode, titan_attn, "
            "standard_attn, sigmoid_attn; did you mean 'mamba'?",
        ),
        (
            "model: {layer_pattern: []}",
            "1:9: model.layer_pattern: got an empty list; allowed: a list of 1 or more, each retnet, "
            "mamba, ode, titan_attn, standard_attn, sigmoid_attn",
        ),
        (
            "training: {log_to: wandb}",
            "1:12: training.log_to: got 'wandb' (a text); allowed: a list, each tensorboard, trackio, "
            "wandb; write [wandb]",
        ),
        (
            "model_class: minni",
            "1:1: model_class: got 'minni' (a text); allowed: frankenstein, mini; did you mean 'mini'?",
        ),
        ("model: [1]", "1:1: model: got [1] (a list); expected a map, such as `model: {hidden_size: 768}`"),
        (
            "",
            "1:1: empty file; expected a map with model_class, model and training, such as `training: {batch_size: 4}`",
        ),
        (
            "# only this\n",
            "1:1: empty file; expected a map with model_class, model and training, such as `training: {batch_size: 4}`",
        ),
        (
            "- model: {}",
            "1:1: a list at the top level; expected a map with model_class, model and training, "
            "such as `training: {batch_size: 4}`",
        ),
        (
            "model: {hidden_size: 64, num_heads: 7}",
            "1:26: model.num_heads: 7 heads do not divide hidden_size 64 (layer standard_attn); "
            "num_heads may be 2, 4, 8",
        ),
        (
            "model: {hidden_size: 30, num_heads: 10}",
            "1:26: model.num_heads: head width 30/10 = 3 is odd, but rotary position encoding needs pairs; "
            "num_heads may be 3, 5, 15",
        ),
        ("model: {top_k_experts: 5}", "1:9: model.top_k_experts: 5 is more than num_experts 4"),
        (
            "training: {mask_strategy: [1, 1, 0]}",
            "1:12: training.mask_strategy: the shares sum to 2; they must sum to 1",
        ),
    ],
)
def test_messages(write: Write, text: str, expected: str) -> None:
    assert errors(write(text)) == [f"cfg.yaml:{expected}"]


@pytest.mark.parametrize(
    ("mixer", "model", "field"),
    [
        *[(name, "num_heads: 5", "num_heads") for name in ("ode", "titan_attn", "standard_attn", "sigmoid_attn")],
        ("titan_attn", "num_heads: 64", "num_heads"),  # HoPE needs pairs
        ("retnet", "retention_heads: 5", "retention_heads"),
        ("retnet", "retention_heads: 64", "retention_heads"),
        ("retnet", "retention_window: [512, 4]", "retention_window"),
        ("retnet", "retention_window: [1, 4]", "retention_window"),
        ("mamba", "mamba_d_conv: 4", "mamba_d_conv"),
        ("sigmoid_attn", "sigmoid_normalize: true, sigmoid_bias: 0.0", "sigmoid_bias"),
        ("ode", "top_k_experts: 1, moe_norm_topk: true", "moe_norm_topk"),
    ],
)
def test_contradictions(write: Write, mixer: str, model: str, field: str) -> None:
    sizes = "hidden_size: 64, " + ", ".join(
        f"{name}: 4" for name in ("num_heads", "retention_heads") if f"{name}:" not in model
    )
    (message,) = errors(write(f"model: {{{sizes}, layer_pattern: [{mixer}], {model}}}"))
    assert f": model.{field}: " in message


@pytest.mark.parametrize(
    "model",
    [
        "layer_pattern: [retnet], num_heads: 7",  # no attention in the pattern
        "layer_pattern: [standard_attn], retention_heads: 7",
        "layer_pattern: [mamba], num_heads: 7, retention_heads: 7",
        "use_moe: false, top_k_experts: 9",
        "num_heads: 64, position_encoding: none",
        "layer_pattern: [retnet], retention_heads: 64, retention_rotary: false",
        "mamba_d_conv: 4, mamba_bidirectional: none",
    ],
)
def test_contradictions_count_only_where_used(write: Write, model: str) -> None:
    rest = ", ".join(f"{name}: 4" for name in ("num_heads", "retention_heads") if f"{name}:" not in model)
    load_config(write(f"model: {{hidden_size: 64, {rest}{', ' if rest else ''}{model}}}"))


def test_all_errors_at_once_sorted_by_line(write: Write) -> None:
    text = "optim: {}\ntraining:\n  batchsize: 2\n  lr_ode: x\nmodel:\n  hidden_size: -1\nmodel_class: m\n"
    got = errors(write(text), "training.epochz=3", "model.num_heads=0")
    assert [line.split(": ")[0] for line in got] == [
        "cfg.yaml:1:1",
        "cfg.yaml:3:3",
        "cfg.yaml:4:3",
        "cfg.yaml:6:3",
        "cfg.yaml:7:1",
        "override 'training.epochz=3'",
        "override 'model.num_heads=0'",
    ]


def test_overrides_use_the_same_validator_and_order(write: Write) -> None:
    path = write("training: {batch_size: 4, lr_ode: bad}\n")
    config = load_config(
        path,
        [
            "training.batch_size=2",
            "training.lr_ode=1e-6",
            "training.betas_ode=[0.8, 0.9]",
            "model.layer_pattern=[mamba, ode]",
            "model_class=mini",
            "training.local_parquet_dir=",
            "training.batch_size=3",
        ],
    )
    assert config.training.batch_size == 3
    assert config.training.optim("ode") == (1e-6, 0.01, (0.8, 0.9), 1e-8)
    assert config.model.mixers[:3] == ("mamba", "ode", "mamba")
    assert config.model_class == "mini"
    assert config.training.local_parquet_dir is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batchsize=2", "training.batchsize: unknown field; did you mean 'batch_size'?"),
        ("training.batch_size=x", "training.batch_size: got 'x' (a text); allowed: an integer >= 1"),
        (
            "training.betas_ode=[0, 2]",
            "training.betas_ode[1]: got 2 (an integer); allowed: a number >= 0 and < 1",
        ),
        ("batch_size=2", "batch_size: unknown top-level key; it belongs under training:"),
        ("training.batch_size", "write section.field=value, such as training.batch_size=2"),
        ("model={}", "write section.field=value, such as training.batch_size=2"),
        ("model.a.b=2", "write section.field=value, such as training.batch_size=2"),
        ("training.cache_dir={", "not valid YAML: while parsing a flow node expected the node content"),
    ],
)
def test_override_errors_are_placed(override: str, message: str) -> None:
    (got,) = errors("mini", override)
    assert got.startswith(f"override {override!r}: {message}")


def test_defaults_when_sections_or_model_class_are_left_out(write: Write) -> None:
    assert load_config(write("training:\n")) == RunConfig()
    assert load_config(write("model: {}")).model_class == "frankenstein"


def test_mini_factorises_and_says_so(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ultra"):
        config = load_config(write("model_class: mini\nmodel: {use_factorized_embedding: false}"))
    assert config.model.use_factorized_embedding
    assert "use_factorized_embedding" in caplog.text


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert errors(str(tmp_path)) == [f"{tmp_path.name}: is a folder, not a YAML file"]
    assert errors("configs/frankenstien.yaml")[0].startswith(
        "frankenstien.yaml: no such file or preset; did you mean the preset 'frankenstein'?; presets: embbert, "
    )
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * (1 << 20) + b"\n")
    assert errors(str(big)) == ["big.yaml: larger than 1 MiB, which no config is"]
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"# \n# \xfc\n")
    assert errors(str(latin)) == ["latin.yaml:2: not UTF-8 text; save the file as UTF-8"]
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfmodel_class: mini\n")
    assert load_config(tmp_path / "bom.yaml").model_class == "mini"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini").mkdir()  # a folder of a preset's name does not hide the preset
    assert load_config("mini").model.hidden_size == 384


def test_to_yaml_round_trips(write: Write, sample: str) -> None:
    for source in ("mini", "frankenstein", write(sample)):
        config = load_config(source, ["training.cache_dir='1e-6'", "training.text_column=ü", "model.norm_eps=1e-12"])
        text = config.to_yaml()
        assert load_config(write(text)) == config
        assert list(yaml.safe_load(text)) == ["model_class", "model", "training"]


def test_configs_are_immutable_and_checked_in_python_too() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        UltraConfig().hidden_size = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="7 heads do not divide"):
        UltraConfig(num_heads=7)
    with pytest.raises(ValidationError, match="layer_pattern"):
        UltraConfig(layer_pattern=("lstm",))
    assert TrainingConfig(max_steps=3).steps == 3
    assert TrainingConfig().steps == 10000
