"""The batch script: complete, correct shell, and closed to what would break it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import member
from cluster.slurm import LOST_MACHINE_EXIT_CODE, SlurmSettings, render, submit
from conf.refusal import Refusal
from pipelines.engine.backends.outcome import LOST_MACHINE

ROOT = Path(__file__).parents[2]
COMMAND = ["run", "experiment=gpt2-124m", "corpus.paths=[/data/a b,/data/$HOME]"]


def script(command: list[str] = COMMAND, **settings: Any) -> str:
    return render(SlurmSettings(**{"store": "/shared/runs", **settings}), command)


def directives(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    return {line.split("=", 1)[0]: line.partition("=")[2] for line in lines}


def test_the_directives_say_what_the_settings_say() -> None:
    asked = directives(script(nodes=4, gpus_per_node=8, cpus_per_node=64, partition="gpu", constraint="a100&ib"))
    assert asked["nodes"] == "4"
    assert asked["ntasks-per-node"] == "1"
    assert asked["gpus-per-node"] == "8"
    assert asked["cpus-per-task"] == "64"
    assert asked["partition"] == "gpu"
    assert asked["constraint"] == '"a100&ib"'
    assert asked["output"] == '"/shared/runs/logs/%x-%j.log"'
    assert asked["open-mode"] == "append"
    assert asked["signal"] == "B:USR1@120"
    assert asked["requeue"] == ""
    assert "account" not in asked


def test_without_gpus_none_are_asked_for() -> None:
    text = script(gpus_per_node=0)
    assert "gpus-per-node" not in directives(text)
    assert "--num-gpus=0" in text


@pytest.mark.parametrize("nodes", [1, 3])
def test_the_script_is_shell_that_bash_accepts(nodes: int, tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    path.write_text(script(nodes=nodes, setup=("module load cuda", "export X='a b'")))
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", "--severity=warning", path]).returncode == 0


def test_the_command_reaches_python_word_for_word(tmp_path: Path) -> None:
    line = next(line for line in script().splitlines() if "-m pipelines" in line).removesuffix("&")
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    program.chmod(0o755)
    printed = subprocess.run(["bash", "-c", f"python={program}; {line}"], capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines() == ["-m", "pipelines", *COMMAND, "store=/shared/runs"]


def test_a_store_in_the_command_wins() -> None:
    text = script([*COMMAND, "store=s3://bucket/runs"])
    assert "store=s3://bucket/runs &" in text
    assert "/shared/runs &" not in text


def _job(folder: Path, *, driver: str, step: str = "sleep 60", state: str = "RUNNING", restarts: int = 0) -> Path:
    """The script without its Ray: bash runs it with a driver and a step of ours, and a `scontrol` that notes its words."""
    text = script(max_requeues=2)
    ends, runs = text.split("# ---- the end")[1].split("# ---- the head")[0], text.split("# ---- the run\n")[1]
    runs = "\n".join(f"({driver}) &" if "-m pipelines" in line else line for line in runs.split("\n"))
    stubs = f"""
scontrol() {{ [ "$1" = show ] && echo JobState={state} || echo "$@" >> {folder}/requeued; }}
srun() {{ :; }}
timeout() {{ :; }}
SLURM_JOB_ID=7; SLURM_JOB_NUM_NODES=2; SLURM_RESTART_COUNT={restarts}; ray_folder=/nowhere
# the end"""
    path = folder / "job.sh"
    path.write_text(f"{stubs}{ends}{step} & steps+=($!)\n{runs}")
    return path


SAVES = "trap 'exit 130' TERM; sleep 20 & echo $! > {folder}/sleeps; touch {folder}/ready; wait $!"


