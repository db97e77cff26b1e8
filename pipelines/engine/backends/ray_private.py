"""Everything of Ray that its documentation does not promise, in one place: a new version of Ray may move any of it.

Each piece is a function, a class or a name here; tests/engine/test_ray_private.py looks each up in the installed Ray and
says which one is gone. What is documented stands where it is used.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    # Workers keep their priority: at Ray's niceness of 15, one busy process beside a rank of two threads starved one of
    # them and made a training step thirty times slower, where sharing fairly costs a factor of two.
    "RAY_worker_niceness": "0",
    # Stay in the driver's working folder, and start none of the actors that feed a dashboard. Each process of Ray's wakes
    # 100 times a second whatever it does, which costs 0.8 % of a core; two ranks of a gang have ten of them beside them.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment variables of Ray's processes, unless the user set them."""

SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable of the driver of a job that was submitted with its code."""

RAY_ITSELF = ("gcs_server", "raylet")
"""Kinds of processes, in Ray's node, that nothing works without."""

CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""The call of a head's gRPC service that every client may make, given a token where one is needed."""

UNPLACED = "WorkerGroupStartupTimeoutError"
"""Class of Ray Train's failure when ranks were not started in time."""

DATASETS_CALLBACK = "DatasetsCallback"
"""Ray Train's callback whose process hands out the blocks of Ray datasets."""
CLEANER_CALLBACK = "PlacementGroupCleanerCallback"
"""Ray Train's callback whose process frees the resources of a driver that died."""

_TOKEN_MODULE = "ray._private.authentication.http_token_authentication"


def address_here() -> str | None:
    """Address of this machine's Ray cluster, as `ray.init(address="auto")` resolves it; None if there is none."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        address = canonicalize_bootstrap_address("auto")
    except ConnectionError:
        return None
    return str(address) if address else None


def token_headers() -> dict[str, str]:
    """Headers with this process's token for Ray, by lower-case name; empty if it has none."""
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    logging.getLogger(_TOKEN_MODULE).setLevel(logging.ERROR)
    return {str(name).lower(): str(value) for name, value in get_auth_headers_if_auth_enabled({}).items()}


def own_node() -> Any:
    """The part of Ray that this process started on this machine; None if it started none."""
    import ray._private.worker

    return ray._private.worker._global_node


def dead_processes(node: Any) -> list[str]:
    """Which of RAY_ITSELF have ended."""
    return [kind for kind, _ in node.dead_processes() if kind in RAY_ITSELF]


def end_node(node: Any) -> None:
    """End what is left of a Ray of this machine. What a raylet has started, or was starting as it died, would look for it
    for up to a minute."""
    raylets = {str(info.process.pid) for kind in node.all_processes for info in node.all_processes[kind]}
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if parent in raylets or f"/{node.session_name}/".encode() in (folder / "cmdline").read_bytes():
                pids.append(int(folder.name))
    node.kill_all_processes(check_alive=False, allow_graceful=False)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def trainer_without(unused: set[str]) -> Any:
    """Ray Train's TorchTrainer without the callbacks of these class names, each of which starts a process."""
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            trainer: Any = super()  # Ray's annotations show the trainer of Train v1, which has no callbacks
            callbacks = trainer._create_default_callbacks()
            return [each for each in callbacks if type(each).__name__ not in unused]

    return Trainer


def joining_after(prepare_rank: Any) -> Any:
    """Ray Train's TorchConfig whose ranks run `prepare_rank` before they join the process group.

    Ray Train's own processes must unpickle this without our packages: they search the working folder first.
    """
    from ray.train.torch import TorchConfig

    base: Any = TorchConfig().backend_cls

    class Joining(base):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(prepare_rank)
            super().on_start(worker_group, backend_config)

    class JoiningConfig(TorchConfig):
        @property
        def backend_cls(self) -> Any:
            return Joining

    return JoiningConfig


def is_unplaced(error: BaseException) -> bool:
    """Whether Ray Train gave up because ranks were not started in time."""
    return type(getattr(error, "controller_failure", None)).__name__ == UNPLACED


def rank_failures(error: BaseException) -> dict[int, Any]:
    """{rank: what it raised} of a gang that failed, each as it was raised or as Ray's wrapping of its death."""
    failures = sorted(getattr(error, "worker_failures", {}).items())
    return {rank: getattr(failure, "_base_exc", failure) for rank, failure in failures}
