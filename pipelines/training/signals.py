"""Leaving at the end of a step when asked to."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Signals:
    """The first SIGTERM or SIGINT, remembered until a step ends."""

    def __init__(self) -> None:
        self.caught: int | None = None


@contextmanager
def catch_signals() -> Iterator[Signals]:
    """Turn the first SIGTERM or SIGINT into a wish to stop; a second one acts as it always did."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        # Ray Train runs this in a thread, where no handler can be set; there the driver ends the ranks.
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def remember(number: int, frame: object) -> None:
        signals.caught = number
        for known, handler in before.items():
            signal.signal(known, handler)

    for number in before:
        signal.signal(number, remember)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
