"""Progress lines for long waits (what for, until when) and long work (how far).

    with waiting("http://127.0.0.1:9000 to answer", 60):      # after 10 s: one line on stderr
        ...

    with working("corpus: its files are listed") as how_far:   # every 10 s
        for number, file in enumerate(files):
            how_far(f"{number:,} so far")

The caller ends a wait; this only logs.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

LOG_AFTER_SECONDS = 10.0


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


tell: Callable[[str], None] = _to_stderr
"""Destination of the lines; a live display of rich redirects stderr, so they appear above its bars."""


@contextlib.contextmanager
def waiting(what: str, seconds: float) -> Iterator[None]:
    """Log after ten seconds that this waits for ``what``, and gives up after ``seconds`` in all."""
    timer = threading.Timer(
        LOG_AFTER_SECONDS, lambda: tell(f"waiting for {what}; this gives up after {seconds:.0f} s in all")
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Log every ten seconds that ``what`` is in progress, and how far: yields a function that takes the latter.

    A thread of its own logs, so that a block which hangs in one call (on a disk that does not answer) is logged too.
    """
    over, newest, began = threading.Event(), [""], time.monotonic()

    def how_far(text: str) -> None:
        newest[0] = f", {text}"

    def remind() -> None:
        while not over.wait(LOG_AFTER_SECONDS):
            tell(f"{what}{newest[0]} ({time.monotonic() - began:.0f} s)")

    thread = threading.Thread(target=remind, name="working", daemon=True)
    thread.start()
    try:
        yield how_far
    finally:
        over.set()
        thread.join()
