"""The files that a call passes through, traced while it runs."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Walk:
    """From a file to the first function called below it in another file, or in a folder of files."""

    start: str
    goal: str
    through: str = ""
    """A file that lies between, if the first such call is not meant."""


def walks(run: Callable[[], Any], wanted: list[Walk]) -> list[list[str]]:
    """Files of ours that each walk passes through while `run` runs, each once, outermost first, both ends included. A call
    in another thread lies below the call that started the thread."""
    found: dict[Walk, list[str]] = {}
    started_by: dict[int, tuple[FrameType, int]] = {}
    real_start = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        caller, body = (sys._getframe(1), threading.get_ident()), thread.run

        def run_thread() -> None:
            started_by[threading.get_ident()] = caller
            body()

        thread.run = run_thread  # type: ignore[method-assign]
        real_start(thread)

    def stack(frame: FrameType | None) -> Iterator[str]:
        thread: int = threading.get_ident()
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests") and ".venv" not in path.parts:
                yield path.relative_to(ROOT).as_posix()
            frame = frame.f_back
            if frame is None and thread in started_by:
                frame, thread = started_by[thread]

    def hook(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        is_function = code.co_flags & inspect.CO_OPTIMIZED  # not the body of a module or class, which an import runs
        for walk in wanted if event == "call" and is_function else ():
            if walk not in found and code.co_filename.startswith(str(ROOT / walk.goal)):
                files = list(dict.fromkeys(stack(frame)))
                if walk.start in files and (not walk.through or walk.through in files):
                    found[walk] = files[files.index(walk.start) :: -1]

    threading.Thread.start = start  # type: ignore[method-assign]
    threading.setprofile(hook)
    sys.setprofile(hook)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        threading.Thread.start = real_start  # type: ignore[method-assign]
    return [found[walk] for walk in wanted]
