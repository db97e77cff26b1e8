"""Each piece of Ray that ray_private.py takes without a promise is there; where not, a sentence says which one moved.

No Ray is started: these run before all that do (tests/conftest.py).
"""

from __future__ import annotations

import importlib
import inspect
import mmap
import re
from pathlib import Path
from typing import Any

import pytest
import ray

from pipelines.engine.backends import ray_private


def moved(what: str) -> str:
    """The sentence of a failure."""
    return f"Ray {ray.__version__} has no {what} any more: pipelines/engine/backends/ray_private.py needs another way to it"


def attribute(module: str, name: str) -> Any:
    """An attribute of one of Ray's modules, or a failure with a sentence."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        pytest.fail(moved(f"{module}.{name}"), pytrace=False)


VARIABLES = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": ("ray.train.v2._internal.constants", "ENABLE_PRINT_PATCH_ENV_VAR"),
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": ("ray.train.v2._internal.constants", "HEALTH_CHECK_INTERVAL_S_ENV_VAR"),
    "RAY_CHDIR_TO_TRIAL_DIR": ("ray.train.constants", "RAY_CHDIR_TO_TRIAL_DIR"),
    "RAY_TRAIN_METRICS_ENABLED": ("ray.train.v2._internal.constants", "METRICS_ENABLED_ENV_VAR"),
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": ("ray.train.v2._internal.constants", "ENABLE_PREEMPTION_WATCHER_ENV_VAR"),
    "RAY_USAGE_STATS_ENABLED": ("ray._common.usage.usage_constants", "USAGE_STATS_ENABLED_ENV_VAR"),
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": (
        "ray._private.accelerators.accelerator",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO_ENV_VAR",
    ),
    ray_private.SUBMITTED_JOB: ("ray._private.runtime_env.constants", "RAY_JOB_CONFIG_JSON_ENV_VAR"),
}


@pytest.mark.parametrize("name", [*ray_private.ENVIRONMENT, ray_private.SUBMITTED_JOB])
def test_an_environment_variable_is_one_that_ray_reads(name: str) -> None:
    if name == "RAY_worker_niceness":  # a setting of its binary, all of which are variables with this prefix
        library = Path(ray.__file__).parent / "_raylet.so"
        with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as binary:
            assert binary.find(b"worker_niceness") > 0, moved(f"variable {name}")
        return
    assert attribute(*VARIABLES[name]) == name, moved(f"variable {name}")


def test_the_address_of_a_ray_on_this_machine_is_asked_of_ray() -> None:
    assert list(inspect.signature(attribute("ray._private.services", "canonicalize_bootstrap_address")).parameters)[:1]
    address = ray_private.address_here()  # another session of this machine may run one
    assert address is None or ":" in address, moved("canonicalize_bootstrap_address that gives host:port or None")


def test_the_token_of_this_process_comes_as_headers() -> None:
    attribute("ray._private.authentication.http_token_authentication", "get_auth_headers_if_auth_enabled")
    headers = ray_private.token_headers()
    assert set(headers) <= {"authorization"}, moved("token in a header called authorization")


def test_the_call_that_a_head_admits_clients_by_is_one_of_its_service() -> None:
    service, _, call = ray_private.CHECK_ALIVE.removeprefix("/ray.rpc.").partition("/")
    services = attribute("ray.core.generated.gcs_service_pb2", "DESCRIPTOR").services_by_name
    assert service in services and call in services[service].methods_by_name, moved(f"call {ray_private.CHECK_ALIVE}")


def test_the_node_of_this_process_and_its_processes_are_where_they_are_looked_for() -> None:
    attribute("ray._private.worker", "_global_node")
    assert ray_private.own_node() is None or ray.is_initialized()
    node = attribute("ray._private.node", "Node")
    for name in ("dead_processes", "kill_all_processes", "session_name"):
        assert hasattr(node, name), moved(f"Node.{name}")
    assert "all_processes" in inspect.getsource(node.__init__), moved("Node.all_processes")
    options = inspect.signature(node.kill_all_processes).parameters
    assert {"check_alive", "allow_graceful"} <= set(options), moved("kill_all_processes(check_alive, allow_graceful)")
    constants = "ray._private.ray_constants"
    kinds = (attribute(constants, "PROCESS_TYPE_GCS_SERVER"), attribute(constants, "PROCESS_TYPE_RAYLET"))
    assert kinds == ray_private.RAY_ITSELF, moved(f"processes called {ray_private.RAY_ITSELF}")


def test_a_trainer_goes_without_the_callbacks_that_are_left_out() -> None:
    attribute("ray.train.v2.api.data_parallel_trainer", ray_private.DATASETS_CALLBACK)
    attribute("ray.train.v2.api.data_parallel_trainer", ray_private.CLEANER_CALLBACK)
    whole, less = (
        {
            type(callback).__name__
            for callback in ray_private.trainer_without(unused)(lambda: None)._create_default_callbacks()
        }
        for unused in (set(), {ray_private.DATASETS_CALLBACK, ray_private.CLEANER_CALLBACK})
    )
    assert whole - less == {ray_private.DATASETS_CALLBACK, ray_private.CLEANER_CALLBACK}, moved("such callbacks")


def test_ranks_can_be_prepared_before_they_join_the_process_group() -> None:
    config = ray_private.joining_after(lambda: None)(backend="gloo")
    parent = config.backend_cls.__mro__[1]
    parameters = list(inspect.signature(parent.on_start).parameters)
    assert parameters[:3] == ["self", "worker_group", "backend_config"], moved(f"{parent.__name__}.on_start so called")
    group = attribute("ray.train.v2._internal.execution.worker_group", "WorkerGroup")
    assert hasattr(group, "execute"), moved("WorkerGroup.execute")


def test_a_gang_that_was_not_placed_in_time_is_told_from_others() -> None:
    late = attribute("ray.train.v2._internal.exceptions", ray_private.UNPLACED)
    wrapped = attribute("ray.train.v2.api.exceptions", "ControllerError")(late(num_workers=1))
    assert ray_private.is_unplaced(wrapped), moved("ControllerError.controller_failure")
    assert not ray_private.is_unplaced(ValueError())


def test_what_a_rank_raised_is_found_behind_what_ray_train_raises() -> None:
    error = ValueError("of a rank")
    wrapped = attribute("ray.train.v2._internal.exceptions", "UserExceptionWithTraceback")(error, "where")
    group_error = attribute("ray.train.v2.api.exceptions", "WorkerGroupError")
    failed = group_error("it failed", worker_failures={1: wrapped, 0: error})
    assert ray_private.rank_failures(failed) == {0: error, 1: error}, moved("worker_failures of a WorkerGroupError")


def test_nothing_else_imports_what_is_private_to_ray() -> None:
    root = Path(ray_private.__file__).parents[3]
    sources = [
        path for room in ("pipelines", "cluster", "model", "data", "conf") for path in (root / room).rglob("*.py")
    ]
    private = re.compile(r"ray(\.\w+)*\.(_private|_internal|_common)\b")
    assert [path.name for path in sources if private.search(path.read_text(encoding="utf-8"))] == ["ray_private.py"]
