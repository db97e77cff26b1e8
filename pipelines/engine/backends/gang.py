"""Several ranks of one program at once: what each rank's process does, whatever starts it."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.engine.backends.machines import forget_launchers
from pipelines.engine.backends.outcome import failed, guarded


@dataclass(frozen=True, kw_only=True)
class Gang:
    """What to run and with what: ``fn(config)`` in ``workers`` processes."""

    fn: Callable[[dict[str, Any]], Any]
    config: dict[str, Any]
    workers: int
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    torch_backend: str = "gloo"
    logs: Path
    """Folder where each rank's output goes to rank-N.log; when it is gone, the ranks end."""

    def stop(self) -> None:
        """Ask the ranks, wherever they are, to save and leave; after SAVING_SECONDS they end as they are."""
        (self.logs / STOP).touch()


STOP = "stop"
STOP_FILE = "ATHANOR_STOP_FILE"
"""Environment variable of a rank: the file that is there once the ranks are to leave."""
GRACE_SECONDS = 2.0
SAVING_SECONDS = 20.0


def run_rank(gang: Gang) -> bytes:
    """In a rank's process, with RANK and the rest set: run, with output in the rank's log; the outcome, pickled."""
    forget_launchers()
    rank = os.environ["RANK"]
    if gang.logs.is_dir():
        _send_output_to(gang.logs / f"rank-{rank}.log")
        os.environ[STOP_FILE] = str(gang.logs / STOP)
        _end_with(gang.logs)
    outcome = guarded(_run, gang)
    if gang.workers > 1 and failed(outcome):
        # A rank whose peer was killed fails with a network error, often before anyone noticed the kill, which is the
        # cause and can be retried. Let it be noticed first.
        time.sleep(GRACE_SECONDS)
    return outcome


def _run(gang: Gang) -> Any:
    result = gang.fn(gang.config)
    return result if os.environ["RANK"] == "0" else None


def _send_output_to(log: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  (the process's own streams from here on)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def _end_with(logs: Path, every_seconds: float = 1.0) -> None:
    """End this process when the work folder goes, or some time after it was asked to leave.

    The work folder moves when another process takes the step over; ranks of the former owner must not go on training
    in a place that is not theirs any more, whether or not anyone could tell them.
    """

    def watch() -> None:
        stop_requested_at: float | None = None
        while logs.is_dir() and (stop_requested_at is None or time.monotonic() - stop_requested_at < SAVING_SECONDS):
            time.sleep(every_seconds)
            if stop_requested_at is None and (logs / STOP).exists():
                stop_requested_at = time.monotonic()
        os._exit(1)

    threading.Thread(target=watch, name="ends with the work folder", daemon=True).start()
