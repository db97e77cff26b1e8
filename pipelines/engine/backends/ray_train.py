"""One attempt of a gang under Ray Train: rank 0's result, or the error that a rank itself raised."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable
from typing import Any

from conf.refusal import NO_VALUE
from pipelines.engine.backends import ray_private
from pipelines.engine.backends.gang import Gang, run_rank
from pipelines.engine.backends.machines import forget_launchers, interface_with
from pipelines.engine.backends.outcome import WorkerDiedError, guarded_call, log_tail, opened, portable_call
from pipelines.engine.backends.search_path import portable


def pickled_call(fn: Callable[..., Any], *args: Any) -> bytes:
    """As ``portable_call``; cloudpickle also takes along functions of a program's main module."""
    import ray.cloudpickle

    return portable_call(fn, args, dumps=ray.cloudpickle.dumps)


class NoPlaceError(Exception):
    """Ranks were not started in time: the machines are busy, or one is lost."""


def _ray_rank(config: dict[str, Any]) -> Any:
    """What Ray Train runs in each rank. Raising is what makes it end the other ranks.

    The error carries the rank's outcome as an attribute: what prints it shows a sentence, and processes of Ray Train that
    have nothing of ours can read it.
    """
    outcome = guarded_call(config["call"], config["search_path"])
    try:
        outcome = opened(outcome)
        opened(outcome)
    except Exception as error:
        failure: Any = RuntimeError(f"a rank ended with {type(error).__name__}: {error}")
        failure.athanor_outcome = outcome
        raise failure from None
    return outcome


def _prepare_rank() -> None:
    """In each rank, before it joins the process group: use the interface of Ray's node address, whatever the hostname
    resolves to (on Debian 127.0.1.1, unreachable from other machines), and no other launcher's variables."""
    import ray

    forget_launchers()
    interface = interface_with(ray.util.get_node_ip_address())
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def fit(gang: Gang, local: bool) -> Any:
    """One attempt under Ray Train: rank 0's result, or the error to raise."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    # Two processes less, whose imports would compete with the ranks' for the same few cores: there are no Ray datasets, and
    # a local Ray ends with its driver.
    unused = {ray_private.DATASETS_CALLBACK} | ({ray_private.CLEANER_CALLBACK} if local else set())
    torch_config = ray_private.joining_after(portable(_prepare_rank))
    resources = {"CPU": gang.cpus_per_worker}
    if gang.gpus_per_worker:
        resources["GPU"] = gang.gpus_per_worker
    trainer = ray_private.trainer_without(unused)(
        portable(_ray_rank),
        train_loop_config={"call": pickled_call(run_rank, gang), "search_path": sys.path},
        torch_config=torch_config(backend=gang.torch_backend),
        scaling_config=ScalingConfig(
            num_workers=gang.workers, use_gpu=gang.gpus_per_worker > 0, resources_per_worker=resources
        ),
        # No retries in here: Ray Train would retry a user's mistake too. A new name each time: a used one "continues".
        # Nor for ranks that cannot be placed: Ray Train would retry for ever, and hold what the next attempt needs.
        run_config=RunConfig(
            name=uuid.uuid4().hex,
            storage_path=str(gang.logs.parent / "ray"),
            failure_config=FailureConfig(controller_failure_limit=0),
        ),
    )
    try:
        result: Any = trainer.fit()  # Ray's annotations still name the Result of Train v1
        return opened(result.return_value)
    except Exception as error:
        return _cause(error, gang)


def _cause(error: Exception, gang: Gang) -> Exception:
    """The rank's own error behind what Ray Train raised; WorkerDiedError if a rank, or Ray, is gone."""
    if ray_private.is_unplaced(error):
        return NoPlaceError(str(error))
    user_errors = []
    for rank, failure in ray_private.rank_failures(error).items():
        outcome = getattr(failure, "athanor_outcome", None)
        if outcome is None:
            how = f"was killed or its machine went away ({failure})"
            return WorkerDiedError(f"rank {rank}", NO_VALUE, how, log_tail(gang.logs / f"rank-{rank}.log"))
        try:
            opened(outcome)
        except Exception as user_error:
            user_errors.append(user_error)
    user_errors.sort(key=lambda user_error: not hasattr(user_error, "exit_code"))
    return user_errors[0] if user_errors else WorkerDiedError("Ray Train", NO_VALUE, f"gave up: {error}")
