"""`ultra export --format ternary` and back: the same numbers, 2 bits a weight, a clear message for what is wrong."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import ultra
from ultra.cli import main
from ultra.config import load_config
from ultra.errors import UserError
from ultra.export import save_ternary, save_weights
from ultra.export.ternary import every_tensor, linear_bytes, ternary_layers
from ultra.inference import Pipeline
from ultra.train import checkpoint, train
from ultra_kernels import pack_ternary
from ultra_kernels.nn import PackedMatrices

TEXT = "The function returns a [MASK] of [MASK]."
MODEL = (
    "vocab_size=512 hidden_size=32 num_heads=2 retention_heads=2 ffn_hidden_size=48 num_loops=2 use_bitnet=true "
    "use_moe=true ffn_gated=true moe_balance=both use_hope=true titan_memory=linear titan_persistent_tokens=2 "
    "bitnet_head=true bitnet_scale=median use_factorized_embedding=true factorized_embedding_dim=16 "
    "use_embedding_conv=true norm_type=dynamic_tanh"
)
TRAINING = (
    "max_samples=300 max_length=64 batch_size=4 eval_samples=10 val_interval=2 device=cpu scheduler_total_steps=4 "
    "checkpoint_every_n_steps=2 num_workers=0 use_amp=true amp_dtype=bf16"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BitNet of all six mixers (quickstart's), trained for four steps in bfloat16."""
    folder = tmp_path_factory.mktemp("bitnet")
    overrides = [f"model.{field}" for field in MODEL.split()] + [f"training.{field}" for field in TRAINING.split()]
    cfg = load_config("quickstart", [*overrides, f"training.cache_dir={folder / 'cache'}"])
    assert len(set(cfg.model.mixers)) == 6
    assert train(cfg, run_dir=folder / "run") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def trained(run: Path) -> Pipeline:
    """Its model in float32, with every parameter off its initial value, so that each one matters."""
    pipeline = ultra.load(run)
    pipeline.dtype = None
    torch.manual_seed(0)
    with torch.no_grad():
        for p in pipeline.model.parameters():
            p.add_(0.1 * p.std(correction=0).clamp(min=0.1) * torch.randn_like(p))
    return pipeline


