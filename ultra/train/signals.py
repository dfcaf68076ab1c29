"""Stopping on a signal: finish the step, checkpoint, exit 75."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again to go on


class StopFlag:
    """What the signals asked for; polled by the loop, by evaluation and by data preparation.

    SIGTERM and SIGINT: checkpoint and stop; a second one exits at once with 128 + its number.
    SIGUSR1: checkpoint at the next step and go on.
    """

    def __init__(self) -> None:
        self.stop = False
        self.checkpoint = False

    def __call__(self) -> bool:
        return self.stop

    def handle(self, number: int, frame: FrameType | None) -> None:
        if number == getattr(signal, "SIGUSR1", None):
            self.checkpoint = True
        elif self.stop:
            os._exit(128 + number)
        else:
            self.stop = True


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Install the handlers, and put the former ones back at the end.

    Python delivers signals to the main thread only: in any other thread the flag is never set.
    """
    flag = StopFlag()
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
