"""Real processes, really killed: the same command again continues, and what it makes is the same."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("engine_program.py")


def start(store: Path, *arguments: str, mark: str = "", **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(store), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "ENGINE_TEST_MARK": mark, **environment},
    )


def made_by(driver: subprocess.Popen[str]) -> dict[str, str]:
    """{step: content digest} of a run that has to succeed."""
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, output
    return dict(line.split()[1:] for line in output.splitlines() if line.startswith("made "))


def marked(mark: str) -> list[int]:
    """Processes that carry the mark in their environment: the driver's and everything it started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def wait_until_gone(mark: str, seconds: float = 90.0) -> None:
    """Wait for the end of every process that carries the mark (one of Ray that was just starting takes its minute)."""
    deadline = time.monotonic() + seconds
    while left := marked(mark):
        lines = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ") for pid in left]
        assert time.monotonic() < deadline, f"still there: {lines}"
        time.sleep(0.05)


def wait_until(condition: object, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines_until(driver: subprocess.Popen[str], prefix: str) -> Iterator[str]:
    assert driver.stdout is not None
    for line in driver.stdout:
        yield line
        if line.startswith(prefix):
            return
    raise AssertionError(f"ended without {prefix!r}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = made_by(start(tmp_path_factory.mktemp("undisturbed")))
    assert set(made) == {"letters", "walk", "gang"}
    return made


@pytest.mark.slow
def test_a_driver_killed_at_random_moments_finishes_with_the_same_content(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    chance, kills, mark = random.Random(7), 0, uuid.uuid4().hex
    slow = {"SHARD_SECONDS": "0.1", "STEP_SECONDS": "0.1", "GANG_SECONDS": "0.3"}
    while kills < 12:
        driver = start(tmp_path, mark=mark, **slow)
        time.sleep(chance.uniform(0.2, 1.2))
        if driver.poll() is not None:
            break
        driver.kill()
        driver.wait()
        kills += 1
        wait_until_gone(mark)
    assert kills >= 3
    assert made_by(start(tmp_path)) == undisturbed


def test_only_missing_shards_are_made_again(tmp_path: Path) -> None:
    driver = start(tmp_path, "--target", "0", SHARD_SECONDS="0.3")
    list(lines_until(driver, "progress letters letters 2"))
    driver.kill()
    driver.wait()
    again = start(tmp_path, "--target", "0")
    first = next(line for line in lines_until(again, "progress letters letters") if "letters letters" in line)
    assert first.split()[3] in ("2", "3")
    assert "walk" in made_by(again)


@pytest.mark.slow
def test_a_resuming_step_goes_on_from_its_checkpoint(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    driver = start(tmp_path, "--target", "0", "--backend", "in-process", STEP_SECONDS="0.1")
    list(lines_until(driver, "progress walk steps 3"))
    driver.kill()
    driver.wait()
    again = start(tmp_path, "--target", "0", "--backend", "in-process")
    first = next(line for line in lines_until(again, "progress walk") if line.startswith("progress walk"))
    assert first.split()[3] == "4"
    assert made_by(again)["walk"] == undisturbed["walk"]


@pytest.mark.slow
def test_drivers_that_race_make_one_artifact_each_once(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    drivers = [start(tmp_path, "--target", "0", "--backend", "in-process", STEP_SECONDS="0.05") for _ in range(4)]
    outputs = [driver.communicate(timeout=60)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0] * 4
    assert sum(output.count("started letters") for output in outputs) == 1
    assert sum(output.count("started walk") for output in outputs) == 1
    assert all(f"made walk {undisturbed['walk']}" in output for output in outputs)
    assert any("is making it; waiting for its result" in output for output in outputs)


@pytest.mark.slow
def test_a_driver_that_slept_past_its_lease_cannot_publish(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    zombie = start(tmp_path, "--target", "0", "--backend", "in-process", "--ttl", "1", STEP_SECONDS="0.3")
    list(lines_until(zombie, "progress walk steps 2"))
    zombie.send_signal(signal.SIGSTOP)
    try:
        successor = start(tmp_path, "--target", "0", "--backend", "in-process", "--ttl", "1")
        output, _ = successor.communicate(timeout=60)
        assert "waiting walk" in output
        assert f"made walk {undisturbed['walk']}" in output
        (manifest,) = (tmp_path / "walk").glob("*/manifest.json")
        published = manifest.read_bytes()
        assert b'"token": 2' in published
    finally:
        zombie.send_signal(signal.SIGCONT)
    made = made_by(zombie)  # it notices, and ends well with the successor's result
    assert made["walk"] == undisturbed["walk"]
    assert manifest.read_bytes() == published
    assert f"process {successor.pid} started at step 2" in manifest.with_name("log.txt").read_text()


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_running_and_the_next_run_does_not_wait(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    driver = start(tmp_path, mark=mark, SHARD_SECONDS="30")
    list(lines_until(driver, "progress letters letters 0"))
    time.sleep(0.3)
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=20)
    assert "interrupted" in output
    assert driver.returncode == 130
    assert not marked(mark)
    output, _ = start(tmp_path, "--target", "0").communicate(timeout=60)
    assert "waiting" not in output
    assert "made walk" in output
