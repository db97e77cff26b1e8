"""A process that dies between any two changes to the disk loses nothing and publishes nothing half."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_program import graph, make

from pipelines.engine.backends.local_backend import LocalBackend
from pipelines.engine.store.manifest import provenance
from pipelines.engine.store.open import open_store

CHANGES = ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir")


def in_child(body: Callable[[], Any]) -> tuple[int, Any]:
    """Run ``body`` in a forked process: (exit status as from wait, its result if it lived)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                os.write(writer, pickle.dumps(body()))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as answer:
        data = answer.read()
    _, status = os.waitpid(pid, 0)
    return status, pickle.loads(data) if data else None


def walk_of(store: Path, *, die_before: int | None = None) -> tuple[dict[str, str], int]:
    """Make letters and walk; die by SIGKILL before the n-th change to the disk, or tell how many there were."""
    changes = 0

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def perform(*args: Any, **named: Any) -> Any:
            nonlocal changes
            changes += 1
            if changes == die_before:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **named)

        return perform

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    made = make(open_store(store), LocalBackend(cpus=2, in_process=True), graph(shards=2, steps=1)[:1])
    return made, changes


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where there is such a place: the order of changes is at stake here, not the disk's patience."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as made:
        yield Path(made)


def assert_a_crash_loses_nothing(point: int, folder: Path, undisturbed: dict[str, str]) -> None:
    """Die before that change to the disk, and once more while continuing; the end is as if undisturbed."""
    store = folder / f"crash{point}"
    for crash in (point, point // 2 + 1):  # dying once more, elsewhere, while continuing
        status, _ = in_child(lambda crash=crash: walk_of(store, die_before=crash))
        assert status in (signal.SIGKILL, 0)
        leftovers = [path for path in store.glob("*/*") if path.parent.name != ".leases" and path.is_dir()]
        published = [path for path in leftovers if path.parent.name in ("letters", "walk")]
        assert all((path / "manifest.json").exists() for path in published), f"half published at {crash}"
    status, answer = in_child(lambda: walk_of(store))
    assert status == 0
    assert answer[0] == undisturbed
    assert not list((store / ".work").iterdir())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], int]:
    provenance()  # remembered here, so that not every child has to ask git and the installed packages
    status, answer = in_child(lambda: walk_of(tmp_path_factory.mktemp("undisturbed") / "store"))
    assert status == 0
    assert set(answer[0]) == {"letters", "walk"}
    assert answer[1] > 50
    return answer


def test_dying_at_some_changes_to_the_disk(folder: Path, undisturbed: tuple[dict[str, str], int]) -> None:
    content, changes = undisturbed
    for point in itertools.islice(range(1, changes + 1), 0, None, 11):
        assert_a_crash_loses_nothing(point, folder, content)


@pytest.mark.slow
def test_dying_at_every_change_to_the_disk(folder: Path, undisturbed: tuple[dict[str, str], int]) -> None:
    content, changes = undisturbed
    for point in range(1, changes + 1):
        assert_a_crash_loses_nothing(point, folder, content)
