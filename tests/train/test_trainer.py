from __future__ import annotations

import csv
import dataclasses
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ultra.config.model import UltraConfig
from ultra.config.training import GROUPS
from ultra.errors import UserError
from ultra.train import checkpoint, trainer
from ultra.train.evaluation import evaluate
from ultra.train.metrics import COLUMNS, moe_columns, read_rows
from ultra.train.resume import FREE_ON_RESUME
from ultra.train.signals import StopFlag

from .conftest import assert_same_run, rows

CPU = torch.device("cpu")


def make_trainer(tiny, run_dir: Path, model=None, **training) -> trainer.Trainer:
    cfg = tiny.config(**training)
    torch.manual_seed(0)
    return trainer.Trainer(cfg, run_dir, model or tiny.Model(dropout=0.0), tiny.Data(cfg), CPU, StopFlag())


# The gradient


def test_accumulation_is_weighted_by_tokens(tiny, tmp_path: Path) -> None:
    grads = {}
    for size, accum in ((8, 1), (2, 4), (1, 8)):
        t = make_trainer(tiny, tmp_path, batch_size=size, gradient_accumulation_steps=accum)
        micro_batches = next(t.data.train_batches(0))
        assert accum == 1 or len({b.num_labelled for b in micro_batches}) > 1  # else any weighting would do
        loss, _, loads = t.backward(micro_batches)
        grads[size] = (loss, loads, t.model.left.weight.grad, t.model.embedding.weight.grad)
    for size in (2, 1):
        for got, want in zip(grads[size], grads[8], strict=True):
            # Sums of about 200 float32 terms in another order.
            torch.testing.assert_close(got, want, rtol=1e-5, atol=200 * 1.2e-7 * float(want.abs().max()))


def test_dropout_depends_on_the_counters_alone(tiny, tmp_path: Path) -> None:
    def gradient(step: int, noise: int, rank: int = 0) -> torch.Tensor:
        t = make_trainer(tiny, tmp_path, tiny.Model(dropout=0.5))
        t.model.load_state_dict(weights)
        t.state.data_step, t.processes.rank = step, rank
        batches = next(t.data.train_batches(0))
        torch.manual_seed(noise)
        t.backward(batches)
        return t.model.left.weight.grad

    weights = tiny.Model().state_dict()
    assert torch.equal(gradient(3, 1), gradient(3, 2))
    assert not torch.equal(gradient(3, 1), gradient(4, 1))
    assert not torch.equal(gradient(3, 1), gradient(3, 1, rank=1))
    assert len({trainer.counter_seed(0, 3, micro, 0) for micro in range(4)}) == 4


def test_a_run_learns_and_says_so(tiny, tmp_path: Path) -> None:
    assert tiny.run(tmp_path, scheduler_total_steps=150, val_interval=75, checkpoint_every_n_steps=1000) == 0
    found = rows(tmp_path)
    evals = [row for row in found if "eval_loss" in row]
    assert [row["step"] for row in evals] == [0, 75, 150]
    # 27 equally frequent symbols: ln 27 = 3.3; the neighbours tell the masked one.
    assert evals[0]["eval_loss"] > 3.0
    assert evals[-1]["eval_loss"] < 1.0
    assert evals[-1]["eval_accuracy"] > 0.7
    assert evals[-1]["eval_mask_loss"] > evals[-1]["eval_loss"]  # the shown ones are easier


# Metrics


