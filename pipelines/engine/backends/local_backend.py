"""The twin of the Ray backend that needs nothing but Python: worker processes of this machine, or this very process.

Used in tests, under a debugger (``in_process=True``) and wherever no Ray can be installed.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import queue
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from conf.refusal import NO_VALUE
from pipelines.engine.backends.base import MAX_RETRIES, Backend, Log, Poll
from pipelines.engine.backends.gang import SAVING_SECONDS, Gang, run_rank
from pipelines.engine.backends.machines import Resources, check_feasible
from pipelines.engine.backends.outcome import (
    WorkerDiedError,
    describe_exit,
    guarded_call,
    log_tail,
    opened,
    portable_call,
)

SPAWN = multiprocessing.get_context("spawn")  # a fork of a process that computes may hang
FORKS = multiprocessing.get_context("forkserver")
POLL_SECONDS = 0.2
LEAVING_SECONDS = 3.0
"""Timeout of workers that leave by themselves, which takes milliseconds."""


@dataclass(frozen=True, kw_only=True)
class Preload:
    """What ranks and later workers import, imported once by a process that does nothing else and of which they are forks.

    modules: by name, looked for in the working folder too, so none of ours, which have names of many. environment: while
    they are imported. begin: called in each fork when its environment is set, for what these modules read of it when they
    were imported.
    """

    modules: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    begin: Callable[[], None] = lambda: None


class LocalBackend(Backend):
    """Worker processes on this machine; ``in_process`` runs everything but gangs of several ranks in the caller.

    A worker that has answered waits for the next step's calls, as Ray's do: most of a small call is what its process
    imports. Ranks get new processes, which nothing has touched, and the memory of those that wait.
    """

    def __init__(
        self,
        *,
        cpus: int | None = None,
        gpus: int | None = None,
        in_process: bool = False,
        preload: Preload | None = None,
    ) -> None:
        self._resources = Resources(
            cpus=cpus if cpus is not None else len(os.sched_getaffinity(0)),
            gpus=gpus if gpus is not None else len(glob.glob("/dev/nvidia[0-9]*")),
        )
        self._in_process = in_process
        self._preload = preload
        self._forks = False
        # Steps run in threads of this process, and libraries import lazily: one at a time.
        self._turn = threading.Lock()
        self._idle: list[_Worker] = []
        weakref.finalize(self, _let_go, self._idle)

    def resources(self) -> Resources:
        return self._resources

    def map(
        self,
        fn: Callable[..., Any],
        calls: Mapping[str, tuple[Any, ...]],
        *,
        cpus: float = 1,
        gpus: float = 0,
        poll: Poll = lambda: None,
        log: Log = lambda line: None,
    ) -> Generator[tuple[str, Any], None, None]:
        """Worker processes of this machine, as many as its cores allow; in one process the calls take turns."""
        at_once = check_feasible(self._resources, cpus=cpus, gpus=gpus)
        if self._in_process:
            for name, args in calls.items():
                poll()
                with self._turn:
                    result = fn(*args)
                yield name, result
            return
        waiting = {name: portable_call(fn, args) for name, args in calls.items()}
        workers = [self._worker(cpus) for _ in range(min(at_once, len(waiting)))]
        running: dict[_Worker, str] = {}
        try:
            yield from _distribute(waiting, workers, running, cpus, poll)
        finally:
            _end_each(list(running))
            self._idle += [worker for worker in workers if worker not in running]

    def expect_gang(self) -> None:
        """Start the process that has imported what ranks need; it does so beside the steps before them.

        There is one in a program, for all its backends, and it ends with the program.
        """
        if self._preload is None or self._in_process:
            return
        if self._preload.modules:
            FORKS.set_forkserver_preload(list(self._preload.modules))
        with _environment(dict(self._preload.environment)):
            multiprocessing.forkserver.ensure_running()
        self._forks = True

    def gang(self, gang: Gang, *, poll: Poll = lambda: None, log: Log = lambda line: None, again: bool = False) -> Any:
        """One process for each rank, joined by torch.distributed on loopback; a lone rank may run in this process."""
        check_feasible(self._resources, cpus=gang.cpus_per_worker, gpus=gang.gpus_per_worker, copies=gang.workers)
        if self._in_process and gang.workers == 1:
            return _run_in_thread(gang, poll)
        call = portable_call(run_rank, (gang,))
        _let_go(self._idle)
        port = _free_port()
        ranks = [
            self._new_worker(_environment_of(gang.cpus_per_worker) | _rank_environment(rank, port, gang))
            for rank in range(gang.workers)
        ]
        try:
            for rank in ranks:
                rank.send(call)
            return _first_result(ranks, gang, poll)
        finally:
            for rank in ranks:
                rank.end()

    def close(self) -> None:
        """End the workers that wait."""
        _let_go(self._idle)

    def _worker(self, threads: float) -> _Worker:
        """One that waits and was started as a new one would be, else a new one."""
        environment = _environment_of(threads)
        while self._idle:
            worker = self._idle.pop()
            if worker.environment == environment and worker.process.is_alive():
                return worker
            _let_go([worker])
        return self._new_worker(environment)

    def _new_worker(self, environment: dict[str, str]) -> _Worker:
        return _Worker(environment, self._preload if self._forks else None)


def _run_in_thread(gang: Gang, poll: Poll) -> Any:
    """One rank in a thread of this process, while the caller polls; raising from ``poll`` leaves the thread alone."""
    outcomes: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def body() -> None:
        try:
            outcomes.put((gang.fn(gang.config), None))
        except BaseException as error:
            outcomes.put((None, error))

    with _environment(_rank_environment(0, _free_port(), gang)):
        threading.Thread(target=body, name="rank 0", daemon=True).start()
        while True:
            poll()
            with contextlib.suppress(queue.Empty):
                result, error = outcomes.get(timeout=POLL_SECONDS)
                if error is not None:
                    raise error
                return result


class _Worker:
    """A process that runs calls sent to it, and never outlives this one; with `preload` a fork of the one that has it."""

    def __init__(self, environment: dict[str, str], preload: Preload | None = None) -> None:
        context = SPAWN if preload is None else FORKS
        self.pipe, child_pipe = context.Pipe()
        self.environment = environment
        self.preload = preload
        begin = None if preload is None else preload.begin
        self.process = context.Process(
            target=_serve, args=(child_pipe, environment, begin)
        )  # not daemonic: it may have children
        self.process.start()
        _alive.add(self)
        child_pipe.close()

    def send(self, call: bytes) -> None:
        with contextlib.suppress(OSError):  # it died: its sentinel tells
            self.pipe.send_bytes(call)

    def outcome(self) -> bytes | None:
        """What it answered; None if it died instead."""
        try:
            return self.pipe.recv_bytes()
        except (EOFError, OSError):
            return None

    def end(self) -> None:
        """Kill it and take its remains away."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        _alive.discard(self)


