"""The batch script: complete, correct shell, and closed to what would break it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ClusterError
from cluster.slurm import SlurmSettings, render, submit

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


@pytest.mark.parametrize("code", [0, 3, 137])
@pytest.mark.parametrize("warn", [False, True])
def test_the_driver_decides_the_exit_code_and_a_warning_requeues(tmp_path: Path, code: int, warn: bool) -> None:
    """The last part of the script, run by bash with a driver of ours and a `scontrol` that notes its arguments."""
    tail = script(max_requeues=2).split("# ---- the run;")[1].split("\n", 1)[1]
    driver = "sleep 20" if warn else f"sh -c 'exit {code}'"
    lines = [
        f"(trap 'exit {code}' TERM; {driver} & wait $!) &" if "-m pipelines" in line else line
        for line in tail.split("\n")
    ]
    notes = tmp_path / "requeued"
    (tmp_path / "job.sh").write_text(f'scontrol() {{ echo "$@" >> {notes}; }}\nSLURM_JOB_ID=7\n' + "\n".join(lines))
    process = subprocess.Popen(["bash", tmp_path / "job.sh"], stdout=subprocess.DEVNULL, start_new_session=True)
    if warn:
        _signal_when_ready(process)
    assert process.wait(timeout=30) == code
    assert notes.exists() == (warn and code != 0)


def _signal_when_ready(process: subprocess.Popen[bytes]) -> None:
    """USR1 once bash sits in `wait` with its trap set."""
    import signal
    import time

    status = Path(f"/proc/{process.pid}/status")
    usr1 = 1 << (signal.SIGUSR1 - 1)
    while (
        not int(next(line for line in status.read_text().splitlines() if line.startswith("SigCgt")).split()[1], 16)
        & usr1
    ):
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"store": None}, "store: not given"),
        ({"store": "runs"}, "relative path"),
        ({"nodes": 0}, "nodes=0"),
        ({"time_limit": "a day"}, "D-HH:MM:SS"),
        ({"partition": "gpu\nrm -rf /"}, "not a Slurm name"),
        ({"network": "10.1.; rm"}, "network="),
        ({"grace_seconds": 5}, "at least 30"),
        ({"logs": "relative"}, "absolute path"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_rule(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ClusterError, match=words):
        script(**settings)


def test_a_dry_run_prints_the_script_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(SlurmSettings(store="/shared/runs"), COMMAND, dry_run=True) == 0
    assert capsys.readouterr().out == script()


def test_where_there_is_no_sbatch_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match=r"sbatch was not found.*--dry-run"):
        submit(SlurmSettings(store="/shared/runs"), COMMAND, dry_run=False)


def test_a_command_without_a_verb_is_refused() -> None:
    with pytest.raises(ClusterError, match="a verb must come first"):
        script(["experiment=demo"])
