"""The processes of a run: those that torchrun started, or this one alone."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ultra.errors import UserError

T = TypeVar("T")
# The first process may train a tokenizer while the others wait for it; one that dies is noticed by torchrun at once.
PATIENCE = datetime.timedelta(hours=6)


class Processes:
    """`rank` of `world_size`. What decides how a run goes on must be equal in all of them: else one waits for ever.

    Alone, every method returns what it was given. Numbers go through gloo, tensors on a GPU through NCCL.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size

    @property
    def main(self) -> bool:
        """Whether this one writes the files and the messages."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.world_size > 1

    def total(self, *numbers: float) -> list[float]:
        """Each number's sum over the processes; whole numbers stay exact up to 2^53."""
        if not self.several:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        return bool(self.total(float(flag))[0])

    def sum(self, tensor: Tensor) -> Tensor:
        """On the tensor's device, without waiting for it."""
        if self.several:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def collect(self, items: list[str]) -> list[str]:
        """Those of all processes, in the order of ranks."""
        if not self.several:
            return items
        lists: list[Any] = [None] * self.world_size
        dist.all_gather_object(lists, items)
        return [item for each in lists for item in each]

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises in the main process, which alone runs it."""
        if not self.several:
            return work()
        answer: list[Any] = [None, None]
        if self.main:
            try:
                answer[0] = work()
            except Exception as error:  # whatever it is: every process raises it below, none waits for this one
                answer[1] = error
        dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        result: T = answer[0]
        return result

    def replica(self, model: nn.Module) -> nn.Module:
        """`model` whose backward pass averages the gradients over the processes; the first one's weights count."""
        if not self.several:
            return model
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    def keep_gradients(self, replica: nn.Module) -> AbstractContextManager[object]:
        """Within it a backward pass adds to the process's own gradients; the next one outside averages them all."""
        no_sync: AbstractContextManager[object] = replica.no_sync() if self.several else contextlib.nullcontext()  # type: ignore[operator]
        return no_sync

    def alike(self, tensors: Sequence[Tensor]) -> bool:
        """Whether every process has the same bits in them."""
        if not self.several:
            return True
        words = {4: torch.int32, 2: torch.int16, 8: torch.int64}
        sums = [t.detach().view(words[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
        mine = torch.stack(sums).cpu()
        lowest, highest = mine.clone(), mine.clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return torch.equal(lowest, highest)


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun started, joined for work on `device`. Raises UserError."""
    if not started_by_torchrun():
        yield Processes()
        return
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that there are several processes, but they do not find each "
            f"other ({error}); start them with `torchrun --nproc-per-node N -m ultra train ...`, or unset WORLD_SIZE"
        ) from error
    if rank > 0:  # one process's messages will do
        for name in ("ultra", "ultra_kernels"):
            logging.getLogger(name).addHandler(logging.NullHandler())
    try:
        yield Processes(rank, world_size)
    finally:
        # gloo's thread takes Python's lock to drop the last collective. A process that ends within those milliseconds
        # aborts (exit code 134, in 13 of 58 pairs) or waits for that thread for ever.
        time.sleep(0.2)
    dist.destroy_process_group()  # not after an error: it would wait for the others


def started_by_torchrun() -> bool:
    """Whether torchrun's variables say that there are several processes. Raises UserError."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal():
        raise UserError(f"WORLD_SIZE={size!r} must be a whole number, as torchrun sets it; unset it for one process")
    return int(size) > 1


def own_device(device: torch.device) -> torch.device:
    """`device` with the GPU of this process, one each. Raises UserError."""
    if not started_by_torchrun() or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"training.device: several processes train on cpu or cuda, not on {device.type}")
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise UserError(
            f"torchrun started at least {local + 1} processes here, and there {'is' if there == 1 else 'are'} {there} "
            "GPU(s); give it --nproc-per-node gpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