def _environment_of(threads: float) -> dict[str, str]:
    """A worker's: ours, and the threads it may take, as Ray sets them, unless the user said otherwise."""
    return {"OMP_NUM_THREADS": str(max(1, int(threads))), **os.environ}


_alive: set[_Worker] = set()


@atexit.register
def _end_all() -> None:
    """At exit multiprocessing would wait for every process that is left."""
    _end_each(list(_alive))


def _end_each(workers: list[_Worker]) -> None:
    """Take workers out of a list and end them."""
    while workers:
        workers.pop().end()


def _let_go(workers: list[_Worker]) -> None:
    """Take workers that wait for a call out of a list and let them leave; those that do not in time are killed.

    One that is killed releases nothing: of the semaphore in tqdm's lock Python then warns as leaked.
    """
    leaving = list(workers)
    workers.clear()
    for worker in leaving:
        worker.pipe.close()
    deadline = time.monotonic() + LEAVING_SECONDS
    for worker in leaving:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        worker.end()


def _serve(pipe: Connection, environment: dict[str, str], begin: Callable[[], None] | None) -> None:
    """A worker's life: run calls until the pipe closes or the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what ends
    os.environ.clear()  # a fork has that of the time when its server started
    os.environ.update(environment)
    if begin is not None:
        begin()
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            # Finalizers, which release named semaphores, and no more: Python's own end takes a second with torch in it.
            multiprocessing.util._exit_function()  # type: ignore[attr-defined]
            os._exit(0)
        pipe.send_bytes(guarded_call(call, []))  # spawning has brought the search path along


def _distribute(
    waiting: dict[str, bytes], workers: list[_Worker], running: dict[_Worker, str], threads: float, poll: Poll
) -> Iterator[tuple[str, Any]]:
    """Give calls to idle workers, noted in `running`, and yield results as they come; a call whose worker died is tried
    again."""
    deaths: dict[str, int] = {}
    calls = dict(waiting)
    while waiting or running:
        for worker in workers:
            if waiting and worker not in running:
                running[worker] = next(iter(waiting))
                worker.send(waiting.pop(running[worker]))
        poll()
        ready = set(wait([worker.pipe for worker in running], timeout=POLL_SECONDS))
        for worker in [worker for worker in running if worker.pipe in ready]:
            name, outcome = running.pop(worker), worker.outcome()
            if outcome is not None:
                yield name, opened(outcome)
                continue
            worker.end()
            deaths[name] = deaths.get(name, 0) + 1
            if deaths[name] > MAX_RETRIES:
                how = describe_exit(worker.process.exitcode)
                raise WorkerDiedError(
                    name,
                    NO_VALUE,
                    f"its worker process {how}, {deaths[name]} times. What is finished is kept",
                    "give it more memory or fewer workers and run again",
                )
            waiting[name] = calls[name]
            workers[workers.index(worker)] = _Worker(_environment_of(threads), worker.preload)


def _first_result(ranks: list[_Worker], gang: Gang, poll: Poll) -> Any:
    """Rank 0's result once every rank has returned. Raises a rank's error, or WorkerDiedError if one was killed."""
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        try:
            poll()
        except BaseException:
            gang.stop()
            _wait_for_all(ranks)
            raise
        pending = {rank.pipe: number for number, rank in enumerate(ranks) if number not in results}
        for pipe in wait(list(pending), timeout=POLL_SECONDS):
            number = pending[pipe]  # type: ignore[index]
            outcome = ranks[number].outcome()
            if outcome is None:
                ranks[number].process.join()
                how = describe_exit(ranks[number].process.exitcode)
                raise WorkerDiedError(f"rank {number}", NO_VALUE, how, log_tail(gang.logs / f"rank-{number}.log"))
            results[number] = opened(opened(outcome))
    return results[0]


def _wait_for_all(ranks: list[_Worker]) -> None:
    """Until every rank has answered or ended, or the time to save is over."""
    waiting, deadline = {rank.pipe for rank in ranks}, time.monotonic() + SAVING_SECONDS
    while waiting and time.monotonic() < deadline:
        waiting -= set(wait(list(waiting), timeout=POLL_SECONDS))


def _rank_environment(rank: int, port: int, gang: Gang) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(gang.workers),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(gang.workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
