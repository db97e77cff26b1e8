"""What a running stage holds in its hand: the engine's side of step.Context."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from conf.refusal import NO_VALUE
from pipelines.engine.backends.base import Backend
from pipelines.engine.backends.gang import Gang
from pipelines.engine.backends.outcome import LostMachineError, WorkerDiedError
from pipelines.engine.events import Event, OnEvent
from pipelines.engine.step import Context
from pipelines.engine.store.lease import Lease
from pipelines.engine.store.open import Store
from pipelines.engine.store.work import Shard, Work, as_json, run_shard

WAITING_CALL_SECONDS = 1.0  # between two calls of while_waiting


class CancelledError(BaseException):
    """The run was interrupted; passes through stages' ``except Exception``."""


@dataclass(frozen=True, kw_only=True)
class RunContext(Context):
    """The context of one attempt at one step."""

    step: str
    digest: str
    work: Work
    store: Store
    lease: Lease
    backend: Backend
    on_event: OnEvent
    is_cancelled: Callable[[], bool]
    _labels: set[str] = field(default_factory=set)

    @property
    def scratch(self) -> Path:
        return self.work.scratch

    @property
    def url(self) -> str:
        return self.store.address(self.step, self.digest)

    def map_shards(
        self,
        fn: Callable[[Any, Path], dict[str, Any]],
        payloads: Mapping[str, Any],
        *,
        label: str = "shards",
        cpus: float = 1,
        gpus: float = 0,
        scratch: bool = False,
    ) -> dict[str, dict[str, Any]]:
        """Only shards without a done-marker are computed, and each is kept as soon as it comes back."""
        assert label not in self._labels, f"map_shards was called twice with the label {label!r}"
        self._labels.add(label)
        folder = "scratch" if scratch else "out"
        done = self.work.finished_shards(label, sorted(payloads))
        calls = {
            name: (Shard(work=self.work, label=label, name=name, folder=folder), fn, payload)
            for name, payload in payloads.items()
            if name not in done
        }
        self.progress(label, len(done), len(payloads), "shards")
        results = self.backend.map(run_shard, calls, cpus=cpus, gpus=gpus, poll=self.still_holds, log=self.log)
        with contextlib.closing(results):  # an error here ends the workers now, not when its traceback is forgotten
            for name, result in results:
                done[name] = result
                self.store.keep_shard(self.work, label, name)
                self.progress(label, len(done), len(payloads), "shards")
        return {name: done[name] for name in payloads}

    def call(self, fn: Callable[..., Any], *args: Any, cpus: float = 1, gpus: float = 0) -> Any:
        name = getattr(fn, "__name__", "call")
        results = self.backend.map(fn, {name: args}, cpus=cpus, gpus=gpus, poll=self.still_holds, log=self.log)
        return dict(results)[name]

    def gang(
        self,
        fn: Callable[[dict[str, Any]], Any],
        config: dict[str, Any],
        *,
        workers: int,
        cpus_per_worker: float = 1,
        gpus_per_worker: float = 0,
        backend: str = "gloo",
        max_failures: int = 3,
        while_waiting: Callable[[], None] | None = None,
    ) -> Any:
        """Ranks that die are started again, all together, `max_failures` times; an error of their own is raised at once."""
        last_call = time.monotonic()

        def poll() -> None:
            nonlocal last_call
            self.still_holds()
            if while_waiting is not None and time.monotonic() - last_call >= WAITING_CALL_SECONDS:
                while_waiting()
                last_call = time.monotonic()

        failures = 0
        while True:
            gang = Gang(
                fn=fn,
                config=config,
                workers=workers,
                cpus_per_worker=cpus_per_worker,
                gpus_per_worker=gpus_per_worker,
                torch_backend=backend,
                logs=self._new_logs(),
            )
            try:
                return self.backend.gang(gang, poll=poll, log=self.log, again=failures > 0)
            except LostMachineError:
                raise  # a replacement was waited for already
            except WorkerDiedError as error:
                self.still_holds()
                failures += 1
                if failures > max_failures:
                    raise WorkerDiedError(
                        self.step,
                        NO_VALUE,
                        f"gave up after {failures} attempts. What is finished is kept",
                        f"run the same command again to continue. The last attempt: {error}",
                    ) from error
                self.log(f"{error} Starting all ranks again ({failures} of at most {max_failures} times).")

    def _new_logs(self) -> Path:
        number = 1 + sum(1 for _ in self.work.logs.iterdir())
        folder = self.work.logs / f"gang-{number}"
        folder.mkdir()
        return folder

    def keep(self, relpath: str) -> None:
        self.still_holds()
        self.store.keep(self.work, relpath)

    def progress(self, label: str, done: float, total: float | None, unit: str = "", note: str = "") -> None:
        self._emit("progress", label=label, done=done, total=total, unit=unit, line=note)

    def log(self, line: str) -> None:
        self._emit("said", line=line)

    def still_holds(self) -> None:
        if self.is_cancelled():
            raise CancelledError
        self.lease.check()

    def _emit(self, kind: Literal["progress", "said"], **values: Any) -> None:
        self.on_event(Event(kind=kind, step=self.step, digest=self.digest, **values))


def run_stage(context: RunContext, stage: Any, settings: Any, inputs: Any) -> dict[str, Any]:
    """Call a stage and return its metrics as plain JSON data."""
    return as_json(stage(settings, inputs, context.work.out, context), f"what {context.step} returns (its metrics)")
