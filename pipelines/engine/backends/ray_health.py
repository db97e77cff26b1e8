"""Whether Ray itself is still there, and how to leave where it is not.

Without its GCS a driver hears nothing for a minute and is then ended by Ray's own threads, without a word that helps.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time

from conf.refusal import Refusal
from pipelines.engine.backends.outcome import LOST_MACHINE

SILENT_SECONDS = 30.0  # of a cluster's head, until it counts as gone


class RayGoneError(Refusal):
    """Ray ended under this process, which has to end too and can be started again."""

    exit_code = LOST_MACHINE


def ray_gone(how: str) -> RayGoneError:
    """What to raise once Ray itself went away; ``how``: which part of it ended."""
    return RayGoneError(
        "compute.backend",
        "ray",
        f"Ray itself went away ({how}). What is finished is kept",
        "run the same command again to continue",
    )


class Head:
    """The head of a cluster that others run, asked now and then whether it is there."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._checked_at = self._answered_at = time.monotonic()
        self._lock = threading.Lock()

    def answers(self) -> bool:
        """False once it has not answered for SILENT_SECONDS: heads may be started again, and Ray waits a minute for them."""
        with self._lock:
            now = time.monotonic()
            if now - self._checked_at > SILENT_SECONDS:  # nobody has called this for so long
                self._answered_at = now
            if now - self._checked_at > 2:
                self._checked_at = now
                if self.connects():
                    self._answered_at = now
            return now - self._answered_at < SILENT_SECONDS

    def connects(self) -> bool:
        """Whether it takes a connection now."""
        host, _, port = self.address.rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=1):
            return True
        return False


def leave_at_once() -> None:
    """End as after any error: Ray's own threads, waiting for what is gone, would crash the interpreter on its way out."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(RayGoneError.exit_code)
