"""Steps that must not move anything, and what the run does about them, with faults put into the model itself."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ultra.cli import main
from ultra.train import checkpoint, trainer
from ultra_kernels import _dispatch

from .conftest import assert_same_run, interrupt_at, rows

MAGIC = 1  # an id that no sample has otherwise
SPIKE = 1e6
GALORE = {"use_galore": True, "galore_rank": 4, "galore_update_interval": 3}


@pytest.fixture
def faulty(tiny, monkeypatch):
    """faulty(kind, data_steps): those training batches are bad whenever and wherever the model sees them.

    kind: `loss` is NaN, `gradient`: Inf in that of one bias alone, `spike`: finite, SPIKE times as large.
    fast_only: not on the reference ops. eval_only: the held-out batches instead.
    """

    def install(kind: str, data_steps=(), *, fast_only: bool = False, eval_only: bool = False) -> None:
        class Model(tiny.Model):
            def __init__(self, dropout: float) -> None:
                super().__init__(dropout)
                self.hit = False
                for name, param in self.named_parameters():
                    param.register_hook(lambda grad, name=name: grad * self.factor(name))

            def factor(self, name: str) -> float:
                if not self.hit or kind == "loss":
                    return 1.0
                return SPIKE if kind == "spike" else math.inf if name == "right.bias" else 1.0

            def forward(self, input_ids, *args, **kwargs):
                magic = bool((input_ids == MAGIC).any())
                self.hit = magic and not (fast_only and "reference" in _dispatch._forced)
                out = super().forward(torch.where(input_ids == MAGIC, 5, input_ids), *args, **kwargs)
                if self.hit and kind == "loss":
                    out.loss_sum, out.logits = out.loss_sum * math.nan, out.logits * math.nan
                return out

        original = tiny.Data.batch

        def batch(self, first, size, split=0):
            made = original(self, first, size, split)
            step = first // (self.training.batch_size * self.training.gradient_accumulation_steps)
            if (split == 1) if eval_only else (split == 0 and step in data_steps):
                made.input_ids[0, 0] = MAGIC
            return made

        monkeypatch.setattr(tiny.Data, "batch", batch)
        monkeypatch.setattr(trainer, "build_model", lambda cfg: Model(cfg.model.dropout))

    return install


def skipped(run: Path) -> list[int]:
    return [row["step"] for row in rows(run) if row.get("skipped")]


@pytest.mark.parametrize("kind", ["loss", "gradient", "spike"])
@pytest.mark.parametrize("bad", [0, 3, 5])  # the first step of all; on a refresh of GaLore's subspace; neither
def test_a_bad_step_changes_no_bit(tiny, faulty, tmp_path: Path, monkeypatch, kind: str, bad: int) -> None:
    if kind == "spike" and bad == 0:
        pytest.skip("a first norm has no median to exceed")
    faulty(kind, {bad})
    snapshots: list[dict[str, torch.Tensor]] = []
    original = trainer.Trainer.note

    def note(self, *args):
        state = {**self.model.state_dict(), **self.optimizer.state_tensors(), "gate": self.gate.norms.nan_to_num(-1)}
        snapshots.append({name: value.clone() for name, value in state.items()})
        return original(self, *args)

    monkeypatch.setattr(trainer.Trainer, "note", note)
    assert tiny.run(tmp_path, **GALORE) == 0
    assert skipped(tmp_path) == [bad + 1]
    if bad == 0:  # plain AdamW makes its empty state, GaLore not even that
        fresh = {name: value for name, value in snapshots[0].items() if "." in name and ".exp" in name}
        assert not any(value.any() for value in fresh.values())
        assert not [name for name in snapshots[0] if name.endswith("projection")]
        assert all(value == 0 for name, value in snapshots[0].items() if name.endswith(".step"))
        return
    before, after, later = snapshots[bad - 1 : bad + 2]
    # "calls" is no state of the update: it says when the next subspace is due.
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert [name for name in moved if not name.endswith(".calls")] == []
    assert any(not torch.equal(after[name], later[name]) for name in after)
    if bad == 3:  # a refresh that falls on a bad step comes with the next one
        name = "left.weight.projection"
        assert not torch.equal(after[name], later[name])


@pytest.mark.parametrize(
    ("kind", "found"),
    [("loss", "gradient of embedding.weight"), ("gradient", "gradient of right.bias"), ("spike", "gradient norm ")],
)
@pytest.mark.parametrize("fast_only", [False, True])
def test_the_rerun_tells_data_from_kernels(
    tiny, faulty, tmp_path: Path, caplog, kind: str, found: str, fast_only: bool
) -> None:
    faulty(kind, {5, 8}, fast_only=fast_only)
    with caplog.at_level(logging.WARNING):
        assert tiny.run(tmp_path) == 0
    assert found in caplog.text
    state = checkpoint.read_state(checkpoint.latest(tmp_path))
    assert state["reference_ops"] == fast_only
    if fast_only:
        assert "a kernel or the mixed precision is at fault" in caplog.text
        assert skipped(tmp_path) == [6]  # the second one runs on the reference ops
    else:
        assert "data or weights are at fault" in caplog.text
        assert skipped(tmp_path) == [6, 9]
        assert state["skipped"] == 2
        assert "skipped step 6 (bad window 1 in a row)" in caplog.text and "samples 40-47" in caplog.text
        if kind != "spike":
            assert "document 0 of the micro-batch that begins at sample 40" in caplog.text  # 5 steps of 2 x 4


def test_what_does_not_happen_again_blames_no_kernel(tiny, tmp_path: Path, monkeypatch, caplog) -> None:
    original = trainer.Trainer.backward

    def backward(self, micro_batches):
        out = original(self, micro_batches)
        if self.state.data_step == 5:
            self.model.left.weight.grad.fill_(math.nan)
        return out

    monkeypatch.setattr(trainer.Trainer, "backward", backward)
    with caplog.at_level(logging.WARNING):
        assert tiny.run(tmp_path) == 0
    assert "made again with the present weights it is a good step" in caplog.text
    assert skipped(tmp_path) == [6]
    assert not checkpoint.read_state(checkpoint.latest(tmp_path))["reference_ops"]


def test_no_retries_stops_at_the_first_bad_window_with_a_dump(tiny, faulty, tmp_path: Path, caplog) -> None:
    faulty("loss", {5})
    assert tiny.run(tmp_path / "one", max_nan_retries=1) == 0  # goes back and passes over it
    assert "went back from step 6 to 4" in caplog.text
    assert tiny.run(tmp_path / "none", max_nan_retries=0) == 1
    assert "stopped at step 6 after 1 bad window(s) in a row: max_nan_retries is 0" in caplog.text
    assert [path.name for path in (tmp_path / "none").glob("dump-*")] == ["dump-step-00000006"]
    assert checkpoint.latest(tmp_path / "none").name == "step-00000004"


def test_not_finite_in_evaluation_alone_is_said_and_never_best(tiny, faulty, tmp_path: Path, caplog) -> None:
    faulty("loss", eval_only=True)
    assert tiny.run(tmp_path) == 0
    assert "held-out loss at step 4 is not finite" in caplog.text
    evaluations = [row for row in rows(tmp_path) if "eval_loss" in row]
    assert [row["eval_loss"] for row in evaluations] == [None] * 4
    assert skipped(tmp_path) == []
    assert checkpoint.read_state(checkpoint.latest(tmp_path))["best"] == []


# Going back, and what comes in between

GOES_BACK = {"max_nan_retries": 2, "scheduler_type": "constant"}  # windows of 2 steps; from step 8 back to step 4


@pytest.mark.parametrize("killed_at", [7, 9, 10, 12])  # data steps: before going back, and after
def test_a_kill_around_going_back_leaves_the_same_run(
    tiny, faulty, tmp_path: Path, monkeypatch, killed_at: int
) -> None:
    class Killed(BaseException):
        pass

    faulty("gradient", {5, 6, 7})
    assert tiny.run(tmp_path / "whole", **GOES_BACK) == 0
    state = checkpoint.read_state(checkpoint.latest(tmp_path / "whole"))
    assert (state["lr_scale"], state["rolled_back_to"], state["data_step"]) == (0.5, 4, 16)
    original = trainer.Trainer.backward

    def backward(self, micro_batches):
        if self.state.data_step == killed_at:
            raise Killed
        return original(self, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "backward", backward)
        with pytest.raises(Killed):
            tiny.run(tmp_path / "parts", **GOES_BACK)
    assert tiny.run(tmp_path / "parts", **GOES_BACK) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("at", [2, 3])
def test_a_signal_inside_a_bad_window_leaves_the_same_run(tiny, faulty, tmp_path: Path, monkeypatch, at: int) -> None:
    settings = {"nan_check_interval": 4, "checkpoint_every_n_steps": 4, "max_nan_retries": 2}
    faulty("loss", {1, 4})  # steps 2 and 5: two bad windows in a row, and no good checkpoint before: back to the start
    assert tiny.run(tmp_path / "whole", **settings) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, at)
        assert tiny.run(tmp_path / "parts", **settings) == 75
    assert checkpoint.read_state(checkpoint.latest(tmp_path / "parts"))["pending"] == [[2, 1]]
    assert tiny.run(tmp_path / "parts", **settings) == 0
    assert checkpoint.read_state(checkpoint.latest(tmp_path / "parts"))["lr_scale"] == 0.5
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_last_good_checkpoint_outlives_a_signal_in_a_bad_phase(tiny, faulty, tmp_path: Path, monkeypatch) -> None:
    settings = {"max_nan_retries": 2, "max_rolling_checkpoints": 1, "num_best_checkpoints": 0}
    faulty("loss", {5, 7})
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        assert tiny.run(tmp_path, **settings) == 75
    assert checkpoint.steps(tmp_path) == [4, 7]
    assert tiny.run(tmp_path, **settings) == 0
    assert checkpoint.read_state(checkpoint.latest(tmp_path))["rolled_back_to"] == 4


def test_a_checkpoint_of_weights_that_are_not_finite_is_not_gone_back_to(tiny, faulty, tmp_path: Path, caplog) -> None:
    faulty("loss", {9})
    assert tiny.run(tmp_path, max_steps=8) == 0
    path = checkpoint.folder(tmp_path, 8)
    state, optimizer = checkpoint.read_state(path), load_file(path / "optimizer.safetensors")
    weights = load_file(path / "model.safetensors")
    weights["router.weight"][0, 0] = math.inf
    texts = {name: (path / f"{name}").read_text() for name in ("config.yaml", "tokenizer.json")}
    checkpoint.save(
        tmp_path, 8, model=weights, optimizer=optimizer, state=state,
        config=texts["config.yaml"], tokenizer=texts["tokenizer.json"],
    )  # fmt: skip
    assert tiny.run(tmp_path, max_nan_retries=1) == 0
    assert "went back from step 10 to 4" in caplog.text


def test_rates_are_halved_again_the_second_time(tiny, faulty, tmp_path: Path) -> None:
    faulty("spike", {5, 11})  # back to 4 at 0.5, then a good checkpoint 8, then back to 8 at 0.25
    assert tiny.run(tmp_path, max_nan_retries=1, scheduler_type="constant", scheduler_total_steps=16) == 0
    assert [row["lr"] for row in rows(tmp_path) if "lr" in row] == [1e-2] * 4 + [5e-3] * 4 + [2.5e-3] * 8


# Exit codes


def test_exit_codes_of_the_command(tiny, faulty, tmp_path: Path, monkeypatch, capsys) -> None:
    fields = tiny.config().model_dump(mode="json")["training"]
    words = [
        f"training.{name}={fields[name]}" for name in ("batch_size", "scheduler_total_steps", "nan_check_interval")
    ]
    command = ["train", "mini", *words, "training.device=cpu", "training.max_nan_retries=0", "--run-dir"]
    assert main([*command, str(tmp_path / "done")]) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert main([*command, str(tmp_path / "stopped")]) == 75
    assert main([*command, str(tmp_path / "stopped")]) == 0
    assert main([*command, str(tmp_path / "x"), "training.device=tpu"]) == 2
    assert main([*command, str(tmp_path / "done"), "--resume", "never"]) == 2
    faulty("loss", {2})
    assert main([*command, str(tmp_path / "diverged")]) == 1
    assert "Traceback" not in capsys.readouterr().err
