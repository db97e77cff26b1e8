"""The door to Ray, on a real local cluster: the twin's promises, deaths of every sort, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import worker_functions as workers
from engine_program import graph, make
from test_engine_kills import lines_until, made_by, marked, start, wait_until, wait_until_gone

from conf.refusal import Refusal
from pipelines.engine.backends import ray_address
from pipelines.engine.backends.gang import Gang
from pipelines.engine.backends.local_backend import LocalBackend
from pipelines.engine.backends.outcome import LostMachineError, WorkerDiedError
from pipelines.engine.backends.ray_address import check_same
from pipelines.engine.backends.ray_backend import RayBackend
from pipelines.engine.runner import run
from pipelines.engine.step import Context, Step
from pipelines.engine.store.open import open_store


@pytest.fixture(scope="module")
def backend() -> Iterator[RayBackend]:
    backend = RayBackend(cpus=2, gpus=0)
    yield backend
    backend.close()


def gang(tmp_path: Path, fn: object, *, workers: int = 2, **config: object) -> Gang:
    (tmp_path / "logs").mkdir(exist_ok=True)
    return Gang(fn=fn, config={"folder": str(tmp_path), **config}, workers=workers, logs=tmp_path / "logs")  # type: ignore[arg-type]


@pytest.mark.slow
def test_calls_come_back_errors_are_themselves_and_killed_workers_are_replaced(
    backend: RayBackend, tmp_path: Path
) -> None:
    assert dict(backend.map(workers.double, {str(n): (n,) for n in range(20)})) == {str(n): 2 * n for n in range(20)}
    assert list(backend.map(workers.double, {})) == []
    with pytest.raises(workers.PickyError, match="learning rate -1"):
        list(backend.map(workers.raise_picky, {"x": (0,)}))
    with pytest.raises(ZeroDivisionError) as bug:
        list(backend.map(workers.divide, {"x": (0,)}))
    assert "in divide" in bug.value.__notes__[0]
    assert dict(backend.map(workers.die_until, {"x": (str(tmp_path), 2)})) == {"x": "lived"}
    with pytest.raises(WorkerDiedError, match="x: its worker process died"):
        list(backend.map(workers.die_until, {"x": (str(tmp_path), 99)}))
    with pytest.raises(Refusal, match="1 GPUs asked for where there are 0"):
        list(backend.map(workers.double, {"x": (0,)}, gpus=1))
    with pytest.raises(Refusal, match="3 × 1 CPUs asked for where there are 2"):
        backend.gang(gang(tmp_path, workers.rank_environment, workers=3))
    with pytest.raises(
        LostMachineError, match="a machine was lost, and no other came within 0 s"
    ):  # where it was there before
        RayBackend(wait_seconds=0).gang(gang(tmp_path, workers.rank_environment, workers=3), again=True)


@pytest.mark.slow
def test_raising_from_poll_ends_calls_and_gangs(backend: RayBackend, tmp_path: Path) -> None:
    class EnoughError(Exception):
        pass

    def poll() -> None:
        if list(tmp_path.glob("[0-9]*")) or list(tmp_path.glob("pid*")):
            raise EnoughError

    with pytest.raises(EnoughError):
        list(backend.map(workers.sleep_and_tell, {"x": (600, str(tmp_path))}, poll=poll))
    (pid,) = tmp_path.glob("[0-9]*")
    wait_until(lambda: not Path("/proc", pid.name).exists())
    pid.unlink()
    with pytest.raises(EnoughError):
        backend.gang(gang(tmp_path, workers.wait_for_ever, workers=1), poll=poll)
    (pid,) = tmp_path.glob("pid*")
    wait_until(lambda: not Path("/proc", pid.name.removeprefix("pid")).exists())


@pytest.mark.slow
def test_a_graph_gives_the_same_content_under_ray_as_without(backend: RayBackend, tmp_path: Path) -> None:
    without = make(open_store(tmp_path / "local"), LocalBackend(cpus=2), graph()[:1])
    assert make(open_store(tmp_path / "ray"), backend, graph()[:1]) == without


@pytest.mark.slow
def test_a_gang_whose_rank_was_killed_is_started_again_and_finishes(backend: RayBackend, tmp_path: Path) -> None:
    def stage(settings: Any, inputs: Any, out_dir: Path, ctx: Context) -> dict[str, Any]:
        config = {"folder": str(ctx.scratch), "deaths": 1}
        return dict(ctx.gang(workers.die_once_in_a_collective, config, workers=2, max_failures=1))

    said: list[str] = []
    step = Step(name="gang", kind="gang", run=stage, version=1, settings={}, cpus=2)
    (report,) = run([step], store=open_store(tmp_path), backend=backend, on_event=lambda event: said.append(event.line))
    assert report.metrics == {"attempt": 1, "total": 2.0}
    assert any("rank 1: was killed" in line and "Starting all ranks again" in line for line in said)


@pytest.mark.slow
def test_a_user_error_in_one_rank_ends_the_others_and_arrives_as_itself(backend: RayBackend, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"^rows = 3: cannot be shared by 2 ranks") as raised:
        backend.gang(gang(tmp_path, workers.fail_in_rank_1))
    assert not isinstance(raised.value, WorkerDiedError)  # which is tried again


@pytest.mark.slow
def test_nothing_stays_behind_a_killed_driver_and_the_next_run_continues(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    driver = start(tmp_path / "store", "--backend", "ray", mark=mark, SHARD_SECONDS="0.5")
    list(lines_until(driver, "progress letters letters 2"))
    assert len(marked(mark)) > 4
    driver.kill()
    driver.communicate(timeout=120)
    assert driver.returncode != 0
    wait_until_gone(mark)
    again = start(tmp_path / "store", "--target", "0")
    first = next(line for line in lines_until(again, "progress letters letters") if "letters letters" in line)
    assert int(first.split()[3]) >= 2
    assert "walk" in made_by(again)


@pytest.mark.slow
def test_workers_of_an_existing_cluster_get_this_code_and_its_token_is_asked_for_at_once(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = Path(sys.executable).with_name("ray")
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4, "PYTHONPATH": ""}
    arguments = f"start --head --block --port={port} --num-cpus=2 --node-ip-address=127.0.0.1 --include-dashboard=false"
    head = subprocess.Popen(
        [ray, *arguments.split()],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    program = (
        "import inspect, sys\n"
        "from pipelines.engine.backends.ray_backend import RayBackend\n"
        "from conf.refusal import Refusal\n"
        "backend = RayBackend(sys.argv[1])\n"
        "print(backend.resources().cpus, *backend.map(inspect.getfile, {'x': (Refusal,)})); backend.close()\n"
    )
    try:
        wait_until(lambda: _answers(port), 60)
        time.sleep(1)
        began = time.monotonic()
        with pytest.raises(Refusal, match=r"asks for a token, and .* Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"):
            RayBackend(f"127.0.0.1:{port}").resources()
        assert time.monotonic() - began < 15
        answer = subprocess.run(
            [sys.executable, "-c", program, f"127.0.0.1:{port}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
        )
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout.startswith("2.0 ")
        assert "/runtime_resources/py_modules_files/" in answer.stdout
        assert head.poll() is None  # joined, not owned: it goes on
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_port_where_something_else_listens_is_said_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray_address.ANSWER_SECONDS <= 7  # to connect, and again to greet: 15 s at most
    monkeypatch.setattr(ray_address, "ANSWER_SECONDS", 1.0)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        started = time.monotonic()
        with pytest.raises(Refusal, match="no Ray cluster answers there"):
            RayBackend(f"127.0.0.1:{deaf.getsockname()[1]}").resources()
        assert time.monotonic() - started < 10


@pytest.mark.slow
def test_an_address_is_not_ignored_where_ray_runs_already(backend: RayBackend) -> None:
    backend.resources()
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        with pytest.raises(Refusal, match="no Ray cluster answers there"):
            RayBackend(f"127.0.0.1:{deaf.getsockname()[1]}").resources()
    import ray

    here = ray.get_runtime_context().gcs_address
    assert RayBackend(here).resources().cpus == 2
    with pytest.raises(Refusal, match="already belongs to the Ray cluster"):
        check_same("127.0.0.1:1", here)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", "no Ray cluster answers there"),
        ("ray://somewhere:10001", "expected host:port of a Ray head"),
        ("somewhere", "expected host:port of a Ray head"),
    ],
)
def test_an_address_that_does_not_answer_is_said_soon(tmp_path: Path, address: str, says: str) -> None:
    started = time.monotonic()
    with pytest.raises(Refusal, match=says):
        run(graph(), store=open_store(tmp_path), backend=RayBackend(address))
    assert time.monotonic() - started < 15
    assert not list(tmp_path.iterdir())


def test_workers_of_a_cluster_track_as_this_shell_says_and_get_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    environment = RayBackend("somewhere:6379")._runtime_env()["env_vars"]
    assert environment["WANDB_MODE"] == "offline"
    assert "WANDB_API_KEY" not in environment
