"""Stopping on a signal: finish the step, checkpoint, exit 75."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ultra.train.processes import Processes

log = logging.getLogger(__name__)

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again to go on
FORWARDED = 2.0  # seconds in which a signal comes twice: from the terminal, and from torchrun, which had it too


class StopFlag:
    """What the signals asked for; polled by the loop, by evaluation and by data preparation.

    SIGTERM and SIGINT: checkpoint and stop; a second one exits at once with 128 + its number.
    SIGUSR1: checkpoint at the next step and go on.
    Of several processes each takes note, and acts once all have agreed, between two steps.
    """

    def __init__(self, several: bool = False) -> None:
        self.several = several
        self.stop = self.stop_asked = False
        self.checkpoint = self.checkpoint_asked = False
        self._asked_at = 0.0

    def __call__(self) -> bool:
        return self.stop

    def agree(self, processes: Processes) -> None:
        """A signal to one process is one to all."""
        if self.several:
            self.stop = processes.any(self.stop_asked)
            self.checkpoint = processes.any(self.checkpoint_asked)

    def done_checkpoint(self) -> None:
        self.checkpoint = self.checkpoint_asked = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        if number == getattr(signal, "SIGUSR1", None):
            self.checkpoint_asked = True
        elif not self.stop_asked:
            self.stop_asked, self._asked_at = True, time.monotonic()
        elif not self.several or time.monotonic() - self._asked_at > FORWARDED:
            os._exit(128 + number)
        if not self.several:
            self.stop, self.checkpoint = self.stop_asked, self.checkpoint_asked


@contextmanager
def stop_on_signals(several: bool = False) -> Iterator[StopFlag]:
    """Install the handlers, and put the former ones back at the end.

    Python delivers signals to the main thread only: in any other thread the flag is never set.
    """
    flag = StopFlag(several)
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    names = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
    former = {name: signal.signal(getattr(signal, name), flag.handle) for name in names}
    try:
        yield flag
    finally:
        for name, handler in former.items():
            signal.signal(getattr(signal, name), handler)