@pytest.mark.parametrize("code", [0, 3, 137])
def test_the_driver_decides_the_exit_code(tmp_path: Path, code: int) -> None:
    path = _job(tmp_path, driver=f"sleep 0.2; exit {code}")
    assert subprocess.run(["bash", path], stdout=subprocess.DEVNULL, timeout=30).returncode == code
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(
    ("warning", "state", "restarts", "requeued"),
    [
        (signal.SIGUSR1, "RUNNING", 0, True),  # the time limit
        (signal.SIGTERM, "RUNNING", 0, True),  # a preemption, as cluster.member passes it on
        (signal.SIGTERM, "CANCELLED", 0, False),  # scancel
        (signal.SIGTERM, "RUNNING", 2, False),  # max_requeues
    ],
)
def test_a_warning_lets_the_run_save_and_requeues_what_nobody_cancelled(
    tmp_path: Path, warning: signal.Signals, state: str, restarts: int, requeued: bool
) -> None:
    path = _job(tmp_path, driver=SAVES.format(folder=tmp_path), state=state, restarts=restarts)
    process = subprocess.Popen(["bash", path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait_for(tmp_path / "ready")
    process.send_signal(warning)
    time.sleep(0.1)
    process.send_signal(warning)  # a second one is not passed on: the run would leave without saving
    assert process.wait(timeout=30) == 130
    assert (tmp_path / "requeued").exists() == requeued


def test_a_lost_machine_requeues(tmp_path: Path) -> None:
    path = _job(tmp_path, driver=f"sleep 0.2; exit {LOST_MACHINE}")
    assert subprocess.run(["bash", path], stdout=subprocess.DEVNULL, timeout=30).returncode == LOST_MACHINE
    assert (tmp_path / "requeued").read_text().split()[0] == "requeue"


def test_a_dead_part_of_ray_ends_the_job_within_seconds_as_a_lost_machine(tmp_path: Path) -> None:
    path = _job(tmp_path, driver=SAVES.format(folder=tmp_path), step="sleep 0.5")
    began = time.monotonic()
    with (tmp_path / "log").open("w") as log:
        assert subprocess.run(["bash", path], stdout=log, stderr=log, timeout=30).returncode == LOST_MACHINE
    assert time.monotonic() - began < 8
    assert "a part of Ray ended before the run did" in (tmp_path / "log").read_text()
    assert (tmp_path / "requeued").exists()


def test_the_shell_and_the_engine_call_a_lost_machine_by_one_code() -> None:
    assert LOST_MACHINE_EXIT_CODE == LOST_MACHINE == 75


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_member_keeps_its_command_from_the_warning_passes_it_on_and_ends_when_told(tmp_path: Path) -> None:
    """As Slurm signals a step: every process of it."""
    inner = f"import os, time; open('{tmp_path}/inner', 'w').write(str(os.getpid())); time.sleep(60)"
    waits = f"touch {tmp_path}/ready; while [ ! -e {tmp_path}/end ]; do sleep 0.05; done"
    batch = subprocess.Popen(["bash", "-c", f"trap 'touch {tmp_path}/warned' TERM; {waits}"])
    _wait_for(tmp_path / "ready")
    member = subprocess.Popen(
        [sys.executable, "-m", "cluster.member", "--warn", str(batch.pid), sys.executable, "-c", inner], cwd=ROOT
    )
    _wait_for(tmp_path / "inner")
    time.sleep(0.1)
    pid = int((tmp_path / "inner").read_text())
    for each in (pid, member.pid):
        os.kill(each, signal.SIGTERM)
    _wait_for(tmp_path / "warned")
    assert member.poll() is None
    for each in (pid, member.pid):
        os.kill(each, signal.SIGUSR2)
    assert member.wait(timeout=20) == 0
    (tmp_path / "end").touch()
    batch.wait(timeout=20)


@pytest.mark.parametrize(("code", "ends_with"), [(0, 1), (3, 3)])
def test_a_member_whose_command_ends_by_itself_has_failed(code: int, ends_with: int) -> None:
    assert member.main([sys.executable, "-c", f"import sys; sys.exit({code})"]) == ends_with


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"store": None}, "store: not given"),
        ({"store": "runs"}, "relative path"),
        ({"nodes": 0}, "nodes = 0"),
        ({"time_limit": "a day"}, "D-HH:MM:SS"),
        ({"partition": "gpu\nrm -rf /"}, "not a Slurm name"),
        ({"network": "10.1.; rm"}, "network = "),
        ({"grace_seconds": 5}, "at least 30"),
        ({"logs": "relative"}, "absolute path"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_rule(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        script(**settings)


def test_a_dry_run_prints_the_script_and_its_log_can_be_opened(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Slurm makes no folder for a log, and a job whose log cannot be opened ends at once without one."""
    assert submit(SlurmSettings(store=str(tmp_path / "runs")), COMMAND, dry_run=True) == 0
    printed = capsys.readouterr().out
    assert printed == script(store=str(tmp_path / "runs"))
    assert Path(directives(printed)["output"].strip('"')).parent == tmp_path / "runs" / "logs"
    assert (tmp_path / "runs" / "logs").is_dir()


@pytest.mark.parametrize(
    "settings", [{"store": "/not-here/but/there"}, {"store": "/shared/runs", "logs": "/not-here/logs"}]
)
def test_a_log_folder_that_cannot_be_made_here_gives_way_to_the_one_sbatch_is_called_from(
    settings: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(SlurmSettings(**settings), COMMAND, dry_run=True) == 0  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert directives(out)["output"] == '"%x-%j.log"'
    assert "logs cannot be made from here (/not-here" in err
    assert not Path("/not-here").exists()


def test_where_there_is_no_sbatch_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Refusal, match=r"sbatch: was not found.*--dry-run"):
        submit(SlurmSettings(store="/shared/runs"), COMMAND, dry_run=False)


def test_a_command_without_a_verb_is_refused() -> None:
    with pytest.raises(Refusal, match="a verb must come first"):
        script(["experiment=demo"])
