"""Nothing waits in silence: a wait that lasts says what it is for and when it ends.

    with waiting("http://127.0.0.1:9000 to answer", 60):      # after 10 s: one line on stderr
        ...

Ending it is the waiter's own work; this only tells.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

SAY_AFTER_SECONDS = 10.0


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


tell: Callable[[str], None] = _to_stderr
"""Where lines about waits go; a live display takes it over while it is up."""


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
