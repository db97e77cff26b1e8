"""Leases: one holder at a time, tokens that only grow, no publishing after loss. On files and on a real S3 server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from conf.refusal import Refusal
from pipelines.engine.store.lease import Held, Lease, LeaseLostError, Owner, acquire, holder, this_process
from pipelines.engine.store.records import FileRecords, Records, Seen

DIGEST = "d" * 64


@pytest.fixture
def records(tmp_path: Path) -> FileRecords:
    return FileRecords(tmp_path / "leases")


def take(records: Records, *, ttl_seconds: float = 60.0, finish: Callable[[int], bool] = lambda token: False) -> Lease:
    lease = acquire(records, "x", digest=DIGEST, finish=finish, ttl_seconds=ttl_seconds)
    assert isinstance(lease, Lease)
    return lease


def paused(lease: Lease) -> Lease:
    """What a process that does not get to run any more looks like: its renewals stop, it knows nothing."""
    lease._stop.set()
    lease._thread.join()
    return lease


def test_a_held_lease_is_refused_and_its_owner_named(records: FileRecords) -> None:
    lease = take(records)
    refused = acquire(records, "x", digest=DIGEST, finish=lambda token: False)
    assert isinstance(refused, Held)
    assert refused.owner.pid == os.getpid()
    assert holder(records, "x") == refused.owner
    lease.release()
    assert holder(records, "x") is None


def test_tokens_grow_across_releases_kills_and_owners(records: FileRecords) -> None:
    tokens = []
    for _ in range(3):
        lease = take(records)
        tokens.append(lease.token)
        lease.release()
    code = (
        "import sys, os; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from test_leases import take; from pipelines.engine.store.records import FileRecords\n"
        "print(take(FileRecords(Path(sys.argv[1]))).token, flush=True); os.kill(os.getpid(), 9)"
    )
    for _ in range(2):
        folder = Path(__file__).parent
        answer = subprocess.run(
            [sys.executable, "-c", code, str(records._folder), str(folder)], capture_output=True, text=True
        )
        assert answer.returncode == -9, answer.stderr
        tokens.append(int(answer.stdout))
    assert tokens == [1, 2, 3, 4, 5]  # a dead owner on this machine is not waited for


def test_a_lease_of_another_machine_is_taken_only_after_its_time(records: FileRecords) -> None:
    lease = paused(take(records))
    seen = records.read("x")
    assert seen is not None
    elsewhere = replace(this_process(), machine="another", pid=1)
    records.write("x", {**seen.value, "owner": elsewhere.__dict__}, seen.version)
    assert isinstance(acquire(records, "x", digest=DIGEST, finish=lambda token: False, ttl_seconds=1.0), Held)
    time.sleep(1.1)
    successor = take(records, ttl_seconds=1.0)
    assert successor.token == lease.token + 1
    successor.release()


def test_renewal_keeps_a_lease_past_its_time(records: FileRecords) -> None:
    lease = take(records, ttl_seconds=0.6)
    time.sleep(1.5)
    assert isinstance(acquire(records, "x", digest=DIGEST, finish=lambda token: False, ttl_seconds=0.6), Held)
    lease.check()
    lease.release()


class Unreliable:
    """Records behind a line that is down while `down` says so; what is asked raises as a client of S3 does."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self.down: Literal["no", "both ways", "answers"] = "no"

    def read(self, name: str) -> Seen | None:
        if self.down != "no":
            raise RuntimeError("no connection")
        return self._records.read(name)

    def write(self, name: str, value: dict[str, Any], expected: str | None) -> str | None:
        version = self._records.write(name, value, expected) if self.down != "both ways" else None
        if self.down != "no":
            raise RuntimeError("no connection")
        return version


@pytest.mark.parametrize("down", ["both ways", "answers"])
def test_a_lease_outlives_an_outage_shorter_than_its_time(records: FileRecords, down: Any) -> None:
    line = Unreliable(records)
    lease = take(line, ttl_seconds=1.5)
    line.down = down
    time.sleep(0.6)
    line.down = "no"
    time.sleep(1.5)
    assert isinstance(acquire(records, "x", digest=DIGEST, finish=lambda token: False, ttl_seconds=1.5), Held)
    lease.check()
    lease.commit()


def test_a_paused_owner_cannot_commit_after_a_takeover(records: FileRecords) -> None:
    zombie = paused(take(records, ttl_seconds=0.3))
    time.sleep(0.4)
    successor = take(records, ttl_seconds=0.3)
    with pytest.raises(LeaseLostError):
        zombie.commit()
    with pytest.raises(LeaseLostError):
        zombie.check()
    zombie.release()  # and it cannot take the successor's lease away
    successor.check()
    successor.commit()


def test_an_owner_that_wakes_before_anyone_took_over_may_commit(records: FileRecords) -> None:
    lease = paused(take(records, ttl_seconds=0.1))
    time.sleep(0.2)
    lease.commit()
    assert acquire(records, "x", digest=DIGEST, finish=lambda token: True) is None  # nobody else's to build any more


def test_committed_work_is_finished_by_the_next_one_and_never_taken(records: FileRecords) -> None:
    lease = take(records)
    lease.commit()
    finished = []

    def finish(token: int) -> bool:
        finished.append(token)
        return True

    assert acquire(records, "x", digest=DIGEST, finish=finish) is None
    assert finished == [lease.token]


def test_a_damaged_record_is_named_with_the_remedy(records: FileRecords) -> None:
    take(records).release()
    (records._folder / "x.json").write_text('{"token": ')
    with pytest.raises(Refusal, match=r"x\.json: is damaged .* Delete it, and .*\.work/x"):
        take(records)


def test_two_digests_under_one_name_are_refused(records: FileRecords) -> None:
    take(records).release()
    with pytest.raises(Refusal, match="two different digests"):
        acquire(records, "x", digest="e" * 64, finish=lambda token: False)


def test_time_spent_is_summed_over_attempts(records: FileRecords) -> None:
    began = time.monotonic()
    first = take(records)
    time.sleep(0.2)
    first.release()
    second = take(records)
    assert 0.2 <= second.seconds <= time.monotonic() - began + 0.01
    second.release(published=True)
    began = time.monotonic()
    third = take(records)
    assert third.seconds <= time.monotonic() - began + 0.01
    third.release()


def test_a_reused_pid_is_another_owner() -> None:
    me = this_process()
    assert not me.is_dead()
    assert replace(me, started="12345").is_dead()
    assert not replace(me, machine="another", started="12345").is_dead()


def test_threads_that_race_hold_it_one_at_a_time(records: FileRecords) -> None:
    inside, tokens, overlaps = [0], [], []
    lock = threading.Lock()

    def work() -> None:
        for _ in range(8):
            while not isinstance(lease := acquire(records, "x", digest=DIGEST, finish=lambda token: False), Lease):
                time.sleep(0.001)
            with lock:
                inside[0] += 1
                overlaps.append(inside[0])
                tokens.append(lease.token)
            time.sleep(0.001)
            with lock:
                inside[0] -= 1
            lease.release()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(overlaps) == {1}
    assert tokens == list(range(1, 49))


def test_owner_is_named_for_people() -> None:
    assert str(Owner(host="node3", machine="m", pid=7, started="1")) == "process 7 on node3"
