"""The files that a call passes through, seen from a function that it ends in while the program runs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


class Walks:
    """Stacks of our files below which given functions were first called, each file once, outermost first.

    walks = Walks(monkeypatch); walks.note(module, "function", start="pipelines/__main__.py"); …; walks.found["function"]
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: dict[str, list[str]] = {}
        self._monkeypatch = monkeypatch
        self._started_by: dict[int, tuple[FrameType, int]] = {}
        real_start, started_by = threading.Thread.start, self._started_by

        def start(thread: threading.Thread) -> None:
            caller, body = (sys._getframe(1), threading.get_ident()), thread.run

            def run_thread() -> None:
                started_by[threading.get_ident()] = caller
                body()

            thread.run = run_thread  # type: ignore[method-assign]
            real_start(thread)

        monkeypatch.setattr(threading.Thread, "start", start)

    def note(self, owner: Any, name: str, *, start: str, through: str = "") -> None:
        """Look at the stack when `owner.name` is first called below the file `start` (and below the file `through`)."""
        real: Callable[..., Any] = getattr(owner, name)
        last = Path(real.__code__.co_filename).relative_to(ROOT).as_posix()

        def noted(*args: Any, **kwargs: Any) -> Any:
            if name not in self.found:
                files = list(dict.fromkeys([last, *self._files(sys._getframe(1))]))
                if start in files and (not through or through in files):
                    self.found[name] = files[files.index(start) :: -1]
            return real(*args, **kwargs)

        self._monkeypatch.setattr(owner, name, noted)

    def _files(self, frame: FrameType | None) -> Iterator[str]:
        """Our files from a frame outwards; the frames of a thread lie inside those of the call that started it."""
        thread = threading.get_ident()
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests") and ".venv" not in path.parts:
                yield path.relative_to(ROOT).as_posix()
            frame = frame.f_back
            if frame is None and thread in self._started_by:
                frame, thread = self._started_by[thread]
