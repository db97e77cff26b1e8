"""Nothing waits in silence: a wait that lasts says what it is for and when it ends, work that lasts how far it is.

    with waiting("http://127.0.0.1:9000 to answer", 60):      # after 10 s: one line on stderr
        ...

    with working("corpus: its files are listed") as how_far:   # every 10 s
        for number, file in enumerate(files):
            how_far(f"{number:,} so far")

Ending a wait is the waiter's own work; this only tells.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

SAY_AFTER_SECONDS = 10.0


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


tell: Callable[[str], None] = _to_stderr
"""Where lines about waits go; a live display of rich redirects stderr, so they stand above its bars."""


@contextlib.contextmanager
def waiting(what: str, seconds: float) -> Iterator[None]:
    """Say after ten seconds that this waits for ``what``, and that it gives up after ``seconds`` in all."""
    told = threading.Timer(
        SAY_AFTER_SECONDS, lambda: tell(f"waiting for {what}; this gives up after {seconds:.0f} s in all")
    )
    told.daemon = True
    told.start()
    try:
        yield
    finally:
        told.cancel()


@contextlib.contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Say every ten seconds that this goes on, and how far it is: yields a function that takes that.

    Told by a thread of its own, so that a block which hangs in one call (on a disk that does not answer) is told of too.
    """
    over, newest, began = threading.Event(), [""], time.monotonic()

    def how_far(text: str) -> None:
        newest[0] = f", {text}"

    def remind() -> None:
        while not over.wait(SAY_AFTER_SECONDS):
            tell(f"{what}{newest[0]} ({time.monotonic() - began:.0f} s)")

    thread = threading.Thread(target=remind, name="working", daemon=True)
    thread.start()
    try:
        yield how_far
    finally:
        over.set()
        thread.join()
