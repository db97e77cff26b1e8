"""Jobs on a real Ray head: what is shipped, what comes back, who may leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ray_jobs import RayJobs, RaySettings, logs, status, stop
from cluster.submit import submit
from conf.refusal import Refusal
from tests.cluster.head import Head, ray_head
from tests.conftest import athanor, tiny

pytestmark = pytest.mark.slow

PROGRAM = """\
import json, os, pathlib, sys, time
words = dict(word.split("=", 1) for word in sys.argv[2:])
for line in range(int(words.get("lines", 0))):
    print("line", line, flush=True)
    time.sleep(0.2)
print(json.dumps({
    "verb": sys.argv[1], "words": words, "files": sorted(os.listdir()),
    "secret_length": len(os.environ.get("A_SECRET", "")), "ray_address": os.environ.get("RAY_ADDRESS"),
}))
sys.exit(int(words.get("code", 0)))
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as head:
        yield head


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout whose command reports what it found, with an untracked and an ignored file."""
    root = tmp_path / "tree"
    (root / "pipelines").mkdir(parents=True)
    (root / "pipelines" / "__main__.py").write_text(PROGRAM)
    (root / ".gitignore").write_text("*.ckpt\n")
    (root / "big.ckpt").write_text("")
    (root / "untracked.txt").write_text("")
    return root


@pytest.fixture(autouse=True)
def own_notes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def test_a_job_runs_the_shipped_tree_and_gives_its_exit_code(
    head: Head, tree: Path, own_notes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # Ray would prefer this to the address that was given
    monkeypatch.setenv("A_SECRET", "hush-hush-0123456789")
    settings = RaySettings(address=head.dashboard, tree=str(tree), pass_env=("A_SECRET",))
    assert submit(settings, ["run", "experiment=demo", "text=[a b]", "lines=3", "code=3"]) == 3
    out, err = capsys.readouterr()
    report = json.loads(next(line for line in out.splitlines() if line.startswith('{"verb"')))
    assert report["verb"] == "run"
    assert report["words"]["text"] == "[a b]"
    assert report["words"]["store"] == f"{os.environ['HOME']}/athanor/runs"
    assert report["files"] == [".gitignore", "pipelines", "untracked.txt"]
    assert report["ray_address"].endswith(head.address.split(":")[1])
    assert [line for line in out.splitlines() if line.startswith("line")] == ["line 0", "line 1", "line 2"]
    assert "failed, exit code 3" in err
    assert report["secret_length"] == 20
    noted = "".join(path.read_text() for path in own_notes.rglob("*") if path.is_file())
    assert "hush" not in out + err + noted
    assert "A_SECRET" in err


def test_the_pipeline_itself_runs_as_a_job_and_its_store_outlives_it(
    head: Head, corpus_dir: Path, tmp_path: Path
) -> None:
    words = [*tiny(corpus_dir, tmp_path / "store"), "--until", "tokenizer"]
    result = athanor("submit", "cluster=ray", f"address={head.dashboard}", "--", "run", *words)
    assert "succeeded, exit code 0" in result.stderr
    assert {path.parts[-3] for path in (tmp_path / "store").glob("*/*/manifest.json")} == {"corpus", "tokenizer"}
    again = athanor("submit", "cluster=ray", f"address={head.dashboard}", "--", "status", *words[:-2], "--json")
    states = {step["name"]: step["state"] for step in json.loads(again.stdout[again.stdout.index("{") :])["steps"]}
    assert (states["tokenizer"], states["shards"]) == ("cached", "to make")


def test_a_follower_may_leave_and_ask_again_and_the_same_command_is_not_started_twice(
    head: Head, tree: Path, own_notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = RaySettings(address=head.dashboard, tree=str(tree), store="/tmp/athanor-runs")
    command = ["run", "experiment=long", "lines=1000"]
    source = (
        "from cluster.ray_jobs import RaySettings; from cluster.submit import submit; import sys; "
        f"settings = RaySettings(address={head.dashboard!r}, tree={str(tree)!r}, store='/tmp/athanor-runs'); "
        f"sys.exit(submit(settings, {command!r}))"
    )
    follower = subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert follower.stdout is not None
    for line in follower.stdout:
        if line.startswith("line 3"):
            break
    follower.send_signal(signal.SIGINT)
    _, err = follower.communicate(timeout=30)
    assert follower.returncode == 130
    job = next(line.split()[1] for line in err.splitlines() if line.startswith("submitted"))
    assert f"athanor logs {job}" in err.split("goes on without us")[1]
    assert status(job).state == "RUNNING"

    assert submit(settings, command, follow=False) == 0
    assert "already under way" in capsys.readouterr().err
    jobs = RayJobs(head.dashboard)._client.list_jobs()
    assert len([details for details in jobs if "experiment=long" in details.entrypoint]) == 1
    assert logs(job, follow=False) == 0
    assert "line 3" in capsys.readouterr().out

    assert stop(job) == 0
    assert (status(job).state, status(job).exit_code) == ("STOPPED", 143)
    assert stop(job) == 0
    assert "already ended" in capsys.readouterr().err

    assert submit(settings, command, follow=False) == 0  # the same command again, now that the first is over
    assert f"submitted {job}-2" in capsys.readouterr().err
    stop(f"{job}-2")


def test_a_log_stream_that_breaks_loses_and_repeats_nothing(
    head: Head, tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = RayJobs(head.dashboard)
    real = jobs._client.tail_job_logs
    breaks = []

    async def fragile(job: str) -> object:
        async for chunk in real(job):
            yield chunk
            if "line" in chunk and len(breaks) < 2:
                breaks.append(time.monotonic())
                raise ConnectionResetError("a cable was pulled")

    monkeypatch.setattr(jobs._client, "tail_job_logs", fragile)
    assert submit(RaySettings(address=head.dashboard, tree=str(tree)), ["run", "lines=30"], follow=False) == 0
    job = capsys.readouterr().err.split("submitted ")[1].split()[0]
    assert jobs.follow(job) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("line")]
    assert len(breaks) == 2
    assert lines == [f"line {number}" for number in range(30)]


def test_a_missing_interpreter_is_named(head: Head, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = RaySettings(address=head.dashboard, tree=str(tree), python="/no/such/python")
    assert submit(settings, ["run"]) == 127
    assert "python=/path/to/python" in capsys.readouterr().err


def test_a_job_the_cluster_does_not_know_is_an_error(head: Head) -> None:
    with pytest.raises(Refusal, match="knows no such job"):
        logs("athanor-never-00000000", address=head.dashboard)
