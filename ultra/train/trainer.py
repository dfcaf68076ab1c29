"""The training loop, and what holds it up."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import logging
import math
import platform
import struct
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
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
from ultra.train.compiling import any_size, compile_encoder
from ultra.train.evaluation import evaluate
from ultra.train.metrics import MetricsLog, NoMetrics, log_to_folder, open_trackers
from ultra.train.optim import GroupedOptimizer, collect_groups, table, warn_if_rates_cannot_train
from ultra.train.precision import LossScale, amp_dtype, autocast, pick_device
from ultra.train.processes import Processes, joined, own_device
from ultra.train.resume import (
    find_start,
    refuse_other_model,
    refuse_other_vocabulary,
    warn_of_other_model,
    with_tokenizer_of,
)
from ultra.train.schedule import lr_factor, second_stage
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
    pending: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # (step, data_step)
    rolled_back_to: int = -1
    reference_ops: bool = False  # a kernel or the mixed precision failed: run on without them


@dataclasses.dataclass(frozen=True)
class Made:
    """One optimizer step whose flag the host has not looked at yet."""

    step: int
    data_step: int
    fault: Tensor  # 0-d bool: counts against the run


class Stopped(Exception):
    """The run cannot go on: the policy for bad steps has nothing left to try, or the last checkpoint no room."""


class Trainer:
    """One run, or the part of it that is this one of several `processes`: its share of each step's samples."""

    def __init__(
        self,
        cfg: RunConfig,
        run_dir: Path,
        model: nn.Module,
        data: CorpusData,
        device: torch.device,
        stop: StopFlag,
        processes: Processes | None = None,
    ) -> None:
        self.cfg, self.training, self.run_dir = cfg, cfg.training, run_dir
        self.model, self.data, self.device, self.stop = model, data, device, stop
        self.processes = processes or Processes()
        if self.processes.several and self.training.use_galore and self.training.galore_per_layer:
            raise UserError(
                "training.galore_per_layer updates weights before the processes have exchanged gradients; set it to "
                "false, or train in one process"
            )
        self.replica = self.processes.replica(model)
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
        batches = self.train_batches(s.data_step)
        self.model.train()
        try:
            while True:
                self.stop.agree(self.processes)
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
                loss, aux_loss, loads = self.backward(micro_batches)
                statistics = self.statistics(loads)
                norm = self.optimizer.grad_norm(self.optimizer.params)
                nn.utils.clip_grads_with_norm_(self.optimizer.params, cfg.grad_clip_max_norm, norm, foreach=True)
                bad = self.gate(loss + aux_loss, norm, s.step)
                self.optimizer.step(bad.float())
                self.optimizer.zero_grad()
                # a bad step reads as no load at all, which moves nothing
                self.model.update_moe_bias(torch.where(bad, 0, loads))  # type: ignore[operator]

                s.step += 1
                self.note(loss + aux_loss, norm, bad)
                s.data_step += 1
                s.tokens += int(self.processes.total(sum(batch.input_ids.numel() for batch in micro_batches))[0])
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
                if s.step % cfg.nan_check_interval == 0 or self.evaluation_due() or self.regular_checkpoint_due():
                    self.look_at_flags()
        except Stopped as error:
            log.error("%s", error)
            return EXIT_FAILED
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.metrics.rows = []  # the resumed run writes them again
            log.error(
                "stopped at step %d: %s; make room, and the same command goes on from the last checkpoint",
                s.step,
                error,
            )
            return EXIT_FAILED
        finally:
            self.metrics.flush()
            self.metrics.close()
        return EXIT_DONE if s.step >= self.total_steps else EXIT_INTERRUPTED

    def backward(self, micro_batches: list[Batch]) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of the mean cross-entropy over all labelled tokens of the step, plus the auxiliary losses.

        Token-weighted: any split of the same samples into micro-batches and processes gives the same gradient of it.
        The load balancing loss is a mean over micro-batches, of the loads within each.
        Returns that mean, the auxiliary losses, and how many tokens each expert of each layer got `[layers, E]`.
        """
        labelled, world_size = self.labelled(micro_batches), self.processes.world_size
        loss = aux_loss = torch.zeros((), device=self.device)
        loads = []
        for micro, batch in enumerate(micro_batches):
            torch.manual_seed(self.dropout_seed(self.state.data_step, micro))
            batch = batch.to(self.device, non_blocking=True)
            with ExitStack() as stack:
                stack.enter_context(self.backend())
                if micro < len(micro_batches) - 1:
                    stack.enter_context(self.processes.keep_gradients(self.replica))
                with autocast(self.device, None if self.state.reference_ops else self.amp_dtype):
                    out = self.replica(
                        batch.input_ids,
                        labels=batch.labels,
                        cu_seqlens=batch.cu_seqlens,
                        max_seqlen=batch.max_seqlen,
                    )
                micro_loss = out.loss_sum.float() / labelled
                micro_aux = out.aux_loss.float() / len(micro_batches)
                objective = micro_loss * world_size + micro_aux  # gradients of processes are averaged
                self.optimizer.before_backward(~torch.isfinite(objective), self.scale.value)
                (objective * self.scale.value).backward()
            loss, aux_loss = loss + micro_loss.detach(), aux_loss + micro_aux.detach()
            loads.append(self.model.expert_loads(out.moe_stats))  # type: ignore[operator]
        if self.scale.active:
            torch._foreach_div_([p.grad for p in self.optimizer.params if p.grad is not None], self.scale.value)
        load = torch.stack(loads).sum(0)
        if not self.processes.several:
            return loss, aux_loss, load
        # float64 holds counts of tokens exactly
        own = torch.cat([loss[None].double(), aux_loss[None].double() / world_size, load.flatten().double()])
        loss, aux_loss, *_ = sums = self.processes.sum(own)
        return loss.float(), aux_loss.float(), sums[2:].to(load.dtype).view_as(load)

    def labelled(self, micro_batches: list[Batch]) -> float:
        """Labels of the step in all processes."""
        return self.processes.total(sum(batch.num_labelled for batch in micro_batches))[0]

    def dropout_seed(self, data_step: int, micro: int) -> int:
        return counter_seed(self.training.seed, data_step, micro, self.processes.rank)

    def backend(self, *, eager: bool = False) -> AbstractContextManager[object]:
        """What the run's forward passes run on. eager: also of a compiled model, where hooks look inside or the number
        must be the one that `ultra eval` finds."""
        stack = ExitStack()
        if self.state.reference_ops:
            stack.enter_context(ultra_kernels.use_backend("reference"))
        # The reference of a recurrence is a loop over time, which a compiled graph would hold unrolled.
        if self.training.compile:
            forced = eager or self.state.reference_ops
            stack.enter_context(torch.compiler.set_stance("force_eager") if forced else any_size())
        return stack

    def rates(self) -> tuple[float, float]:
        """Factors on every group's rate and weight decay for the step to be made."""
        two_stage, step = self.cfg.model.bitnet_two_stage, self.state.step
        factor = lr_factor(step, self.training, two_stage) * self.state.lr_scale
        return factor, 0.0 if two_stage and step >= second_stage(self.training) else 1.0

    def statistics(self, loads: Tensor) -> dict[str, Any]:
        """Gradient norm per group before clipping and the experts' loads, at the steps where they are due."""
        cfg = self.training
        row: dict[str, Any] = {"loss_scale": self.scale.value} if self.scale.active else {}
        if cfg.log_gradient_stats and (self.state.step + 1) % cfg.gradient_log_interval == 0:
            for group in self.groups:
                if group.params:
                    row[f"grad_norm_{group.name}"] = self.optimizer.grad_norm(group.tensors)
            row["moe_loads"] = loads
            if self.device.type == "cuda":
                row["max_memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3)
        return row

    def note(self, objective: Tensor, norm: Tensor, bad: Tensor) -> None:
        """Keep what look_at_flags needs, and let the loss scale follow an overflow."""
        fault = bad
        if self.scale.active:
            overflow = torch.isfinite(objective) & ~torch.isfinite(norm)
            # At a scale above 1 an fp16 overflow is how the scale finds its value, not a fault.
            fault = bad & ~(overflow & (self.scale.value > 1))
            self.scale.update(overflow)
        self.made.append(Made(self.state.step, self.state.data_step, fault))

    # What to do about bad steps

    def look_at_flags(self) -> None:
        """The policy for the window of steps since the last look; every bad one of them was skipped already.

        The first of them is run again: where only the run's own kernels or precision give a bad step, it goes on with
        the reference ops in fp32. After max_nan_retries bad windows in a row the run goes back to its last good
        checkpoint, or to the start, at half the rates and passes over the samples; where it went back to before, or
        with max_nan_retries 0, Stopped.
        """
        s = self.state
        faults = [*s.pending, *((made.step, made.data_step) for made in self.made if made.fault)]
        s.pending, self.made = [], []
        if not faults:
            s.bad_windows = 0
            return
        s.skipped += len(faults)
        s.bad_windows += 1
        log.warning(
            "skipped step %s (bad window %d in a row): loss or gradient norm not finite, or a spike; samples %s",
            ", ".join(str(step) for step, _ in faults), s.bad_windows,
            ", ".join(self.samples_of(data_step) for _, data_step in faults[:16]),
        )  # fmt: skip
        self.diagnose(faults[0][1])
        if s.bad_windows and s.bad_windows >= self.training.max_nan_retries:
            self.go_back(faults[-1][1])

    def samples_of(self, data_step: int) -> str:
        """Numbers of the first and the last window of a step, over all processes."""
        size = self.samples_per_step
        return f"{data_step * size}-{(data_step + 1) * size - 1}"

    @property
    def samples_per_step(self) -> int:
        return self.training.gradient_accumulation_steps * self.training.batch_size * self.processes.world_size

    def batches_of(self, data_step: int) -> list[Batch]:
        return next(self.train_batches(data_step))

    def train_batches(self, data_step: int) -> Iterator[list[Batch]]:
        return self.data.train_batches(data_step, rank=self.processes.rank, world_size=self.processes.world_size)

    def diagnose(self, data_step: int) -> None:
        """Tell a fault of data or weights from one of a kernel or mixed precision, and act on the latter."""
        batches = self.batches_of(data_step)
        seeds = [self.dropout_seed(data_step, micro) for micro in range(len(batches))]
        with self.backend(eager=True):
            dtype = None if self.state.reference_ops else self.amp_dtype
            again = health.rerun(self.model, batches, seeds, self.device, dtype)
        any_process = self.processes.any
        found = "; ".join(self.processes.collect(again.found[:8])) or f"gradient norm {again.norm:.4g}"
        if not any_process(bool(self.gate.bad(again.loss, again.norm))):
            log.warning(
                "made again with the present weights it is a good step (%s); its samples are passed over", found
            )
            return
        with self.backend(eager=True):
            reference = health.rerun_on_reference(self.model, batches, self.device)
        # Other dropout masks move a norm, but not by half.
        alike = any_process(bool(self.gate.bad(reference.loss, reference.norm) | (reference.norm > again.norm / 2)))
        if alike or self.state.reference_ops:
            culprits = "; ".join(self.processes.collect(reference.found[:8])) or f"gradient norm {reference.norm:.4g}"
            log.warning("data or weights are at fault: bad on the reference ops in fp32 too (%s): %s", found, culprits)
            return
        log.warning(
            "a kernel or the mixed precision is at fault: good on the reference ops in fp32, bad as it ran (%s). "
            "Going on with the reference ops in fp32, slowly; please report this with the output of `ultra doctor`",
            found,
        )
        self.state.reference_ops, self.state.bad_windows = True, 0

    def go_back(self, data_step: int) -> None:
        """To the last good checkpoint, or to the start where there is none, at half the rates."""
        s = self.state
        step = self.processes.from_main(self.last_good) or 0
        if self.training.max_nan_retries == 0 or step == s.rolled_back_to:
            own = f"-rank-{self.processes.rank}" if self.processes.several else ""
            dump = self.run_dir / f"dump-step-{s.step:08d}{own}"
            with self.backend(eager=True):
                dtype = None if s.reference_ops else self.amp_dtype
                health.dump(dump, self.model, self.batches_of(data_step), self.device, dtype)
            forbidden = self.training.max_nan_retries == 0
            reason = "max_nan_retries is 0" if forbidden else f"going back to step {step} did not help"
            raise Stopped(
                f"stopped at step {s.step} after {s.bad_windows} bad window(s) in a row: {reason}. The last bad "
                f"batches and figures per layer and parameter are in {dump}. Try lower rates, a longer warm-up, or "
                "a smaller grad_clip_max_norm"
            )
        now = dataclasses.replace(s)
        if step == 0:
            self.reset()
        else:
            self.restore(checkpoint.folder(self.run_dir, step))
        s.data_step, s.skipped, s.reference_ops = now.data_step, now.skipped, now.reference_ops
        s.lr_scale, s.rolled_back_to = now.lr_scale / 2, step
        self.processes.from_main(lambda: checkpoint.set_aside_after(self.run_dir, step))
        self.metrics.flush()
        self.metrics.truncate(step)
        self.metrics.skip_time(s.tokens)
        log.warning("went back from step %d to %d; all rates are now %g of the configured", now.step, step, s.lr_scale)

    def reset(self) -> None:
        """Everything back to step 0: the first weights, no moments."""
        first = fresh_model(self.cfg)
        if self.training.init_from is not None:
            checkpoint.load_model_weights(Path(self.training.init_from).expanduser(), first)
        checkpoint.copy_into(self.model, checkpoint.model_tensors(first), self.run_dir)
        self.optimizer.load_state_tensors({})
        self.gate = health.Gate(self.training.inf_post_clip_threshold, self.device)
        self.scale = LossScale(self.amp_dtype, self.device)
        for field in dataclasses.fields(State):
            setattr(self.state, field.name, getattr(State(), field.name))
        self.saved, self.made = 0, []

    def good(self, step: int) -> bool:
        """Whether no bad step came just before the checkpoint of `step`."""
        try:
            state = checkpoint.read_state(checkpoint.folder(self.run_dir, step))
            return not state["bad_windows"] and not state["pending"]
        except (OSError, ValueError, KeyError):  # damaged
            return False

    def last_good(self) -> int | None:
        """Step of the newest whole checkpoint that is good and whose weights are finite."""
        for step in reversed(checkpoint.steps(self.run_dir)):
            path = checkpoint.folder(self.run_dir, step)
            if self.good(step) and checkpoint.damage(path) is None:
                weights = checkpoint.read_tensors(path, "model.safetensors").values()
                if all(bool(torch.isfinite(weight).all()) for weight in weights):
                    return step
        return None

    # Evaluation and checkpoints

    def evaluation_due(self) -> bool:
        step = self.state.step
        return step != self.state.evaluated and (step % self.training.val_interval == 0 or step == self.total_steps)

    def evaluate(self) -> None:
        s = self.state
        self.metrics.flush()
        row = None
        with self.backend(eager=True), suppress(Interrupted):
            row = evaluate(
                self.model,
                self.data.eval_batches(),
                mask_id=self.data.mask_id,
                device=self.device,
                dtype=None if s.reference_ops else self.amp_dtype,
                should_stop=self.stop,
                processes=self.processes,
            )
        self.metrics.skip_time(s.tokens)
        if row is None:  # a signal: the resumed run evaluates this step
            return
        s.evaluated, self.eval_loss = s.step, row["eval_loss"]
        if not math.isfinite(self.eval_loss):
            log.warning(
                "held-out loss at step %d is not finite: this step cannot be among the best checkpoints", s.step
            )
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
        if self.stop() or self.stop.checkpoint or s.step >= self.total_steps:
            return True
        return s.bad_windows == 0 and (self.regular_checkpoint_due() or self.among_best())

    def regular_checkpoint_due(self) -> bool:
        return self.state.step % self.training.checkpoint_every_n_steps == 0 or self.state.step >= self.total_steps

    def save(self) -> None:
        """Write a checkpoint, then delete those that are neither recent, nor among the best, nor the last good one.

        A full disk is a warning and another attempt at the next occasion; at the end of the run, Stopped.
        """
        s = self.state
        # A signal may have come before the host's next look, which the resumed run makes at its time.
        s.pending = [*s.pending, *((made.step, made.data_step) for made in self.made if made.fault)]
        self.made = []
        former = s.best
        if self.among_best():
            s.best = sorted([*s.best, (self.eval_loss, s.step)])[: self.training.num_best_checkpoints]
        self.stop.done_checkpoint()
        self.metrics.flush()
        self.saved = s.step
        if not self.processes.alike(self.optimizer.params):
            raise Stopped(
                f"the weights of the {self.processes.world_size} processes differ at step {s.step}: a GPU or the "
                "network is at fault; the same command goes on from the last checkpoint"
            )
        try:
            path = self.processes.from_main(self.write_checkpoint)
        except OSError as error:
            s.best = former
            if self.stop() or s.step >= self.total_steps:
                raise Stopped(
                    f"no checkpoint at step {s.step}: {error}; the same command goes on from the last"
                ) from error
            log.warning("no checkpoint at step %d: %s; the earlier ones stay, training goes on", s.step, error)
            return
        if self.processes.main:
            self.prune()
        self.metrics.skip_time(s.tokens)
        log.info("checkpoint %s", path)

    def write_checkpoint(self) -> Path:
        s = self.state
        return checkpoint.save(
            self.run_dir,
            s.step,
            model=checkpoint.model_tensors(self.model),
            optimizer=self.optimizer.state_tensors(),
            state={
                **dataclasses.asdict(s),
                "gate": self.gate.state(),
                "loss_scale": [self.scale.value.item(), self.scale.good_steps.item()],
                "seed": self.training.seed,
                "world_size": self.processes.world_size,
                "samples_per_step": self.samples_per_step,
                "versions": versions(),
            },
            config=self.cfg.to_yaml(),
            tokenizer=self.data.tokenizer.to_str(),
        )

    def prune(self) -> None:
        s, there = self.state, checkpoint.steps(self.run_dir)
        recent = there[-self.training.max_rolling_checkpoints :]
        last_good = next((step for step in reversed(there) if self.good(step)), s.step)
        checkpoint.prune(self.run_dir, {s.step, last_good, *recent, *(step for _, step in s.best)})

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
        self.state.pending = [(step, data_step) for step, data_step in saved["pending"]]
        before, now = saved.get("samples_per_step", self.samples_per_step), self.samples_per_step
        if before != now:
            self.state.data_step = -(-self.state.data_step * before // now)
            log.warning(
                "a step has %d samples, %d before: it goes on at sample %d, the first not seen that begins a step",
                now, before, self.state.data_step * now,
            )  # fmt: skip
        self.saved, self.made = self.state.step, []

    def open_metrics(self) -> MetricsLog | NoMetrics:
        s = self.state
        if not self.processes.main:
            return NoMetrics()
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


def train(cfg: RunConfig, *, run_dir: Path, resume: str = "auto") -> int:
    """Train as `cfg` says in `run_dir`; the exit code: 0 done, 1 stopped, 75 interrupted and resumable.

    resume: "auto" goes on from the run folder's newest whole checkpoint if there is one, "never" refuses a
    folder that has one, a path goes on from that checkpoint. Raises UserError for what the user can mend. Started by
    torchrun, its processes train one model, each on its share of the samples (DistributedDataParallel); all must see
    the same run_dir.
    """
    run_dir = Path(run_dir)
    device = own_device(pick_device(cfg.training.device))
    with joined(device) as processes, ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals(processes.several))

        def open_folder() -> Path | None:
            stack.enter_context(_locked(run_dir))
            if (run_dir / "config.yaml").exists() and not (run_dir / "train.log").exists():
                raise UserError(
                    f"--run-dir {run_dir}: the config.yaml there is not of a run, and training would replace it; name "
                    "another folder"
                )
            stack.enter_context(log_to_folder(run_dir))
            return find_start(run_dir, resume)

        path = processes.from_main(open_folder)
        if not run_dir.is_dir() or (path is not None and not path.is_dir()):
            raise UserError(f"--run-dir {run_dir}: process {processes.rank} does not see it; name a shared folder")
        return _train(cfg, run_dir, path, stop, processes, device)


def _locked(run_dir: Path) -> AbstractContextManager[object]:
    """The run folder, made where there is none, and its lock held."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return FileLock(run_dir / ".lock", timeout=0).acquire()
    except Timeout:
        raise UserError(f"another process is training in {run_dir}; take another --run-dir") from None
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: {error.strerror}; name a folder that can be made and written") from None


def _train(
    cfg: RunConfig, run_dir: Path, path: Path | None, stop: StopFlag, processes: Processes, device: torch.device
) -> int:
    model = fresh_model(cfg)
    # What the run starts from, and whether it fits, before hours of tokenising.
    source = path
    if path is not None:
        refuse_other_model(cfg, path)
    elif cfg.training.init_from is not None:
        source = checkpoint.resolve(Path(cfg.training.init_from).expanduser())
        checkpoint.copy_into(model, checkpoint.read_tensors(source, "model.safetensors"), source)
        warn_of_other_model(cfg, source)
        log.info("weights from %s", source)
    count, where = sum(p.numel() for p in model.parameters()), str(device)
    if processes.several:
        where = f"{processes.world_size} processes, this one on {device}"
    log.info("ultra %(ultra)s, torch %(torch)s, Python %(python)s", versions())
    log.info("%s parameters on %s, run folder %s", f"{count:,}", where, run_dir)
    data_cfg = cfg if source is None else with_tokenizer_of(cfg, source)
    try:
        data = _open_data(data_cfg, stop, processes)
    except Interrupted:
        log.info("interrupted while the data was prepared; the same command goes on from there")
        return EXIT_INTERRUPTED
    try:
        trainer = Trainer(cfg, run_dir, model.to(device), data, device, stop, processes)
        if path is not None:
            refuse_other_vocabulary(data.tokenizer, path)
            trainer.restore(path)
            processes.from_main(lambda: checkpoint.set_aside_after(run_dir, trainer.state.step))
            log.info("resumed at step %d from %s", trainer.state.step, path)
        if path is not None and trainer.state.step >= trainer.total_steps:
            log.info(
                "nothing left to train: the run is at step %d of %d; for more, raise training.max_steps or "
                "scheduler_total_steps, or take another --run-dir",
                trainer.state.step,
                trainer.total_steps,
            )
        elif processes.main:
            (run_dir / "config.yaml").write_text(cfg.to_yaml(), encoding="utf-8")
        log.info("parameter groups:\n%s", table(trainer.groups))
        warn_if_rates_cannot_train(
            trainer.groups, trainer.total_steps, cfg.training, cfg.model.initial_std, cfg.model.bitnet_two_stage
        )
        if cfg.training.compile:
            compile_encoder(model, cfg, device, trainer.amp_dtype)
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


def _open_data(cfg: RunConfig, stop: StopFlag, processes: Processes) -> CorpusData:
    """The main process first: the others find what it has made."""
    if not processes.several:
        return open_data(cfg, should_stop=stop)
    opened: list[CorpusData] = []

    def should_stop() -> bool:
        return stop() or (not opened and stop.stop_asked)  # once open, a signal waits until all have agreed

    def open_share() -> None:
        share = {"rank": processes.rank, "world_size": processes.world_size}
        opened.append(open_data(cfg, should_stop=should_stop, **share))

    processes.from_main(open_share)
    if not processes.main:
        open_share()
    return opened[0]
