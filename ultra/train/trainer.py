"""The training loop, and what holds it up."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import platform
import struct
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

import ultra_kernels
from ultra.config.run import RunConfig
from ultra.data import Batch, CorpusData, Interrupted, open_data
from ultra.errors import UserError
from ultra.model import Encoder, build_model
from ultra.train import checkpoint, health
from ultra.train.evaluation import evaluate
from ultra.train.metrics import MetricsLog, log_to_folder, open_trackers
from ultra.train.optim import GroupedOptimizer, collect_groups, table, warn_if_rates_cannot_train
from ultra.train.precision import LossScale, amp_dtype, autocast, pick_device
from ultra.train.resume import find_start, refuse_other_model, refuse_other_vocabulary
from ultra.train.schedule import lr_factor
from ultra.train.signals import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, StopFlag, stop_on_signals

log = logging.getLogger(__name__)


@dataclasses.dataclass
class State:
    """Where a run stands; with the tensors of a checkpoint, all that the next step depends on."""

    step: int = 0  # optimizer steps made
    data_step: int = 0  # batches taken; runs ahead of step after a rollback, which passes over the bad samples
    tokens: int = 0
    lr_scale: float = 1.0  # halved by every rollback
    evaluated: int = -1  # step of the last evaluation
    best: list[tuple[float, int]] = dataclasses.field(default_factory=list)  # (held-out loss, step), best first
    skipped: int = 0
    bad_windows: int = 0  # in a row
    rolled_back_to: int = -1
    reference_ops: bool = False  # a kernel or the mixed precision failed: run on without them


@dataclasses.dataclass(frozen=True)
class Made:
    """One optimizer step whose flags the host has not looked at yet."""

    step: int
    batches: list[Batch]
    fault: Tensor  # 0-d bool: counts against the run
    finite: Tensor  # 0-d bool: loss and gradient norm


class Diverged(Exception):
    """The policy for bad steps has nothing left to try."""


class Trainer:
    """One run. `rank` and `world_size` choose the share of each global batch that this process takes."""

    def __init__(
        self,
        cfg: RunConfig,
        run_dir: Path,
        model: nn.Module,
        data: CorpusData,
        device: torch.device,
        stop: StopFlag,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.cfg, self.training, self.run_dir = cfg, cfg.training, run_dir
        self.model, self.data, self.device, self.stop = model, data, device, stop
        self.rank, self.world_size = rank, world_size
        self.total_steps = self.training.steps
        self.groups = collect_groups(model, self.training)
        self.optimizer = GroupedOptimizer(self.groups, self.training)
        self.amp_dtype = amp_dtype(self.training, device)
        self.scale = LossScale(self.amp_dtype, device)
        self.gate = health.Gate(self.training.inf_post_clip_threshold, device)
        self.state = State()
        self.saved = 0  # step of the last checkpoint; a fresh run is its own checkpoint 0
        self.eval_loss = math.nan
        self.made: list[Made] = []  # since the last look at the flags

    def run(self) -> int:
        s, cfg, other = self.state, self.training, self.training.optim("other")
        self.metrics = self.open_metrics()
        batches = self.data.train_batches(s.data_step, rank=self.rank, world_size=self.world_size)
        self.model.train()
        try:
            while True:
                if self.evaluation_due():
                    self.evaluate()
                if self.checkpoint_due():
                    self.save()
                if s.step >= self.total_steps or self.stop():
                    break
                waiting = time.perf_counter()
                try:
                    micro_batches = next(batches)
                except Interrupted:  # a signal while it waited for the cache
                    continue
                data_wait = time.perf_counter() - waiting

                factor, decay = self.rates()
                self.optimizer.set_rates(factor, decay=decay)
                loss, aux_loss, moe_stats = self.backward(micro_batches)
                statistics = self.statistics(moe_stats)
                norm = nn.utils.clip_grad_norm_(self.optimizer.params, cfg.grad_clip_max_norm, foreach=True)
                bad = self.gate(loss + aux_loss, norm, s.step)
                self.optimizer.step(bad.float())
                self.optimizer.zero_grad()
                self.update_moe_bias(moe_stats, bad)

                s.step += 1
                s.data_step += 1
                s.tokens += sum(batch.input_ids.numel() for batch in micro_batches)
                self.note(micro_batches, loss, norm, bad)
                self.metrics.add(
                    {
                        "step": s.step,
                        "loss": loss,
                        "lr": other.lr * factor,  # the group that every model has
                        "grad_norm": norm,
                        "tokens": s.tokens,
                        "data_wait_ms": round(data_wait * 1e3, 3),
                        "aux_loss": aux_loss,
                        "lr_factor": factor,
                        "skipped": bad.int(),
                        **statistics,
                    }
                )
                # Reading a value waits for a GPU, but not for a CPU.
                if self.device.type == "cpu" or s.step % cfg.nan_check_interval == 0:
                    self.metrics.flush()
                if s.step % cfg.nan_check_interval == 0 or self.evaluation_due() or self.checkpoint_due():
                    self.look_at_flags()
        except Diverged as error:
            log.error("%s", error)
            return EXIT_FAILED
        finally:
            self.metrics.flush()
            self.metrics.close()
        return EXIT_DONE if s.step >= self.total_steps else EXIT_INTERRUPTED

    def backward(self, micro_batches: list[Batch]) -> tuple[Tensor, Tensor, list[Any]]:
        """Gradient of the mean cross-entropy over all labelled tokens of the step, plus the auxiliary losses.

        Token-weighted: any split of the same samples into micro-batches gives the same gradient. Returns that
        mean, the auxiliary losses, and each MoE layer's MoEStats with the counts of the whole step.
        """
        labelled = sum(batch.num_labelled for batch in micro_batches)
        loss = aux_loss = torch.zeros((), device=self.device)
        moe_stats = []
        for micro, batch in enumerate(micro_batches):
            torch.manual_seed(counter_seed(self.training.seed, self.state.data_step, micro, self.rank))
            batch = batch.to(self.device, non_blocking=True)
            with self.backend():
                with autocast(self.device, None if self.state.reference_ops else self.amp_dtype):
                    out = self.model(
                        batch.input_ids,
                        labels=batch.labels,
                        cu_seqlens=batch.cu_seqlens,
                        max_seqlen=batch.max_seqlen,
                    )
                micro_loss = out.loss_sum.float() / labelled
                micro_aux = out.aux_loss.float() / len(micro_batches)
                objective = micro_loss + micro_aux
                self.optimizer.before_backward(~torch.isfinite(objective), self.scale.value)
                (objective * self.scale.value).backward()
            loss, aux_loss = loss + micro_loss.detach(), aux_loss + micro_aux.detach()
            moe_stats.append(out.moe_stats)
        if self.scale.active:
            torch._foreach_div_([p.grad for p in self.optimizer.params if p.grad is not None], self.scale.value)
        # The loads of all micro-batches, layer by layer.
        merged = [
            layer[0]._replace(counts=torch.stack([stats.counts for stats in layer]).sum(0))
            for layer in zip(*moe_stats, strict=True)
        ]
        return loss, aux_loss, merged

    def backend(self) -> AbstractContextManager[None]:
        return ultra_kernels.use_backend("reference") if self.state.reference_ops else nullcontext()

    def rates(self) -> tuple[float, float]:
        """Factors on every group's rate and weight decay for the step to be made."""
        factor, decay = lr_factor(self.state.step, self.training) * self.state.lr_scale, 1.0
        model = self.cfg.model
        second_half = 2 * self.state.step >= self.training.scheduler_total_steps
        if model.use_bitnet and model.bitnet_two_stage and second_half:
            factor, decay = factor / 2, 0.0
        return factor, decay

    def statistics(self, moe_stats: list[Any]) -> dict[str, Any]:
        """Gradient norm per group before clipping and the experts' loads, at the steps where they are due."""
        cfg = self.training
        row: dict[str, Any] = {"loss_scale": self.scale.value} if self.scale.active else {}
        if cfg.log_gradient_stats and (self.state.step + 1) % cfg.gradient_log_interval == 0:
            for group in self.groups:
                if grads := [p.grad for p in group.tensors if p.grad is not None]:
                    row[f"grad_norm_{group.name}"] = nn.utils.get_total_norm(grads)
            row["moe_counts"] = [stats.counts for stats in moe_stats]
            if self.device.type == "cuda":
                row["max_memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3)
        return row

    def update_moe_bias(self, moe_stats: list[Any], bad: Tensor) -> None:
        """One step of the experts' selection bias; after a bad step all loads read 0, which moves nothing."""
        if moe_stats:
            gated = [stats._replace(counts=torch.where(bad, 0, stats.counts)) for stats in moe_stats]
            self.model.update_moe_bias(gated)  # type: ignore[operator]

    def note(self, micro_batches: list[Batch], loss: Tensor, norm: Tensor, bad: Tensor) -> None:
        """Keep what look_at_flags needs, and let the loss scale follow an overflow."""
        overflow = torch.isfinite(loss) & ~torch.isfinite(norm)
        # At a scale above 1 an fp16 overflow is how the scale finds its value, not a fault.
        fault = bad & ~(overflow & (self.scale.value > 1)) if self.scale.active else bad
        self.scale.update(overflow)
        self.made.append(Made(self.state.step, micro_batches, fault, torch.isfinite(loss) & torch.isfinite(norm)))

    # What to do about bad steps

    def look_at_flags(self) -> None:
        """The policy for the window of steps since the last look; every bad one of them was skipped already.

        A non-finite step is run again on the reference ops in fp32: when that is finite, the run goes on with
        them. After max_nan_retries bad windows in a row the run goes back to its last good checkpoint, or to the
        start, at half the rates and passes over the samples; where it went back to before, Diverged.
        """
        window, self.made = self.made, []
        faults = [made for made in window if made.fault]
        s = self.state
        if not faults:
            s.bad_windows = 0
            return
        s.skipped += len(faults)
        s.bad_windows += 1
        listed = ", ".join(str(made.step) for made in faults)
        samples = sorted(batch.first_sample for made in faults for batch in made.batches)
        log.warning(
            "skipped step %s (bad window %d in a row): loss or gradient norm not finite, or a spike; "
            "micro-batches from samples %s",
            listed, s.bad_windows, ", ".join(map(str, samples[:16])),
        )  # fmt: skip
        not_finite = [made for made in faults if not made.finite]
        if not_finite and not s.reference_ops:
            self.diagnose(not_finite[0].batches)
        if s.bad_windows >= max(self.training.max_nan_retries, 1):
            self.go_back(faults[-1].batches)

    def diagnose(self, batches: list[Batch]) -> None:
        """Tell a fault of data or weights from one of a kernel or mixed precision, and act on the latter."""
        if found := health.non_finite_documents(self.model, batches, self.device):
            log.warning("not finite on the reference ops in fp32 either: %s", "; ".join(found[:8]))
            return
        where = health.first_non_finite_module(self.model, batches, self.device, self.amp_dtype)
        log.warning(
            "finite on the reference ops in fp32: a kernel or the mixed precision is at fault%s. Going on "
            "with the reference ops in fp32, slowly; please report this with the output of `ultra doctor`",
            f", first in {where}" if where else "",
        )
        self.state.reference_ops, self.state.bad_windows = True, 0

    def go_back(self, batches: list[Batch]) -> None:
        """To the last good checkpoint, or to the start where there is none, at half the rates."""
        s = self.state
        step, path = 0, None
        for candidate in reversed(checkpoint.steps(self.run_dir)):
            folder = checkpoint.folder(self.run_dir, candidate)
            if checkpoint.damage(folder) is None and checkpoint.read_state(folder)["bad_windows"] == 0:
                step, path = candidate, folder
                break
        if step == s.rolled_back_to:
            dump = self.run_dir / f"dump-step-{s.step:08d}"
            health.dump(dump, self.model, batches)
            raise Diverged(
                f"stopped at step {s.step}: {s.bad_windows} bad windows in a row, and going back to step {step} did "
                f"not help. The last bad batches and figures per parameter are in {dump}. Try lower rates, a longer "
                "warm-up, or a smaller grad_clip_max_norm"
            )
        now = dataclasses.replace(s)
        if path is None:
            self.reset()
        else:
            self.restore(path)
        s.data_step, s.skipped, s.reference_ops = now.data_step, now.skipped, now.reference_ops
        s.lr_scale, s.rolled_back_to = now.lr_scale / 2, step
        checkpoint.set_aside_after(self.run_dir, step)
        self.metrics.flush()
        self.metrics.truncate(step)
        self.metrics.skip_time(s.tokens)
        log.warning("went back from step %d to %d; all rates are now %g of the configured", now.step, step, s.lr_scale)

    def reset(self) -> None:
        """Everything back to step 0: the first weights, no moments."""
        first = fresh_model(self.cfg)
        if self.training.init_from is not None:
            checkpoint.load_model_weights(Path(self.training.init_from), first)
        checkpoint.copy_into(self.model, checkpoint.model_tensors(first), self.run_dir)
        self.optimizer.load_state_tensors({})
        self.gate = health.Gate(self.training.inf_post_clip_threshold, self.device)
        self.scale = LossScale(self.amp_dtype, self.device)
        for field in dataclasses.fields(State):
            setattr(self.state, field.name, getattr(State(), field.name))
        self.saved, self.made = 0, []

    # Evaluation and checkpoints

    def evaluation_due(self) -> bool:
        step = self.state.step
        return step != self.state.evaluated and (step % self.training.val_interval == 0 or step == self.total_steps)

    def evaluate(self) -> None:
        s = self.state
        self.metrics.flush()
        row = None
        with self.backend(), suppress(Interrupted):
            row = evaluate(
                self.model,
                self.data.eval_batches(),
                mask_id=self.data.mask_id,
                device=self.device,
                dtype=None if s.reference_ops else self.amp_dtype,
                should_stop=self.stop,
            )
        self.metrics.skip_time(s.tokens)
        if row is None:  # a signal: the resumed run evaluates this step
            return
        s.evaluated, self.eval_loss = s.step, row["eval_loss"]
        self.metrics.write([{"step": s.step, **row}])
        log.info(
            "step %d: held-out loss %.4f, on [MASK] alone %.4f, accuracy %.2f %%",
            s.step, row["eval_loss"], row["eval_mask_loss"], 100 * row["eval_accuracy"],
        )  # fmt: skip

    def among_best(self) -> bool:
        """Whether the weights, just evaluated, are among the num_best_checkpoints best so far."""
        s, number = self.state, self.training.num_best_checkpoints
        if s.evaluated != s.step or not math.isfinite(self.eval_loss):
            return False
        return len([loss for loss, _ in s.best if loss <= self.eval_loss]) < number

    def checkpoint_due(self) -> bool:
        s = self.state
        if s.step == self.saved:
            return False
        if self.stop() or s.step >= self.total_steps:
            return True
        regular = s.step % self.training.checkpoint_every_n_steps == 0
        return s.bad_windows == 0 and (regular or self.stop.checkpoint or self.among_best())

    def save(self) -> None:
        """Write a checkpoint, then delete those that are neither recent nor among the best.

        A full disk is a warning and another attempt at the next occasion, except at the end of the run.
        """
        s = self.state
        former = s.best
        if self.among_best():
            s.best = sorted([*s.best, (self.eval_loss, s.step)])[: self.training.num_best_checkpoints]
        self.stop.checkpoint = False
        self.metrics.flush()
        self.saved = s.step
        try:
            path = checkpoint.save(
                self.run_dir,
                s.step,
                model=checkpoint.model_tensors(self.model),
                optimizer=self.optimizer.state_tensors(),
                state={
                    **dataclasses.asdict(s),
                    "gate": self.gate.state(),
                    "loss_scale": [self.scale.value.item(), self.scale.good_steps.item()],
                    "seed": self.training.seed,
                    "world_size": self.world_size,
                    "versions": versions(),
                },
                config=self.cfg.to_yaml(),
                tokenizer=self.data.tokenizer.to_str(),
            )
        except OSError as error:
            s.best = former
            if self.stop() or s.step >= self.total_steps:
                raise
            log.warning("no checkpoint at step %d: %s; the earlier ones stay, training goes on", s.step, error)
            return
        recent = checkpoint.steps(self.run_dir)[-self.training.max_rolling_checkpoints :]
        checkpoint.prune(self.run_dir, {s.step, *recent, *(step for _, step in s.best)})
        self.metrics.skip_time(s.tokens)
        log.info("checkpoint %s", path)

    def restore(self, path: Path) -> None:
        """Everything back to what it was when the checkpoint at `path` was written."""
        saved = checkpoint.read_state(path)
        checkpoint.copy_into(self.model, checkpoint.read_tensors(path, "model.safetensors"), path)
        self.optimizer.load_state_tensors(checkpoint.read_tensors(path, "optimizer.safetensors"))
        self.gate.load_state(saved["gate"])
        if self.scale.active:
            value, good_steps = saved["loss_scale"]
            self.scale.value.fill_(value)
            self.scale.good_steps.fill_(good_steps)
        for field in dataclasses.fields(State):
            setattr(self.state, field.name, saved[field.name])
        there = set(checkpoint.steps(self.run_dir))
        self.state.best = [(loss, step) for loss, step in saved["best"] if step in there]
        self.saved, self.made = self.state.step, []

    def open_metrics(self) -> MetricsLog:
        s = self.state
        return MetricsLog(
            self.run_dir,
            upto=s.step if s.data_step else -1,
            tokens=s.tokens,
            total_steps=self.total_steps,
            trackers=open_trackers(self.training.log_to, self.run_dir, self.cfg.model_dump(mode="json")),
        )


def counter_seed(*counters: int) -> int:
    """A generator seed that depends on the counters alone: the same after a resume or a recomputation."""
    digest = hashlib.blake2b(struct.pack(f"<{len(counters)}q", *counters), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def fresh_model(cfg: RunConfig) -> Encoder:
    """The model with the first weights of a run: a function of the config alone."""
    torch.manual_seed(counter_seed(cfg.training.seed, -1, 0, 0))
    return build_model(cfg)


def versions() -> dict[str, str]:
    return {
        "ultra": ultra_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def start(trainer: Trainer, path: Path | None) -> None:
    """Bring a new trainer to where the run stands: a checkpoint's state, init_from's weights, or nothing."""
    init_from = trainer.training.init_from
    if path is not None:
        refuse_other_model(trainer.cfg, path)
        refuse_other_vocabulary(trainer.data.tokenizer, path)
        trainer.restore(path)
        checkpoint.set_aside_after(trainer.run_dir, trainer.state.step)
        log.info("resumed at step %d from %s", trainer.state.step, path)
    elif init_from is not None:
        source = checkpoint.resolve(Path(init_from))
        refuse_other_vocabulary(trainer.data.tokenizer, source)
        checkpoint.load_model_weights(source, trainer.model)
        log.info("weights from %s", source)


def train(cfg: RunConfig, *, run_dir: Path, resume: str = "auto") -> int:
    """Train as `cfg` says in `run_dir`; the exit code: 0 done, 1 diverged, 75 interrupted and resumable.

    resume: "auto" goes on from the run folder's newest whole checkpoint if there is one, "never" refuses a
    folder that has one, a path goes on from that checkpoint. Raises UserError for what the user can mend.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "started as several processes, but this version trains in one; run `ultra train` without torchrun"
        )
    run_dir = Path(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run_dir / ".lock", timeout=0).acquire()
    except Timeout:
        raise UserError(f"another process is training in {run_dir}; take another --run-dir") from None
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: {error.strerror}; name a folder that can be made and written") from None
    with lock, log_to_folder(run_dir), stop_on_signals() as stop:
        return _train(cfg, run_dir, find_start(run_dir, resume), stop)


def _train(cfg: RunConfig, run_dir: Path, path: Path | None, stop: StopFlag) -> int:
    device = pick_device(cfg.training.device)
    model = fresh_model(cfg)
    count = sum(p.numel() for p in model.parameters())
    log.info("ultra %(ultra)s, torch %(torch)s, Python %(python)s", versions())
    log.info("%s parameters on %s, run folder %s", f"{count:,}", device, run_dir)
    try:
        data = open_data(cfg, should_stop=stop)
    except Interrupted:
        log.info("interrupted while the data was prepared; the same command goes on from there")
        return EXIT_INTERRUPTED
    try:
        trainer = Trainer(cfg, run_dir, model.to(device), data, device, stop)
        start(trainer, path)
        (run_dir / "config.yaml").write_text(cfg.to_yaml(), encoding="utf-8")
        log.info("parameter groups:\n%s", table(trainer.groups))
        warn_if_rates_cannot_train(trainer.groups, trainer.total_steps, cfg.training, cfg.model.init_std)
        if cfg.training.compile:
            for layer in model.layers:
                layer.compile()
        code = trainer.run()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory ({error}); lower training.batch_size (and raise gradient_accumulation_steps "
            "alike), or set model.gradient_checkpointing=true"
        ) from error
    finally:
        data.close()
    if code == EXIT_INTERRUPTED:
        log.info("interrupted at step %d; the same command goes on from there", trainer.state.step)
    return code
