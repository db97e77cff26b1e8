"""What the runner asks of a backend, whoever runs the work."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any, Protocol

from pipelines.engine.backends.gang import Gang
from pipelines.engine.backends.machines import Resources

Poll = Callable[[], None]
"""Called several times a second while a backend waits; raising from it ends what runs and what waits."""
Log = Callable[[str], None]
"""Logs a line about what a backend waits for."""

MAX_RETRIES = 3  # of a call whose worker died


class Backend(Protocol):
    """Where steps' work runs."""

    def resources(self) -> Resources:
        """Everything there is; starts the backend if that is needed to know."""
        ...

    def map(
        self,
        fn: Callable[..., Any],
        calls: Mapping[str, tuple[Any, ...]],
        *,
        cpus: float = 1,
        gpus: float = 0,
        poll: Poll = ...,
        log: Log = ...,
    ) -> Generator[tuple[str, Any], None, None]:
        """Run ``fn(*args)`` for each call in worker processes; (name, result) in the order they finish.

        A call whose worker dies is tried again, at most MAX_RETRIES times; then WorkerDiedError. Waits are
        logged.
        """
        ...

    def expect_gang(self) -> None:
        """Ranks will be asked for: prepare what can be prepared beside the steps before them."""
        ...

    def gang(self, gang: Gang, *, poll: Poll = ..., log: Log = ..., again: bool = False) -> Any:
        """Run all ranks once and return rank 0's result. Raises a rank's error; WorkerDiedError if one was killed.

        again: after a worker's death, possibly with its machine; then missing machines are waited for.
        """
        ...

    def close(self) -> None:
        """End every process this backend started."""
        ...