def test_metrics_have_the_documented_keys(tiny, tmp_path: Path) -> None:
    tiny.run(tmp_path, scheduler_total_steps=6)
    found = list(read_rows(tmp_path / "metrics.jsonl"))
    train = [row for row in found if "loss" in row]
    assert [row["step"] for row in train] == list(range(1, 7))
    for row in train:
        assert {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "data_wait_ms"} <= row.keys()
        assert row["tokens_per_s"] > 0
    assert [row["tokens"] for row in train] == [192 * step for step in range(1, 7)]
    for row in found:
        if "eval_loss" in row:
            assert {"step", "eval_loss", "eval_mask_loss", "eval_accuracy"} <= row.keys()
    assert [row["step"] for row in found if "eval_loss" in row] == [0, 4, 6]
    with (tmp_path / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == COLUMNS
    assert [float(r["loss"]) for r in table if r["loss"]] == [row["loss"] for row in train]
    assert (tmp_path / "config.yaml").is_file()
    assert "parameter groups" in (tmp_path / "train.log").read_text()


def test_lr_column_is_the_schedule(tiny, tmp_path: Path) -> None:
    tiny.run(
        tmp_path,
        scheduler_type="linear_warmup_then_constant",
        scheduler_total_steps=6,
        scheduler_warmup_ratio=0.5,
    )
    assert [row["lr"] for row in rows(tmp_path) if "lr" in row] == pytest.approx([1e-2 / 3, 2e-2 / 3] + [1e-2] * 4)


def test_gradient_statistics_come_when_they_are_due(tiny, tmp_path: Path) -> None:
    tiny.run(tmp_path / "on", scheduler_total_steps=6)
    with_stats = [row for row in rows(tmp_path / "on") if "grad_norm_other" in row]
    assert [row["step"] for row in with_stats] == [3, 6]
    for row in with_stats:
        parts = [row[f"grad_norm_{g}"] for g in GROUPS if f"grad_norm_{g}" in row]
        assert len(parts) == 4
        assert math.hypot(*parts) == pytest.approx(row["grad_norm"], rel=1e-5)
        assert len(row["moe_load"]) == 1 and sum(row["moe_load"][0]) == pytest.approx(1)
        assert 0 <= row["moe_entropy"] <= 1
        assert row["moe_dead_experts"] in (0, 1)
    tiny.run(tmp_path / "off", scheduler_total_steps=6, log_gradient_stats=False)
    assert not [row for row in rows(tmp_path / "off") if "grad_norm_other" in row]


def test_max_steps_ends_the_run_and_leaves_the_schedule(tiny, tmp_path: Path) -> None:
    assert tiny.run(tmp_path, max_steps=5) == 0
    found = [row for row in rows(tmp_path) if "lr" in row]
    assert found[-1]["step"] == 5
    assert found[-1]["lr_factor"] > 0.5  # of 12 steps, not of 5
    assert checkpoint.latest(tmp_path).name == "step-00000005"


# Evaluation


def test_evaluation_equals_its_definition(tiny) -> None:
    torch.manual_seed(0)
    model, data = tiny.Model(dropout=0.5), tiny.Data(tiny.config(eval_samples=8))
    model.train()
    row = evaluate(model, data.eval_batches(), mask_id=data.mask_id, device=CPU)
    assert model.training
    model.eval()
    losses, hits, hidden = [], [], []
    for batch in data.eval_batches():
        out = model(batch.input_ids, labels=batch.labels)
        target = batch.labels[batch.labels != -100]
        losses += (-out.logits.log_softmax(-1)[torch.arange(len(target)), target]).tolist()
        hits += (out.logits.argmax(-1) == target).tolist()
        hidden += (batch.input_ids[batch.labels != -100] == data.mask_id).tolist()
    masked = [loss for loss, is_mask in zip(losses, hidden, strict=True) if is_mask]
    assert 0 < len(masked) < len(losses)
    assert row["eval_tokens"] == len(losses)
    assert row["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert row["eval_mask_loss"] == pytest.approx(sum(masked) / len(masked), rel=1e-5)
    assert row["eval_accuracy"] == sum(hits) / len(hits)


def test_evaluation_stops_when_asked_and_refuses_an_empty_set(tiny) -> None:
    model, data = tiny.Model(), tiny.Data(tiny.config())
    assert evaluate(model, data.eval_batches(), mask_id=4, device=CPU, should_stop=lambda: True) is None
    with pytest.raises(UserError, match="val_fraction"):
        evaluate(model, [], mask_id=4, device=CPU)


# Resume


@pytest.mark.parametrize("at", [1, 4, 5, 6, 11])
def test_resume_is_bit_equal(tiny, tmp_path: Path, at: int) -> None:
    assert tiny.run(tmp_path / "whole") == 0
    tiny.interrupt_at(at)
    assert tiny.run(tmp_path / "parts") == 75
    assert checkpoint.latest(tmp_path / "parts").name == f"step-{at:08d}"
    torch.manual_seed(12345)  # the global generator is in another state
    assert tiny.run(tmp_path / "parts") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resume_three_times_with_galore_refresh_due(tiny, tmp_path: Path) -> None:
    settings = {"use_galore": True, "galore_rank": 4, "galore_update_interval": 3}
    assert tiny.run(tmp_path / "whole", **settings) == 0
    for at in (3, 6, 9):
        tiny.interrupt_at(at)
        assert tiny.run(tmp_path / "parts", **settings) == 75
    assert tiny.run(tmp_path / "parts", **settings) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resume_after_a_kill_drops_the_rows_since_the_checkpoint(tiny, tmp_path: Path, monkeypatch) -> None:
    class Killed(BaseException):
        pass

    original = trainer.Trainer.backward

    def backward(self, micro_batches):
        if self.state.step == 6:
            raise Killed
        return original(self, micro_batches)

    assert tiny.run(tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "backward", backward)
        with pytest.raises(Killed):
            tiny.run(tmp_path / "parts")
    assert rows(tmp_path / "parts")[-1]["step"] == 6
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert checkpoint.latest(tmp_path / "parts").name == "step-00000004"
    assert tiny.run(tmp_path / "parts") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_goes_on_with_more_steps(tiny, tmp_path: Path) -> None:
    assert tiny.run(tmp_path, max_steps=4) == 0
    before = (tmp_path / "metrics.jsonl").read_text()
    assert tiny.run(tmp_path, max_steps=4) == 0
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert tiny.run(tmp_path, max_steps=8) == 0
    assert tiny.run(tmp_path / "whole", max_steps=8) == 0
    assert rows(tmp_path) == rows(tmp_path / "whole")


def test_resume_of_an_older_checkpoint_sets_the_later_ones_aside(tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert tiny.run(run) == 0
    finished = rows(run)
    assert tiny.run(run, resume=str(run / "checkpoints" / "step-00000004"), max_steps=5) == 0
    assert checkpoint.latest(run).name == "step-00000005"
    assert rows(run)[-1]["step"] == 5
    assert tiny.run(run) == 0
    assert [row for row in rows(run) if "loss" in row] == [row for row in finished if "loss" in row]


def test_resume_choices(tiny, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    with pytest.raises(UserError, match="absent"):
        tiny.run(run, resume=str(tmp_path / "absent"))
    tiny.run(run, max_steps=4)
    with pytest.raises(UserError, match="already holds checkpoints"):
        tiny.run(run, resume="never")
    assert tiny.run(other, resume=str(run), max_steps=5) == 0  # a branch in a folder of its own
    assert checkpoint.steps(run) == [4]
    with pytest.raises(UserError, match="already holds another run"):
        tiny.run(other, resume=str(run))
    for path in (run / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        tiny.run(run)


def test_resume_refuses_another_network_with_a_diff(tiny, tmp_path: Path, caplog) -> None:
    tiny.run(tmp_path, max_steps=4)
    cfg = tiny.config(max_steps=8, lr_other=0.5)
    changed = cfg.model_copy(update={"model": UltraConfig(hidden_size=384, num_layers=6)})
    with pytest.raises(UserError) as error:
        trainer.train(changed, run_dir=tmp_path)
    assert "model.hidden_size: 768 in the checkpoint, now 384" in str(error.value)
    assert "model.num_layers: 12 in the checkpoint, now 6" in str(error.value)
    dropout = cfg.model_copy(update={"model": UltraConfig(dropout=0.3)})
    with caplog.at_level(logging.WARNING):
        assert trainer.train(dropout, run_dir=tmp_path) == 0
    assert "model.dropout: 0.1 in the checkpoint, now 0.3" in caplog.text
    assert "training.lr_other: 0.01 in the checkpoint, now 0.5" in caplog.text


def test_a_damaged_line_of_metrics_does_not_stop_a_run(tiny, tmp_path: Path, caplog) -> None:
    tiny.run(tmp_path, max_steps=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('garbage\n{"loss": 1}\n[]\n')
    assert tiny.run(tmp_path, max_steps=3) == 0
    assert caplog.text.count("is no row of metrics and left out") >= 3
    assert [row["step"] for row in rows(tmp_path) if "lr" in row] == [1, 2, 3]


def test_a_finished_run_says_so_and_keeps_its_config(tiny, tmp_path: Path, caplog) -> None:
    tiny.run(tmp_path, max_steps=3)
    before = (tmp_path / "config.yaml").read_text()
    with caplog.at_level(logging.INFO):
        assert tiny.run(tmp_path, max_steps=3, lr_other=0.5) == 0
    assert "nothing left to train: the run is at step 3 of 3" in caplog.text
    assert (tmp_path / "config.yaml").read_text() == before
    assert tiny.run(tmp_path, max_steps=4, lr_other=0.5) == 0
    assert "lr_other: 0.5" in (tmp_path / "config.yaml").read_text()


def test_a_config_that_is_not_of_a_run_is_not_replaced(tiny, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {}  # written by hand\n")
    with pytest.raises(UserError, match=r"config\.yaml there is not of a run"):
        tiny.run(tmp_path, max_steps=1)
    assert "by hand" in (tmp_path / "config.yaml").read_text() and not (tmp_path / "train.log").exists()


def test_others_may_read_the_weights(tiny, tmp_path: Path) -> None:
    tiny.run(tmp_path, max_steps=1)
    modes = {path.name: path.stat().st_mode for path in checkpoint.latest(tmp_path).iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_loads_of_one_expert_are_balanced() -> None:
    columns = moe_columns([[50], [50]])
    assert columns["moe_entropy"] == 1.0 and columns["moe_dead_experts"] == 0
    columns = moe_columns([[8, 0, 0, 0], [2, 2, 2, 2]])
    assert columns["moe_entropy"] == pytest.approx(0.5) and columns["moe_layer_entropy"] == pytest.approx([0.0, 1.0])
    assert columns["moe_dead_experts"] == 3 and columns["moe_layer_dead_experts"] == [3, 0]


def test_fields_free_on_resume_exist() -> None:
    assert set(UltraConfig.model_fields) >= FREE_ON_RESUME


def test_two_processes_cannot_share_a_run_folder(tiny, tmp_path: Path) -> None:
    tiny.run(tmp_path, max_steps=1)
    with trainer.FileLock(tmp_path / ".lock"), pytest.raises(UserError, match="another process"):
        tiny.run(tmp_path)


def test_several_processes_that_do_not_find_each_other(tiny, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        tiny.run(tmp_path)


def test_resuming_with_another_batch_size_sees_no_sample_twice(tiny, tmp_path: Path, capsys) -> None:
    tiny.run(tmp_path, max_steps=3)  # 3 steps of 4 × 2 samples
    t = make_trainer(tiny, tmp_path, batch_size=5, gradient_accumulation_steps=2)
    t.restore(checkpoint.latest(tmp_path))
    assert t.state.step == 3 and t.state.data_step == 3  # sample 30: 24 are seen, and a step begins at 20 and 30
    t = make_trainer(tiny, tmp_path, batch_size=2, gradient_accumulation_steps=1)
    t.restore(checkpoint.latest(tmp_path))
    assert t.state.data_step == 12 and t.samples_of(12) == "24-25"


# Checkpoints of a run


def test_pruning_keeps_the_recent_and_the_best(tiny, tmp_path: Path, monkeypatch) -> None:
    losses = iter([9.0, 3.0, 1.0, 2.0, 5.0, 6.0, 7.0])

    def fake(*args, **kwargs):
        return {"eval_loss": next(losses), "eval_mask_loss": 0.0, "eval_accuracy": 0.0}

    monkeypatch.setattr(trainer, "evaluate", fake)
    settings = {"val_interval": 2, "checkpoint_every_n_steps": 2, "num_best_checkpoints": 2}
    tiny.run(tmp_path, max_rolling_checkpoints=2, **settings)
    # evaluations: 0: 9, 2: 3, 4: 1, 6: 2, 8: 5, 10: 6, 12: 7
    assert checkpoint.steps(tmp_path) == [4, 6, 10, 12]
    assert checkpoint.read_state(checkpoint.latest(tmp_path))["best"] == [[1.0, 4], [2.0, 6]]


def test_best_and_rolling_is_one_folder_and_best_alone_is_saved_between(tiny, tmp_path: Path, monkeypatch) -> None:
    losses = iter([9.0, 3.0, 4.0, 1.0, 2.0])

    def fake(*args, **kwargs):
        return {"eval_loss": next(losses), "eval_mask_loss": 0.0, "eval_accuracy": 0.0}

    monkeypatch.setattr(trainer, "evaluate", fake)
    tiny.run(
        tmp_path,
        val_interval=3,
        checkpoint_every_n_steps=100,
        num_best_checkpoints=1,
        max_rolling_checkpoints=1,
    )
    # 3 and 9 were the best of their time, 12 is the end; 6 was neither due nor better.
    assert checkpoint.steps(tmp_path) == [9, 12]


def test_full_disk_is_a_warning_until_the_end(tiny, tmp_path: Path, monkeypatch, caplog) -> None:
    original, failing = checkpoint.save, [8]

    def save(run_dir, step, **contents):
        if step in failing:
            raise OSError(28, "No space left on device")
        return original(run_dir, step, **contents)

    monkeypatch.setattr(checkpoint, "save", save)
    with caplog.at_level(logging.WARNING):
        assert tiny.run(tmp_path / "a") == 0
    assert "no checkpoint at step 8" in caplog.text
    assert checkpoint.steps(tmp_path / "a") == [4, 12]
    failing[:] = [12]
    assert tiny.run(tmp_path / "b") == 1
    assert "no checkpoint at step 12: [Errno 28] No space left on device; the same command goes on" in caplog.text
    assert checkpoint.latest(tmp_path / "b").name == "step-00000008"


def test_full_disk_under_the_metrics_stops_and_the_same_command_finishes(
    tiny, tmp_path: Path, monkeypatch, caplog
) -> None:
    from ultra.train.metrics import MetricsLog

    original = MetricsLog.write

    def write(self, new):
        if any(row["step"] == 6 for row in new):
            with self.jsonl.open("a") as file:
                file.write('{"step": 6, "lo')
            raise OSError(28, "No space left on device")
        return original(self, new)

    assert tiny.run(tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write)
        assert tiny.run(tmp_path / "parts") == 1
    assert "stopped at step 6: [Errno 28] No space left on device; make room" in caplog.text
    assert tiny.run(tmp_path / "parts") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


# Bad steps


class Poison:
    """Makes the loss of chosen data steps NaN; `only_fast` leaves the reference ops alone."""

    def __init__(self, tiny, monkeypatch, steps, only_fast: bool = False) -> None:
        original = tiny.Model.forward

        def forward(model, input_ids, *args, **kwargs):
            out = original(model, input_ids, *args, **kwargs)
            reference = bool(trainer.ultra_kernels._dispatch._forced)
            if self.step in steps and model.training and not (only_fast and reference):
                out.loss_sum = out.loss_sum * float("nan")
            return out

        backward, self.step = trainer.Trainer.backward, -1

        def noted(trainer_, micro_batches):
            self.step = trainer_.state.data_step
            return backward(trainer_, micro_batches)

        look = trainer.Trainer.diagnose

        def diagnose(trainer_, data_step):
            self.step, before = data_step, self.step
            look(trainer_, data_step)
            self.step = before

        monkeypatch.setattr(tiny.Model, "forward", forward)
        monkeypatch.setattr(trainer.Trainer, "backward", noted)
        monkeypatch.setattr(trainer.Trainer, "diagnose", diagnose)


def test_one_bad_batch_is_skipped_and_the_run_goes_on(tiny, tmp_path: Path, monkeypatch, caplog) -> None:
    Poison(tiny, monkeypatch, {5})
    with caplog.at_level(logging.WARNING):
        assert tiny.run(tmp_path) == 0
    assert "skipped step 6" in caplog.text
    assert "document 0 of the micro-batch that begins at sample 40" in caplog.text  # 5 steps of 2 x 4
    found = {row["step"]: row for row in rows(tmp_path) if "loss" in row}
    assert [step for step, row in found.items() if row["skipped"]] == [6]
    assert found[6]["loss"] is None  # JSON has no NaN
    assert all(math.isfinite(row["loss"]) for step, row in found.items() if step != 6)
    state = checkpoint.read_state(checkpoint.latest(tmp_path))
    assert (state["skipped"], state["bad_windows"], state["lr_scale"]) == (1, 0, 1.0)


def test_a_skipped_step_leaves_the_model_as_it_was(tiny, tmp_path: Path, monkeypatch) -> None:
    t = make_trainer(tiny, tmp_path, max_steps=3)
    t.metrics = None
    Poison(tiny, monkeypatch, {2})
    saved = []
    original = trainer.Trainer.note

    def note(self, *args):
        saved.append({k: v.clone() for k, v in self.model.state_dict().items()})
        return original(self, *args)

    monkeypatch.setattr(trainer.Trainer, "note", note)
    t.run()
    assert any(not torch.equal(saved[0][k], saved[1][k]) for k in saved[0])
    assert all(torch.equal(saved[1][k], saved[2][k]) for k in saved[0])


def test_bad_windows_in_a_row_go_back_at_half_the_rates_and_pass_over_the_samples(
    tiny, tmp_path: Path, monkeypatch, caplog
) -> None:
    Poison(tiny, monkeypatch, {5, 6, 7, 8})  # windows of 2 steps: 5-6, 7-8, 9-10 (from 1) are bad
    settings = {"max_nan_retries": 2, "scheduler_type": "constant"}
    with caplog.at_level(logging.WARNING):
        assert tiny.run(tmp_path, **settings) == 0
    assert "went back from step 8 to 4" in caplog.text
    found = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["step"] for row in found] == list(range(1, 13))
    assert [row["lr"] for row in found] == [1e-2] * 4 + [5e-3] * 8
    state = checkpoint.read_state(checkpoint.latest(tmp_path))
    assert (state["lr_scale"], state["step"], state["data_step"], state["skipped"]) == (0.5, 12, 16, 4)
    # and the scale outlives a resume
    assert tiny.run(tmp_path, max_steps=14, **settings) == 0
    assert rows(tmp_path)[-2]["lr"] == 5e-3


def test_what_going_back_does_not_help_stops_with_a_dump(tiny, tmp_path: Path, monkeypatch, caplog) -> None:
    Poison(tiny, monkeypatch, range(5, 1000))
    with caplog.at_level(logging.WARNING):
        assert tiny.run(tmp_path, max_nan_retries=1) == 1
    assert "went back from step 6 to 4" in caplog.text
    assert "going back to step 4 did not help" in caplog.text
    dump = next(tmp_path.glob("dump-step-*"))
    assert {p.name for p in dump.iterdir()} == {"batches.safetensors", "layers.jsonl", "parameters.jsonl"}
    lines = [json.loads(line) for line in (dump / "parameters.jsonl").read_text().splitlines()]
    assert {line["name"] for line in lines} == {name for name, _ in tiny.Model().named_parameters()}
    assert all(line["not_finite"] == 0 < line["gradient_not_finite"] for line in lines if line["name"] == "left.weight")
    layers = [json.loads(line) for line in (dump / "layers.jsonl").read_text().splitlines()]
    assert {"left", "right", "norm"} <= {line["name"] for line in layers}
    assert all(line["rms"] > 0 and line["not_finite"] == 0 for line in layers)
    assert set(load_file(dump / "batches.safetensors")) == {
        f"{micro}.{name}" for micro in (0, 1) for name in ("input_ids", "labels", "cu_seqlens")
    }
    assert checkpoint.latest(tmp_path).name == "step-00000004"


def test_bad_from_the_first_step_stops(tiny, tmp_path: Path, monkeypatch, caplog) -> None:
    Poison(tiny, monkeypatch, range(1000))
    assert tiny.run(tmp_path, max_nan_retries=1) == 1
    assert "going back to step 0 did not help" in caplog.text
    assert checkpoint.steps(tmp_path) == []


def test_bad_windows_before_the_first_checkpoint_go_back_to_the_start(
    tiny, tmp_path: Path, monkeypatch, caplog
) -> None:
    Poison(tiny, monkeypatch, {2})  # steps 1 and 2 move the weights, the third is bad
    original, seen = trainer.Trainer.reset, []

    def reset(self):
        moved = checkpoint.model_tensors(self.model)["left.weight"].clone()
        original(self)
        seen.append((moved, checkpoint.model_tensors(self.model), dict(self.optimizer.state_tensors())))

    monkeypatch.setattr(trainer.Trainer, "reset", reset)
    with caplog.at_level(logging.WARNING):
        settings = {"max_nan_retries": 1, "scheduler_type": "constant", "nan_check_interval": 1}
        assert tiny.run(tmp_path, **settings) == 0
    assert "went back from step 3 to 0; all rates are now 0.5 of the configured" in caplog.text
    (moved, weights, moments), first = seen[0], trainer.fresh_model(tiny.config())
    assert not moments and not torch.equal(moved, weights["left.weight"])
    found = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["step"] for row in found] == list(range(1, 13)) and {row["lr"] for row in found} == {5e-3}
    assert checkpoint.read_state(checkpoint.latest(tmp_path))["data_step"] == 15
    assert weights.keys() == checkpoint.model_tensors(first).keys()


def test_reset_gives_the_first_weights_again(tiny, tmp_path: Path) -> None:
    cfg = tiny.config()
    t = trainer.Trainer(cfg, tmp_path, trainer.fresh_model(cfg), tiny.Data(cfg), CPU, StopFlag())
    first = {name: w.clone() for name, w in checkpoint.model_tensors(t.model).items()}
    t.gate.norms[0] = 1.0
    with torch.no_grad():
        for param in t.model.parameters():
            param += 1
    t.state.step = 9
    t.reset()
    assert all(torch.equal(w, first[name]) for name, w in checkpoint.model_tensors(t.model).items())
    assert t.state == trainer.State() and t.gate.norms.isnan().all()


def test_a_faulty_kernel_switches_to_the_reference_ops(tiny, tmp_path: Path, monkeypatch, caplog) -> None:
    Poison(tiny, monkeypatch, range(5, 1000), only_fast=True)
    with caplog.at_level(logging.WARNING):
        assert tiny.run(tmp_path, max_nan_retries=1) == 0
    assert "a kernel or the mixed precision is at fault" in caplog.text
    bad = [row["step"] for row in rows(tmp_path) if row.get("skipped")]
    assert bad == [6]  # the window that ends at step 6 switched
    assert checkpoint.read_state(checkpoint.latest(tmp_path))["reference_ops"]


def test_check_interval_decides_when_the_host_looks(tiny, tmp_path: Path, monkeypatch) -> None:
    looks = []
    original = trainer.Trainer.look_at_flags

    def look(self):
        looks.append(self.state.step)
        return original(self)

    monkeypatch.setattr(trainer.Trainer, "look_at_flags", look)
    tiny.run(tmp_path, nan_check_interval=5, val_interval=100, checkpoint_every_n_steps=100)
    assert looks == [5, 10, 12]  # and before the last checkpoint


# Precision


@pytest.mark.parametrize(("dtype", "hardware"), [("auto", True), ("auto", False), ("bf16", True), ("bf16", False)])
def test_mixed_precision_on_the_cpu(tiny, tmp_path: Path, monkeypatch, caplog, dtype: str, hardware: bool) -> None:
    from ultra.train import precision

    seen = set()
    original = torch.nn.functional.linear

    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: hardware)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: seen.add((out := original(*a)).dtype) or out)
    with caplog.at_level(logging.INFO):
        assert tiny.run(tmp_path, use_amp=True, amp_dtype=dtype) == 0
    assert (torch.bfloat16 in seen) == (hardware or dtype == "bf16")
    told = {("auto", False): "so auto is float32", ("bf16", False): "auto, in float32, is many times faster"}
    assert told.get((dtype, hardware), "") in caplog.text and ("no products of bfloat16" in caplog.text) != hardware
    weights = load_file(checkpoint.latest(tmp_path) / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}


def test_fp16_on_the_cpu_is_refused(tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        tiny.run(tmp_path, use_amp=True, amp_dtype="fp16")


def test_loss_scale_halves_on_overflow_and_grows_after_a_while(monkeypatch) -> None:
    from ultra.train import precision

    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 3)
    scale = precision.LossScale(torch.float16, CPU)
    values = []
    for overflow in (True, False, False, False, False, True):
        scale.update(torch.tensor(overflow))
        values.append(scale.value.item())
    assert values == [32768, 32768, 32768, 65536, 65536, 32768]
    plain = precision.LossScale(torch.bfloat16, CPU)
    plain.update(torch.tensor(True))
    assert plain.value == 1


def test_loss_scale_leaves_the_gradient_and_an_overflow_is_no_fault(tiny, tmp_path: Path) -> None:
    t = make_trainer(tiny, tmp_path)
    plain = make_trainer(tiny, tmp_path)
    plain.model.load_state_dict(t.model.state_dict())
    t.scale.active, t.scale.value = True, torch.tensor(1024.0)
    batches = next(t.data.train_batches(0))
    t.backward(batches)
    plain.backward(batches)
    for a, b in zip(t.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # a power of two only moves the exponent
    t.note(torch.tensor(1.0), torch.tensor(float("inf")), torch.tensor(True))
    assert not t.made[-1].fault
    assert t.scale.value == 512
    t.note(torch.tensor(float("nan")), torch.tensor(float("nan")), torch.tensor(True))
    assert t.made[-1].fault


# Rates


def test_bitnet_two_stage_lowers_rates_and_ends_decay_at_the_middle(tiny, tmp_path: Path) -> None:
    t = make_trainer(tiny, tmp_path, scheduler_type="constant")
    t.cfg = t.cfg.model_copy(update={"model": UltraConfig(use_bitnet=True, bitnet_two_stage=True)})
    for step, expected in ((5, (1.0, 1.0)), (6, (0.25, 0.0)), (11, (0.25, 0.0))):
        t.state.step = step
        assert t.rates() == expected
    t.state.lr_scale = 0.5  # after a rollback
    assert t.rates() == (0.125, 0.0)
    t.cfg = t.cfg.model_copy(update={"model": UltraConfig(use_bitnet=True)})
    assert t.rates() == (0.5, 1.0)


# Signals


def test_usr1_checkpoints_and_goes_on(tiny, tmp_path: Path, monkeypatch) -> None:
    original = trainer.Trainer.backward

    def backward(self, micro_batches):
        if self.state.step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, micro_batches)

    monkeypatch.setattr(trainer.Trainer, "backward", backward)
    assert tiny.run(tmp_path) == 0
    assert 5 in checkpoint.steps(tmp_path)


def test_signal_during_evaluation_leaves_it_to_the_resumed_run(tiny, tmp_path: Path, monkeypatch) -> None:
    assert tiny.run(tmp_path / "whole") == 0
    original = trainer.evaluate
    calls = 0

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", interrupted)
        assert tiny.run(tmp_path / "parts") == 75
    assert rows(tmp_path / "parts")[-1] == {**rows(tmp_path / "parts")[-1], "step": 4}
    assert tiny.run(tmp_path / "parts") == 0
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_interrupted_while_data_is_prepared(tiny, tmp_path: Path, monkeypatch) -> None:
    def never(cfg, should_stop):
        os.kill(os.getpid(), signal.SIGINT)
        assert should_stop()
        raise trainer.Interrupted

    monkeypatch.setattr(trainer, "open_data", never)
    before = signal.getsignal(signal.SIGINT)
    assert tiny.run(tmp_path) == 75
    assert signal.getsignal(signal.SIGINT) is before


CHILD = """
import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("tiny", sys.argv[1])
tiny = importlib.util.module_from_spec(spec); spec.loader.exec_module(tiny)
from ultra.train import trainer
trainer.build_model = lambda cfg: tiny.TinyModel(0.1)
trainer.open_data = lambda cfg, should_stop=None: tiny.TinyData(cfg)
backward = trainer.Trainer.backward
def slow(self, batches):
    time.sleep(float(sys.argv[3]))
    return backward(self, batches)
trainer.Trainer.backward = slow
sys.exit(trainer.train(tiny.config(), run_dir=pathlib.Path(sys.argv[2])))
"""


def spawn(run: Path, seconds: float) -> subprocess.Popen:
    conftest = Path(__file__).with_name("conftest.py")
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(conftest), str(run), str(seconds)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_rows(child: subprocess.Popen, run: Path, number: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(read_rows(run / "metrics.jsonl"))) < number:
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_sigterm_exits_75_and_the_same_command_finishes_with_equal_bits(tiny, tmp_path: Path) -> None:
    child = spawn(tmp_path / "parts", 0.2)
    wait_for_rows(child, tmp_path / "parts", 3)
    child.terminate()
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 75, output
    assert "the same command goes on" in output
    assert tiny.run(tmp_path / "parts") == 0
    assert tiny.run(tmp_path / "whole") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_second_sigterm_exits_at_once(tmp_path: Path) -> None:
    child = spawn(tmp_path, 20.0)  # a step takes longer than the test
    wait_for_rows(child, tmp_path, 1)
    while child.poll() is None:  # on a busy machine two signals may arrive as one
        child.terminate()
        time.sleep(0.2)
    child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM


# Trackers


def test_missing_tracker_names_the_extra(tiny, tmp_path: Path, monkeypatch) -> None:
    from ultra.train import metrics

    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"trackio not installed; run pip install '.\[track\]'"):
        tiny.run(tmp_path, log_to=("trackio",))


def test_trackers_get_every_row(tiny, tmp_path: Path, monkeypatch) -> None:
    got = []

    class Recorder:
        def log(self, step, row):
            got.append((step, dataclasses.replace(Row(row))))

        def close(self):
            got.append("closed")

    @dataclasses.dataclass
    class Row:
        values: dict

    monkeypatch.setattr(trainer, "open_trackers", lambda *args: [Recorder()])
    tiny.run(tmp_path, max_steps=2)
    assert got[-1] == "closed"
    assert [step for step, _ in got[:-1]] == [0, 1, 2, 2]
    assert "loss" in got[1][1].values and "eval_loss" in got[0][1].values