@pytest.fixture(scope="module")
def folder(trained: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    save_ternary(trained, out)
    return out


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def hidden_and_logits(pipeline: Pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 500, (1, 90), generator=torch.Generator().manual_seed(1))
    borders = torch.arange(0, 91, 6, dtype=torch.int32)
    with torch.inference_mode():
        out = pipeline.model(ids, cu_seqlens=borders, max_seqlen=6)
        return out.last_hidden_state, out.logits


# ---- weights as they are


def test_exported_weights_are_the_trained_ones(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "model"
    assert main(["export", str(run), str(out)]) == 0
    assert "MiB on disk" in capsys.readouterr().out
    assert sorted(f.name for f in out.iterdir()) == [
        "config.yaml",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    theirs, ours = ultra.load(run), ultra.load(out)
    assert ours.fill_mask(TEXT) == theirs.fill_mask(TEXT) and ours.evaluate()["eval_loss"] > 0
    first, second = load_file(checkpoint.latest(run) / "model.safetensors"), load_file(out / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert main(["verify", str(out)]) == 0
    cfg = load_config(out / "config.yaml", ["training.max_steps=1", f"training.init_from={out}"])
    assert train(cfg, run_dir=tmp_path / "next") == 0
    with pytest.raises(UserError, match="init_from"):
        train(cfg, run_dir=tmp_path / "resumed", resume=str(out))
    with pytest.raises(UserError, match="new or empty"):
        save_weights(theirs, out)
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(UserError, match="checksum"):
        ultra.load(out)


@pytest.mark.parametrize("hardware", [True, False])
def test_a_run_in_bfloat16_is_used_in_what_the_processor_has(run: Path, monkeypatch, hardware: bool) -> None:
    monkeypatch.setattr("ultra.inference.cpu_has_bf16", lambda: hardware)
    assert ultra.load(run).dtype == (torch.bfloat16 if hardware else None)


def test_ternary_weights_are_not_exported_as_they_are(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ternary; export the run"):
        save_weights(ultra.load(folder), tmp_path / "model")


# ---- the same model


def test_the_exported_model_gives_the_trained_ones_numbers(trained: Pipeline, folder: Path) -> None:
    packed = ultra.load_ternary(folder, device="cpu")
    assert packed.dtype is None, "float32, although training.use_amp is on"
    # Products in another order differ by 1e-6. Where that carries a value over a tie of the 8-bit grid, its sequence is
    # off by steps of 1/127, and where those carry a token to another expert by more; most sequences are nowhere close.
    pairs = list(zip(hidden_and_logits(packed), hidden_and_logits(trained), strict=True))
    apart = torch.stack(
        [((ours - theirs).abs() / theirs.abs().max()).flatten(0, -2).amax(-1) for ours, theirs in pairs]
    )
    exact = apart.amax(0) < 1e-5
    assert exact.float().mean() > 0.5 and apart.max() < 0.25
    best, wanted = (logits.flatten(0, -2).argmax(-1) for logits in pairs[1])
    assert torch.equal(best[exact], wanted[exact])
    for ours, theirs in zip(packed.fill_mask(TEXT), trained.fill_mask(TEXT), strict=True):
        assert ours[0][0] == theirs[0][0]
        assert ours[0][1] == pytest.approx(theirs[0][1], rel=0.02)
    np.testing.assert_allclose(packed.embed(["one", "two words"]), trained.embed(["one", "two words"]), atol=0.02)
    assert packed.evaluate()["eval_loss"] == pytest.approx(trained.evaluate()["eval_loss"], rel=1e-3)


def test_every_bitnet_matrix_is_packed_and_nothing_else(trained: Pipeline, folder: Path) -> None:
    packed = ultra.load_ternary(folder)
    layers, model = ternary_layers(trained.model), trained.cfg.model
    experts = [name for name in layers if name.endswith(".ffn")]
    assert len(experts) == 6 and "head.dense" in layers
    matrices, stored, float_bytes = linear_bytes(packed.model)
    assert matrices == len(layers) - 6 + 6 * 2 * model.num_experts
    weights = [
        p for layer in layers.values() for name, p in layer.named_parameters() if name in ("weight", "w_in", "w_out")
    ]
    assert float_bytes == 4 * sum(p.numel() for p in weights)
    assert stored <= float_bytes / 6
    held, given = load_file(folder / "model.safetensors"), dict(trained.model.named_parameters())
    others = given.keys() - {f"{name}.{leaf}" for name in layers for leaf in ("weight", "w_in", "w_out")}
    assert all(torch.equal(held[name], given[name]) for name in others)
    assert {t.dtype for name, t in held.items() if name.endswith("codes")} == {torch.uint8}
    assert {t.dtype for name, t in held.items() if not name.endswith("codes")} == {torch.float32}
    assert not any(p.requires_grad for p in packed.model.parameters())


def test_exporting_leaves_the_pipeline_alone(trained: Pipeline, tmp_path: Path) -> None:
    before = {name: t.clone() for name, t in trained.model.state_dict().items()}
    shown = save_ternary(trained, tmp_path / "deep" / "out")
    assert all(torch.equal(t, before[name]) for name, t in trained.model.state_dict().items())
    assert shown.disk_bytes == sum(f.stat().st_size for f in shown.folder.iterdir())


class Allocated(TorchDispatchMode):
    """The shapes of all float tensors on the CPU that operations give back."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "cpu" and out.is_floating_point():
            self.shapes.add(out.shape)
        return out


def test_the_float_weights_are_never_in_memory(trained: Pipeline, folder: Path, run: Path) -> None:
    weights = {p.shape for layer in ternary_layers(trained.model).values() for p in layer.parameters()}
    weights -= {t.shape for t in load_file(folder / "model.safetensors").values()}  # a float matrix has the same shape
    assert len(weights) >= 5
    with Allocated() as seen:
        before = torch.get_rng_state()
        ultra.load_ternary(folder, device="cpu")
        assert torch.equal(torch.get_rng_state(), before)
    assert len(seen.shapes) > 5 and not seen.shapes & weights
    with Allocated() as seen:
        ultra.load(run)
    assert weights <= seen.shapes  # that it would have been noticed


def test_a_new_layout_of_the_codes_needs_a_new_version() -> None:
    codes = (torch.arange(40 * 50) * 7 % 11 % 3 - 1).to(torch.int8).view(40, 50)
    stored = pack_ternary(codes, torch.ones(())).codes
    digest = hashlib.sha256(stored.numpy().tobytes()).hexdigest()
    assert (checkpoint.TERNARY, digest[:16]) == ("ternary-2", "68aeb5fb6d557c1a"), (
        "files in the old layout read as other weights"
    )


def test_a_folder_of_the_first_format_reads_the_same(trained: Pipeline, folder: Path, tmp_path: Path) -> None:
    """It had the tensors of each expert apart."""
    held = load_file(folder / "model.safetensors")
    for key in [key for key in held if re.search(r"\.w_(in|out)\.", key)]:
        start, _, leaf = key.rpartition(".")
        held |= {f"{start}.{e}.{leaf}": part.clone() for e, part in enumerate(held.pop(key))}
    texts = {name: (folder / name).read_text() for name in ("config.yaml", "tokenizer.json")}
    checkpoint.write(tmp_path / "old", {"model.safetensors": held}, texts, "ternary-1")
    assert any(key.endswith(".w_in.3.codes") for key in held)
    old, new = (every_tensor(ultra.load_ternary(path).model) for path in (tmp_path / "old", folder))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in new)


# ---- commands


def test_the_commands_take_an_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()  # empty is as good as new
    assert main(["export", str(run), "--which", "best", "--format", "ternary", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"{out}: 0." in shown and "MiB on disk" in shown
    matrices, stored, float_bytes = linear_bytes(ultra.load(out).model)
    assert f"{matrices} ternary matrices: {stored:,} bytes, {float_bytes:,} in float32 (1/15." in shown
    assert sorted(p.name for p in out.iterdir()) == [
        "config.yaml",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    for command in (["fill-mask", str(out), TEXT], ["embed", str(out), "text"], ["eval", str(out), "--samples", "2"]):
        assert main(command) == 0
        assert capsys.readouterr().out
    assert main(["verify", str(out)]) == 0
    assert capsys.readouterr().out.endswith("whole\n")


def test_what_cannot_be_exported(run: Path, tiny_run: Path, folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    new = tmp_path / "new"
    cases = [
        (tiny_run, new, "trained without BitNet; train it with model.use_bitnet=true"),
        (folder, new, "is exported already"),
        (tmp_path / "nowhere", new, "no such folder"),
        (run, tmp_path / "full", "already there; name a folder that is new or empty"),
        (run, tmp_path / "file", "already there"),
        (run, tmp_path / "file" / "below", "cannot be written"),
    ]
    for source, out, message in cases:
        assert main(["export", str(source), "--format", "ternary", str(out)]) == 2
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
    assert main(["export", str(run), "--format", "gguf", str(new)]) == 2
    assert "--format" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt("stop")])
def test_an_export_cut_short_leaves_nothing(error, trained: Pipeline, tmp_path: Path, monkeypatch) -> None:
    def full(path: Path) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "_sync", full)  # all files are written by then
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt, match=str(error)):
        save_ternary(trained, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- folders that are not what they should be


def change(file: Path, key: str, value: object) -> None:
    content = json.loads(file.read_text())
    content[key] = value
    file.write_text(json.dumps(content, indent=1))


BAD = {
    **{
        f"{name} damaged": "does not match its checksum"
        for name in ("model.safetensors", "config.yaml", "tokenizer.json")
    },
    **{f"{name} gone": name for name in ("model.safetensors", "config.yaml", "tokenizer.json", "manifest.json")},
    "cut": "bytes, not",
    "manifest.json damaged": "manifest",
    "newer": "its format is ternary-3, this version reads 2 and ternary-1 and ternary-2",
    "not listed": "its manifest lacks tokenizer.json",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_folder_is_refused_in_words(kind: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, _, what = kind.rpartition(" ")
    manifest = copied / "manifest.json"
    if what == "damaged":
        content = bytearray((copied / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copied / name).write_bytes(content)
    elif what == "gone":
        (copied / name).unlink()
    elif what == "cut":
        weights = copied / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-9])
    elif what == "newer":
        change(manifest, "format", "ternary-3")
    else:
        files = json.loads(manifest.read_text())["files"]
        del files["tokenizer.json"]
        change(manifest, "files", files)
    for command in (["fill-mask", str(copied), TEXT], ["embed", str(copied), "text"], ["eval", str(copied)]):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert err.startswith(str(copied)) and BAD[kind] in err and "Traceback" not in err


def test_load_ternary_takes_exports_alone(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ultra export .* --format ternary OUT"):
        ultra.load_ternary(run)
    with pytest.raises(UserError, match="no such folder"):
        ultra.load_ternary(tmp_path / "nowhere")


def test_an_export_is_not_trained(run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(run / "config.yaml")
    for words in ([f"training.init_from={folder}"], ["--resume", str(folder)]):
        assert main(["train", config, "--run-dir", str(tmp_path / "again"), *words]) == 2
        assert "exported with ternary weights, which cannot be trained" in capsys.readouterr().err


def test_packed_layers_are_what_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, used = ultra.load(folder), set()
    packed = {name: m for name, m in pipeline.model.named_modules() if isinstance(m, PackedMatrices)}
    for kind in {type(m) for m in packed.values()}:
        real = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, *a, real=real: used.add(id(self)) or real(self, *a))
    pipeline.fill_mask(TEXT)
    assert len(packed) > 6 and used == {id(m) for m in packed.values()}
