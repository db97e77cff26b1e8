"""What came of a function that ran in another process: its result, its error, or its death."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conf.refusal import NO_VALUE, Refusal

LOG_TAIL_BYTES = 2000
LOST_MACHINE = 75
"""Exit code of a run that lost a machine, or Ray itself, and can go on elsewhere or later (sysexits' EX_TEMPFAIL). A
scheduler may requeue such a job; any other code but 0 needs a person."""


class WorkerDiedError(Refusal):
    """A worker process ended without a word: killed, out of memory, or its machine went away."""


class LostMachineError(WorkerDiedError):
    """A machine was lost and not replaced in time."""

    exit_code = LOST_MACHINE


def guarded(fn: Callable[..., Any], *args: Any) -> bytes:
    """Run ``fn(*args)`` and pickle what came of it, so that every backend treats errors alike."""
    try:
        outcome: tuple[str, Any] = ("result", fn(*args))
    except Exception as error:
        outcome = ("error", _portable(error))
    return pickle.dumps(outcome)


def guarded_call(call: bytes, search_path: list[str]) -> bytes:
    """``guarded`` for a ``portable_call`` whose function may live in a folder that only its sender had in its path."""
    sys.path += [folder for folder in search_path if folder not in sys.path]
    return guarded(_unpacked, call)


def _unpacked(call: bytes) -> Any:
    gc.disable()  # what imports make stays: looking for garbage among it takes a fifth of their time
    try:
        fn, args = pickle.loads(call)
        gc.freeze()
    finally:
        gc.enable()
    return fn(*args)


def opened(outcome: bytes) -> Any:
    """The result in an outcome; raises the error in it, a user's error as itself, a bug with the worker's traceback."""
    kind, value = pickle.loads(outcome)
    if kind == "error":
        raise value
    return value


def failed(outcome: bytes) -> bool:
    """Whether an outcome is an error that its user could not have made: one without ``exit_code``."""
    kind, value = pickle.loads(outcome)
    return kind == "error" and not hasattr(value, "exit_code")


def _portable(error: Exception) -> Exception:
    """The error in a form that survives pickling and says where it came from."""
    where = "".join(traceback.format_exception(error))
    if not hasattr(error, "exit_code"):
        error.add_note(f"in a worker process:\n{where}")
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # whatever a foreign exception class does when pickled, its text must arrive
        pass
    return RuntimeError(f"{type(error).__name__}: {error}\nin a worker process:\n{where}")


def portable_call(fn: Callable[..., Any], args: tuple[Any, ...], dumps: Callable[[Any], bytes] = pickle.dumps) -> bytes:
    """``(fn, args)`` pickled; Refusal if that is impossible."""
    try:
        return dumps((fn, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise Refusal(
            str(getattr(fn, "__qualname__", fn)),
            NO_VALUE,
            f"cannot be sent to a worker process ({error})",
            "use a function at the top level of a module, and plain data, paths or dataclasses as its arguments",
        ) from error


def describe_exit(exit_code: int | None) -> str:
    """How a process ended, in words."""
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"exited with code {exit_code}"


def log_tail(path: Path) -> str:
    """The end of a worker's log, for the remedy of a refusal; empty if it wrote nothing."""
    try:
        with open(path, "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            text = log.read().decode(errors="replace").strip()
    except OSError:
        return ""
    return f"see the end of {path}:\n{text}" if text else ""
