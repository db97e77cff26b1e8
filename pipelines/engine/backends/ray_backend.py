"""The only door to Ray: start it or join it, run calls on its workers, run gangs on Ray Train.

Launch and wait, no more. Results are small; bytes travel through the store. A worker reports an
error of the function it ran as a value (``outcome.py``), so that whatever Ray itself raises means one thing: the
worker is gone.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from conf.refusal import NO_VALUE, Refusal
from pipelines.engine.backends import ray_private
from pipelines.engine.backends.base import MAX_RETRIES, Backend, Log, Poll
from pipelines.engine.backends.gang import SAVING_SECONDS, Gang
from pipelines.engine.backends.machines import (
    CapacityWait,
    Claim,
    Resources,
    check_feasible,
    lost_connection,
)
from pipelines.engine.backends.outcome import WorkerDiedError, guarded_call, opened
from pipelines.engine.backends.ray_address import check_address, check_same
from pipelines.engine.backends.ray_health import (
    SILENT_SECONDS,
    Head,
    RayGoneError,
    leave_at_once,
    ray_gone,
)
from pipelines.engine.backends.ray_train import NoPlaceError, fit, pickled_call
from pipelines.engine.backends.search_path import PACKAGES, portable

POLL_SECONDS = 0.2
LOSS_SECONDS = 75.0  # Ray's five health checks of at most 10 s, 3 s apart, and a margin
OBJECT_STORE_BYTES = 128 * 2**20  # results only; Ray's default would claim 30 % of the memory

PASSED_ON = ("WANDB_MODE", "WANDB_DISABLED", "WANDB_BASE_URL")
"""Variables passed from this shell to workers of an existing cluster: tracking mode, no keys."""


class RayBackend(Backend):
    """Workers of a Ray cluster: the one at ``address``, the one this process already belongs to, or a new local one."""

    def __init__(
        self,
        address: str | None = None,
        *,
        cpus: int | None = None,
        gpus: int | None = None,
        packages: tuple[str, ...] = PACKAGES,
        wait_seconds: float = 600,
    ) -> None:
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._cpus, self._gpus, self._packages = cpus, gpus, packages
        self._wait_seconds = wait_seconds  # for lost machines
        self._start = threading.Lock()
        self._started = False
        self._owned = False
        self._head: Head | None = None
        self._gone = ""

    def resources(self) -> Resources:
        if self._address is None and not self._started and self._cpus is not None and self._gpus is not None:
            return Resources(cpus=self._cpus, gpus=self._gpus)
        nodes = [node["Resources"] for node in self._ray().nodes() if node["Alive"]]
        machines = tuple((float(node.get("CPU", 0)), float(node.get("GPU", 0))) for node in nodes)
        return Resources(cpus=sum(c for c, _ in machines), gpus=sum(g for _, g in machines), machines=machines)

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
        """Tasks of Ray, two for every free slot so that no worker waits for this loop; what has not ended is cancelled."""
        ray = self._ray()
        self._check_ray()
        at_once = check_feasible(self.resources(), cpus=cpus, gpus=gpus)
        capacity = self._capacity_wait(Claim(cpus=cpus, gpus=gpus), log)
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=MAX_RETRIES)(portable(guarded_call))
        waiting = [(name, pickled_call(fn, *args)) for name, args in calls.items()][::-1]
        running: dict[Any, str] = {}
        try:
            while waiting or running:
                while waiting and len(running) < 2 * at_once:  # one more each, so that no worker waits for this loop
                    name, call = waiting.pop()
                    running[task.remote(call, sys.path)] = name
                poll()
                self._check_ray()
                capacity.fits_now()
                ready, _ = ray.wait(list(running), timeout=POLL_SECONDS)
                for reference in ready:
                    name = running.pop(reference)
                    yield name, opened(self._answer(reference, name))
        finally:
            for reference in [] if self._gone else running:
                ray.cancel(reference, force=True)

    def _answer(self, reference: Any, name: str) -> bytes:
        ray = self._ray()
        try:
            return bytes(ray.get(reference))
        except ray.exceptions.RayError as error:
            self._check_ray()
            raise WorkerDiedError(
                name,
                NO_VALUE,
                f"its worker process died {MAX_RETRIES + 1} times ({error}). What is finished is kept",
                "give it more memory or fewer workers and run again",
            ) from error

    def expect_gang(self) -> None:
        """Import what `fit` needs: three seconds that would stand before the first rank's start."""
        self._ray()
        threading.Thread(target=importlib.import_module, args=("ray.train.torch",), name="imports Ray Train").start()

    def gang(self, gang: Gang, *, poll: Poll = lambda: None, log: Log = lambda line: None, again: bool = False) -> Any:
        """Run the ranks in one `TorchTrainer`; retried if not placed in time (busy cluster, lost machine)."""
        self._ray()
        self._check_ray()
        claim = Claim(cpus=gang.cpus_per_worker, gpus=gang.gpus_per_worker, copies=gang.workers)
        if not again:
            check_feasible(self.resources(), cpus=claim.cpus, gpus=claim.gpus, copies=claim.copies)
        capacity = self._capacity_wait(claim, log)
        while True:
            while not capacity.fits_now():
                poll()
                self._check_ray()
                time.sleep(POLL_SECONDS)
            machines = self._alive()
            outcome = self._attempt(gang, poll)
            if isinstance(outcome, NoPlaceError):
                continue
            if isinstance(outcome, BaseException):
                if len(machines) > 1 and lost_connection(outcome):
                    self._raise_if_machine_lost(machines, outcome, poll, log)
                raise outcome
            return outcome

    def _attempt(self, gang: Gang, poll: Poll) -> Any:
        """Result of one attempt, run in a second thread while this one polls: Ray Train's fit() blocks, and in the main
        thread it would take over Ctrl-C."""
        outcome: list[Any] = []
        local = self._address is None
        thread = threading.Thread(target=lambda: outcome.append(fit(gang, local)), name="gang", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                poll()
                self._check_ray()
                thread.join(POLL_SECONDS)
        except RayGoneError:
            raise  # nobody is left to ask the ranks, or to tell when they have saved
        except BaseException:
            gang.stop()
            thread.join(SAVING_SECONDS + POLL_SECONDS)
            raise
        self._check_ray()
        if not outcome:
            raise WorkerDiedError("the ranks", NO_VALUE, "ended without a result")
        return outcome[0]

    def _alive(self) -> set[str]:
        return {str(node["NodeID"]) for node in self._ray().nodes() if node["Alive"]}

    def _raise_if_machine_lost(self, machines: set[str], error: BaseException, poll: Poll, log: Log) -> None:
        """Raise WorkerDiedError if a machine is lost: its peers' connections break at once, and Ray itself notices after
        five failed health checks."""
        log(
            f"a rank lost its connection to another; Ray has {LOSS_SECONDS:.0f} s to find out whether a machine is lost."
        )
        deadline = time.monotonic() + LOSS_SECONDS
        while time.monotonic() < deadline:
            poll()
            self._check_ray()
            if (self._head is None or self._head.connects()) and machines - self._alive():
                first = str(error).partition("\n")[0]
                raise WorkerDiedError("the ranks", NO_VALUE, f"a machine went away under them ({first})") from error
            time.sleep(1)

    def _capacity_wait(self, claim: Claim, log: Log) -> CapacityWait:
        known = self.resources()

        def look() -> Resources:
            """The last known resources while the head is unreachable: Ray would wait longer than we do (`_check_ray`)."""
            nonlocal known
            if self._head is None or self._head.connects():
                known = self.resources()
            return known

        return CapacityWait(claim, look, wait_seconds=self._wait_seconds, log=log)

    def close(self) -> None:
        with self._start:
            if self._owned and not self._gone:
                import ray

                ray.shutdown()
            self._started = self._owned = False

    def _check_ray(self) -> None:
        """Raise RayGoneError if Ray itself, and not one of its workers, has ended: left alone it would end this process
        after a minute, without a word that helps."""
        if self._gone:
            raise ray_gone(self._gone)
        node = ray_private.own_node()
        if self._owned and self._address is None and node is not None:
            if dead := ray_private.dead_processes(node):
                self._gone = f"its {' and '.join(dead)} ended"
                ray_private.end_node(node)
        elif self._head is not None and not self._head.answers():
            self._gone = f"its head at {self._head.address} has not answered for {SILENT_SECONDS:.0f} s"
        if self._gone:
            atexit.register(leave_at_once)
            raise ray_gone(self._gone)

    def _ray(self) -> Any:
        """The ray module, started."""
        with self._start:
            for name, value in ray_private.ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            import ray

            if not self._started:
                if self._address is not None:
                    check_address(self._address)
                if not ray.is_initialized():
                    _in_lasting_thread(self._connect)
                    _take_back_sigterm()
                    self._owned = True
                elif self._address is not None:
                    check_same(self._address, ray.get_runtime_context().gcs_address)
                if self._address is not None:
                    self._head = Head(ray.get_runtime_context().gcs_address)
                self._started = True
            return ray

    def _connect(self) -> None:
        import ray

        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": "athanor"}
        if self._address is None:
            # A local Ray listens on the machine's address whatever one asks for, so Ray guards it with a token, kept in
            # ~/.ray unless the user chose otherwise. Without a home to keep it in, it travels in the environment.
            try:
                Path.home().joinpath(".ray").mkdir(exist_ok=True)
            except (OSError, RuntimeError):  # the latter where a user has none
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            ray.init(
                address="local",
                num_cpus=self._cpus,
                num_gpus=self._gpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
            return
        ray.init(address=self._address, runtime_env=self._runtime_env(), **quiet)

    def _runtime_env(self) -> dict[str, Any]:
        """This package, for the workers of a cluster that may not have it, or have an older one."""
        if ray_private.SUBMITTED_JOB in os.environ:  # a job submitted with its code already
            return {}
        specs = [importlib.util.find_spec(name) for name in self._packages]
        folders = [str(Path(spec.origin).parent) for spec in specs if spec is not None and spec.origin]
        passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        return {"py_modules": folders, "env_vars": {**ray_private.ENVIRONMENT, **passed}}


def _in_lasting_thread(connect: Callable[[], None]) -> None:
    """Run ``connect`` in a thread that lives as long as the process.

    Linux ends the processes of a local Ray when the *thread* that started them ends (they ask for it, to share the
    driver's fate): started from a step's thread, Ray would die with the step.
    """
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            connect()
        except BaseException as error:
            errors.append(error)
        done.set()
        threading.Event().wait()

    threading.Thread(target=run, name="keeps Ray", daemon=True).start()
    if not done.wait(90):
        raise Refusal(
            "compute.backend",
            "ray",
            "Ray did not start in 90 s",
            "look in /tmp/ray/session_latest/logs, or use compute.backend=local",
        )
    if errors:
        error = errors[0]
        if isinstance(error, Refusal):
            raise error
        raise Refusal(
            "compute.backend",
            "ray",
            f"Ray could not be started or joined: {error}",
            "try again, or do without Ray on this machine alone: compute.backend=local",
        ) from error


def _take_back_sigterm() -> None:
    """Let SIGTERM do again what this process had it do: Ray put a handler in its place that prints a stack and ends."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
