"""Whole runs on a real Slurm and a real Ray of two machines: warned, robbed of a machine, and going on.

`make prove`; needs root for the machines (`nodes.py`), and Slurm's programs for the first of them (Debian: slurm-wlm).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.slurm import SlurmSettings, submit
from pipelines.engine.backends.outcome import LOST_MACHINE
from tests.cluster import nodes, slurm_cluster
from tests.cluster.nodes import Network, Node, wait_for
from tests.conftest import ROOT, TINY

pytestmark = [
    pytest.mark.prove,
    pytest.mark.skipif(not nodes.available(), reason="needs root, ip, unshare and nsenter"),
]

RUN = [*TINY, "compute.ranks=2", "compute.cpus_per_rank=1", "compute.device=cpu", "pretrain.total_tokens=2048000"]
RUN += ["pretrain.checkpoint.every_steps=1000"]  # so that only what a warning saves is kept
BINARIES = Path(sys.executable).parent


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="athanor-", dir="/tmp"))  # every machine sees it
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def net(folder: Path) -> Iterator[Network]:
    with nodes.network(folder) as net:
        yield net


@pytest.fixture
def words(corpus_dir: Path, folder: Path) -> list[str]:
    texts = folder / "texts"
    shutil.copytree(corpus_dir, texts)
    return [*RUN, f"corpus.paths=[{texts}]"]


def steps(folder: Path) -> int:
    """Rows of the training's metrics, whichever attempt wrote them."""
    return metrics(folder).count(b"\n")


def metrics(folder: Path) -> bytes:
    """The training's metrics. Their rows hold times, so a row of a step that was trained again is another one."""
    return max((path.read_bytes() for path in folder.glob("store/**/metrics.jsonl")), key=len, default=b"")


@pytest.mark.skipif(not slurm_cluster.available(), reason="needs Slurm")
def test_a_slurm_job_saves_when_warned_is_queued_again_and_ends_in_seconds_without_ray(
    net: Network, folder: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SlurmSettings(
        nodes=2, cpus_per_node=2, memory="3000", store=str(folder / "store"), network=nodes.PREFIX, time_limit="60"
    )
    submit(settings, ["run", *words, "--until", "pretrain"], dry_run=True)
    script = capsys.readouterr().out  # nothing but this is carried to sbatch
    with slurm_cluster.slurm(net, nodes=2) as slurm:
        job = slurm.sbatch(script)

        def log() -> str:
            return "".join(path.read_text() for path in folder.glob("store/logs/*.log"))

        def running(condition: Callable[[], bool]) -> Callable[[], bool]:
            def check() -> bool:
                assert slurm.state(job) != "FAILED", slurm.command("scontrol", "show", "job", job) + log()[-3000:]
                return condition()

            return check

        def trains_beyond(step: int) -> None:
            wait_for(running(lambda: steps(folder) > step), 240, f"step {step}\n{log()[-3000:]}")

        def requeued(times: int, seconds: float) -> None:
            wait_for(lambda: slurm.field(job, "Restarts") == str(times), seconds, f"restart {times}\n{log()[-3000:]}")
            wait_for(lambda: slurm.state(job) == "PENDING", 60, "pending")

        def again() -> None:
            """Start it now, where Slurm itself would wait two minutes. Not in the second in which it ended: credentials
            are revoked with times in whole seconds, and slurmd refuses such a start ("Job credential revoked", exit 1)."""
            wait_for(lambda: slurm.idle() == 2, 60, "nodes idle")
            time.sleep(2)
            slurm.command("scontrol", "update", f"JobId={job}", "StartTime=now")

        def goes_on_where_it_was() -> bytes:
            """Start it again: no step that was trained is trained again. Returns the metrics from before."""
            before = metrics(folder)
            again()
            trains_beyond(before.count(b"\n") + 3)
            assert metrics(folder).startswith(before)
            return before

        trains_beyond(10)
        other = slurm.sbatch("#!/bin/sh\n", "--partition=high", "--nodes=2", "-c2", "--output=/dev/null")
        requeued(1, 45)  # of a grace time of 60; what is not saved within it is lost
        assert "preempted: back into the queue" in log()
        slurm.wait(other, {"COMPLETED"}, 60)
        goes_on_where_it_was()

        slurm.command("scancel", "--signal=TERM", job)
        requeued(2, 45)
        saved = goes_on_where_it_was()

        began = time.monotonic()
        pids = slurm.nodes["n2"].run(["pgrep", "-f", "raylet/raylet"]).stdout.split()
        slurm.nodes["n2"].run(["kill", "-KILL", *pids])
        requeued(3, 45)
        assert time.monotonic() - began < 45
        assert "a part of Ray ended before the run did" in log()
        again()
        trains_beyond(steps(folder))
        assert metrics(folder).startswith(saved)  # what the warning had saved

        slurm.command("scancel", job)
        slurm.wait(job, {"CANCELLED"}, 60)
        time.sleep(3)
        assert slurm.state(job) == "CANCELLED"  # and not queued again


def ray_node(node: Node, *words: str) -> None:
    """Ray gives a node 30 s to start, which a busy machine may need twice."""
    command = [str(BINARIES / "ray"), "start", "--block", "--disable-usage-stats", "--num-cpus=1", *words]
    line = shlex.join([*command, f"--node-ip-address={node.address}"])
    environment = {"RAY_AUTH_MODE": "disabled", "PATH": f"{BINARIES}:{os.environ['PATH']}"}
    node.start(["sh", "-c", f"{line} || {line} || {line}"], log="ray.log", environment=environment)


def await_ray(head: Node, count: int) -> None:
    environment = {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": f"{head.address}:6379"}
    command = [sys.executable, "-m", "cluster.ready", f"--nodes={count}", "--timeout=200"]
    answer = head.run(command, environment=environment, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr + (head.folder / "ray.log").read_text()[-2000:]


def driver(node: Node, words: list[str], folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipelines", "run", *words, f"store={folder}/store", "--until", "pretrain"]
    address = f"compute.address={node.address}:6379"
    environment = {"RAY_AUTH_MODE": "disabled"}
    return node.start([*command, address], log="run.log", environment=environment, cwd=ROOT)


def test_a_run_waits_for_a_lost_machine_goes_on_with_another_and_has_a_code_for_none(
    net: Network, folder: Path, words: list[str]
) -> None:
    """The machines' names resolve to 127.0.1.1, as on Debian, so that ranks find one another by Ray's addresses only."""
    first, second = net.node("n1", 1), net.node("n2", 2)
    ray_node(first, "--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={folder}/r")
    await_ray(first, 1)
    ray_node(second, f"--address={first.address}:6379")
    await_ray(first, 2)
    words = [*words, "pretrain.checkpoint.every_steps=5", "compute.wait_seconds=60"]
    run = driver(first, words, folder)

    def log() -> str:
        return (first.folder / "run.log").read_text()

    def goes_on() -> bool:
        assert run.poll() is None, log()[-3000:]
        return steps(folder) > reached

    reached = 10
    wait_for(goes_on, 240, f"step 10\n{log()[-3000:]}")
    second.kill()
    reached = 10**9
    wait_for(lambda: "a machine was lost. Waiting at most 60 s" in log() or goes_on(), 240, "the wait")
    reached = steps(folder)
    third = net.node("n3", 3)
    ray_node(third, f"--address={first.address}:6379")
    wait_for(goes_on, 180, f"goes on\n{log()[-3000:]}")
    third.kill()
    assert run.wait(timeout=240) == LOST_MACHINE, log()[-3000:]
    assert "no other came within 60 s (compute.wait_seconds)" in log()
