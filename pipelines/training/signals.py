"""Leaving at the end of a step when asked to, by a signal or by a file."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from conf.refusal import Refusal

SECONDS_OF_ONE_WISH = 2.0
STOP_FILE = "ATHANOR_STOP_FILE"
"""Environment variable: the file that is there once the ranks are to leave; set by whoever started them."""


class TrainingStopped(Refusal):
    """A signal asked the ranks to leave; a checkpoint holds everything up to the step the message names."""

    exit_code = 143


class Signals:
    """The first SIGTERM or SIGINT, remembered until a step ends; or the file that stands for one."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self.caught_at = 0.0
        self._file = os.environ.get(STOP_FILE)

    @property
    def asks_to_stop(self) -> bool:
        """Whether to leave at the end of this step; looks at the disk where a file may ask."""
        return self.caught is not None or (self._file is not None and os.path.exists(self._file))


@contextmanager
def catch_signals() -> Iterator[Signals]:
    """Turn SIGTERM and SIGINT into a wish to stop; a SIGINT two seconds after the first signal acts as it always did.

    One Ctrl-C arrives several times: from the terminal, and again from a launcher that passes it on.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        # Ray Train runs this in a thread, where no handler can be set; there the driver asks by file.
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def remember(number: int, frame: object) -> None:
        now = time.monotonic()
        if signals.caught is None:
            signals.caught, signals.caught_at = number, now
        elif number == signal.SIGINT and now - signals.caught_at > SECONDS_OF_ONE_WISH:
            raise KeyboardInterrupt

    for number in before:
        signal.signal(number, remember)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
