"""The twin without Ray: worker processes that report errors as they are, die with their parent and are replaced."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import worker_functions as workers

from conf.refusal import Refusal
from pipelines.engine.backends.gang import Gang
from pipelines.engine.backends.local_backend import LocalBackend, Preload
from pipelines.engine.backends.outcome import WorkerDiedError


@pytest.fixture(params=[None, Preload(modules=(), begin=workers.mark_the_beginning)], ids=["processes", "forks"])
def backend(request: pytest.FixtureRequest) -> Iterator[LocalBackend]:
    backend = LocalBackend(cpus=2, gpus=0, preload=request.param)
    backend.expect_gang()
    yield backend
    backend.close()


def gang(tmp_path: Path, fn: object, *, workers: int = 2, **config: object) -> Gang:
    (tmp_path / "logs").mkdir(exist_ok=True)
    return Gang(fn=fn, config={"folder": str(tmp_path), **config}, workers=workers, logs=tmp_path / "logs")  # type: ignore[arg-type]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def wait_until_gone(pids: list[int], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still there: {[pid for pid in pids if not gone(pid)]}"
        time.sleep(0.05)


def test_calls_run_in_other_processes_and_every_result_comes_back(backend: LocalBackend) -> None:
    assert dict(backend.map(workers.double, {str(n): (n,) for n in range(20)})) == {str(n): 2 * n for n in range(20)}
    places = dict(backend.map(workers.where, {str(n): (n,) for n in range(8)}, cpus=1))
    pids = {pid for pid, _ in places.values()}
    assert len(pids) <= 2
    assert os.getpid() not in pids
    assert list(backend.map(workers.double, {})) == []
    later = dict(backend.map(workers.where, {"x": (0,)}))
    assert {pid for pid, _ in later.values()} <= pids, "a process that waits is used before another is started"
    backend.close()
    wait_until_gone(list(pids))


def test_in_process_calls_of_two_steps_take_turns() -> None:
    backend, running, together = LocalBackend(in_process=True), threading.Event(), []

    def call(_: int) -> None:
        together.append(running.is_set())
        running.set()
        time.sleep(0.05)
        running.clear()

    steps = [threading.Thread(target=lambda: list(backend.map(call, {"x": (0,), "y": (1,)}))) for _ in range(2)]
    for step in steps:
        step.start()
    for step in steps:
        step.join()
    assert together == [False] * 4


def test_in_process_runs_in_the_caller() -> None:
    assert dict(LocalBackend(in_process=True).map(workers.where, {"x": (0,)}))["x"][0] == os.getpid()


def test_a_user_error_arrives_as_itself_and_a_bug_with_its_traceback(backend: LocalBackend) -> None:
    with pytest.raises(workers.PickyError, match="learning rate -1"):
        list(backend.map(workers.raise_picky, {"x": (0,)}))
    with pytest.raises(ZeroDivisionError) as bug:
        list(backend.map(workers.divide, {"x": (0,)}))
    assert "in divide" in bug.value.__notes__[0]
    with pytest.raises(RuntimeError, match="UnportableError: onetwo"):
        list(backend.map(workers.raise_unportable, {"x": (0,)}))


def test_a_killed_worker_is_replaced_and_its_call_tried_again(backend: LocalBackend, tmp_path: Path) -> None:
    assert dict(backend.map(workers.die_until, {"x": (str(tmp_path), 3)})) == {"x": "lived"}
    with pytest.raises(WorkerDiedError, match=r"was killed by SIGKILL .* 4 times"):
        list(backend.map(workers.die_until, {"x": (str(tmp_path), 99)}))


def test_what_cannot_be_sent_is_refused_with_the_remedy(backend: LocalBackend) -> None:
    with pytest.raises(Refusal, match="top level of a module"):
        list(backend.map(lambda x: x, {"x": (0,)}))


def test_what_will_never_fit_is_refused(backend: LocalBackend, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="1 GPUs asked for where there are 0"):
        list(backend.map(workers.double, {"x": (0,)}, gpus=1))
    with pytest.raises(Refusal, match="3 × 1 CPUs asked for where there are 2"):
        backend.gang(gang(tmp_path, workers.rank_environment, workers=3))


def test_raising_from_poll_ends_what_runs(backend: LocalBackend, tmp_path: Path) -> None:
    class EnoughError(Exception):
        pass

    def poll() -> None:
        if list(tmp_path.glob("[0-9]*")):
            raise EnoughError

    with pytest.raises(EnoughError):
        list(backend.map(workers.sleep_and_tell, {"x": (600, str(tmp_path))}, poll=poll))
    wait_until_gone([int(path.name) for path in tmp_path.glob("[0-9]*")])


def test_ranks_see_their_place_and_rank_0_answers(
    backend: LocalBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK", "TORCHELASTIC_USE_AGENT_STORE", "GROUP_RANK", "RANK"):
        monkeypatch.setenv(name, "7")  # of another launcher, in whose shell this was started
    answer = backend.gang(gang(tmp_path, workers.rank_environment))
    assert (answer["RANK"], answer["WORLD_SIZE"], answer["LOCAL_WORLD_SIZE"]) == ("0", "2", "2")
    assert answer["of other launchers"] == ""
    other = (tmp_path / "rank1").read_text()
    assert f"'MASTER_PORT': '{answer['MASTER_PORT']}'" in other
    assert "'LOCAL_RANK': '1'" in other


def test_one_rank_runs_in_the_caller_when_asked(tmp_path: Path) -> None:
    before = dict(os.environ)
    answer = LocalBackend(in_process=True).gang(gang(tmp_path, workers.rank_environment, workers=1))
    assert (answer["RANK"], answer["WORLD_SIZE"]) == ("0", "1")
    assert dict(os.environ) == before


def test_a_user_error_in_one_rank_ends_the_others(backend: LocalBackend, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(Refusal, match="rows = 3: cannot be shared by 2 ranks"):
        backend.gang(gang(tmp_path, workers.fail_in_rank_1))
    assert time.monotonic() - started < 30
    assert "a line for the log" in (tmp_path / "logs" / "rank-1.log").read_text()


@pytest.mark.slow
def test_a_killed_rank_is_a_death_though_its_peer_complains_first(backend: LocalBackend, tmp_path: Path) -> None:
    with pytest.raises(WorkerDiedError, match="rank 1: was killed by SIGKILL"):
        backend.gang(gang(tmp_path, workers.die_once_in_a_collective, deaths=1))
    assert backend.gang(gang(tmp_path, workers.die_once_in_a_collective, deaths=1)) == {"attempt": 1, "total": 2.0}


def test_ranks_end_when_their_folder_is_taken_away(backend: LocalBackend, tmp_path: Path) -> None:
    asked = gang(tmp_path, workers.wait_for_ever)

    def poll() -> None:
        if len(list(tmp_path.glob("pid*"))) == 2 and (tmp_path / "logs").exists():
            (tmp_path / "logs").rename(tmp_path / "taken-over")

    with pytest.raises(WorkerDiedError):
        backend.gang(asked, poll=poll)


def test_workers_that_are_let_go_leak_nothing(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import worker_functions as workers; from pipelines.engine.backends.local_backend import LocalBackend\n"
        "if __name__ == '__main__':\n"
        "    backend = LocalBackend(cpus=2)\n"
        "    list(backend.map(workers.hold_a_semaphore, {n: (1,) for n in 'ab'}))\n"
        "    backend.close()"
    )
    command = [sys.executable, str(program), str(Path(__file__).parent)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")  # no "leaked semaphore objects"


FORKS = (
    "import sys; sys.path.insert(0, sys.argv[1])\n"
    "import worker_functions as workers\n"
    "from pipelines.engine.backends.local_backend import LocalBackend, Preload\n"
    "if __name__ == '__main__':\n"
    "    preload = Preload(modules=('wave',), environment={'WHILE': '1'}, begin=workers.mark_the_beginning)\n"
    "    backend = LocalBackend(cpus=2, preload=preload)\n"
    "    backend.expect_gang()\n"
)


def test_forks_have_what_they_need_imported_and_an_environment_of_their_own(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(FORKS + "    print(dict(backend.map(workers.beginnings, {n: ('wave',) for n in 'ab'})))")
    command = [sys.executable, str(program), str(Path(__file__).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=True)
    as_it_should_be = {"is loaded": True, "begun with OMP_NUM_THREADS": "3", "WHILE": None}
    assert (ended.stdout.strip(), ended.stderr) == (str(dict.fromkeys("ab", as_it_should_be)), "")


@pytest.mark.parametrize("forks", [False, True])
def test_workers_die_with_a_killed_parent(tmp_path: Path, forks: bool) -> None:
    code = FORKS if forks else FORKS.replace("preload=preload", "")
    code += "    list(backend.map(workers.sleep_and_tell, {n: (600, sys.argv[2]) for n in 'ab'}))"
    program = tmp_path / "program.py"
    program.write_text(code)
    marks = tmp_path / "marks"
    marks.mkdir()
    driver = subprocess.Popen([sys.executable, str(program), str(Path(__file__).parent), str(marks)])
    while len(list(marks.iterdir())) < 2:
        time.sleep(0.05)
        assert driver.poll() is None
    driver.kill()
    driver.wait()
    wait_until_gone([int(path.name) for path in marks.iterdir()])
