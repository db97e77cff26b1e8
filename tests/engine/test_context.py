"""What a stage may ask of the engine: shards made once, gangs that survive their ranks, files that are what they were."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import worker_functions as workers
from engine_program import count_letters

from conf.refusal import Refusal
from pipelines.engine.backends.local_backend import LocalBackend
from pipelines.engine.backends.outcome import WorkerDiedError
from pipelines.engine.events import Event
from pipelines.engine.runner import run, status
from pipelines.engine.step import Context, Step
from pipelines.engine.store.local import LocalStore

Body = Callable[[Path, Context], dict[str, Any]]


def step(body: Body, name: str = "stage") -> Step:
    def stage(settings: Any, inputs: Mapping[str, Any], out_dir: Path, ctx: Context) -> dict[str, Any]:
        return body(out_dir, ctx)

    return Step(name=name, kind="test", run=stage, version=1, settings={})


def attempt(store: LocalStore, body: Body, *, in_process: bool = True) -> tuple[Path, list[Event]]:
    """Run a one-step graph: (the artifact's folder, the events)."""
    events: list[Event] = []
    (report,) = run(
        [step(body)], store=store, backend=LocalBackend(cpus=2, in_process=in_process), on_event=events.append
    )
    return Path(str(report.path)), events


def letters(*names: str) -> dict[str, Any]:
    return {name: {"name": name, "seconds": 0} for name in names}


class StopHereError(Exception):
    """Ends an attempt where a kill would."""


def stop_after(names: tuple[str, ...], then: Callable[[Path], None] = lambda out_dir: None, **options: Any) -> Body:
    def body(out_dir: Path, ctx: Context) -> dict[str, Any]:
        ctx.map_shards(count_letters, letters(*names), **options)
        then(out_dir)
        raise StopHereError

    return body


def shards(*names: str, **options: Any) -> Body:
    return lambda out_dir, ctx: dict(ctx.map_shards(count_letters, letters(*names), **options))


def done_at_start(events: list[Event]) -> float:
    return next(event.done for event in events if event.kind == "progress")


def test_results_come_back_by_name_and_files_where_they_belong(store: LocalStore) -> None:
    names = ("b", "a", "c d", "=set", "ä")
    path, _ = attempt(store, shards(*names), in_process=False)
    assert {file.name: file.read_text() for file in (path / "letters").iterdir()} == {
        f"{name}.txt": name * 1000 for name in names
    }
    assert list(json.loads((path / "manifest.json").read_text())["metrics"]) == sorted(names)


def test_finished_shards_are_not_made_again_and_other_names_are_refused(store: LocalStore) -> None:
    with pytest.raises(StopHereError):
        attempt(store, stop_after(("a", "b", "c")))
    with pytest.raises(Refusal, match="worked on 3 shards and this one asks for 2") as error:
        attempt(store, shards("a", "b"))
    assert "no longer there: c" in str(error.value)
    path, events = attempt(store, shards("a", "b", "c"))
    assert done_at_start(events) == 3
    assert len(list((path / "letters").iterdir())) == 3


def count_backwards(payload: dict[str, Any], out_dir: Path) -> dict[str, Any]:
    return {"z": {"y": 1, "x": 2}, "a": 3}


def test_a_result_reads_the_same_whether_made_now_or_before_a_kill(store: LocalStore) -> None:
    seen: list[str] = []

    def body(out_dir: Path, ctx: Context) -> dict[str, Any]:
        seen.append(json.dumps(ctx.map_shards(count_backwards, letters("a"))))
        if len(seen) == 1:
            raise StopHereError
        return {}

    with pytest.raises(StopHereError):
        attempt(store, body)
    attempt(store, body)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("damage", ["delete", "cut", "marker"])
def test_a_finished_shard_whose_files_are_gone_or_cut_or_its_marker_changed_is_made_again(
    store: LocalStore, damage: str
) -> None:
    def harm(out_dir: Path) -> None:
        path = out_dir / "letters" / "a.txt"
        [marker] = out_dir.parent.glob("engine/shards/*/a.json")
        if damage == "delete":
            path.unlink()
        elif damage == "cut":
            path.write_text("a")
        else:
            marker.write_text(marker.read_text().replace('"folder"', '"foldes"'))

    with pytest.raises(StopHereError):
        attempt(store, stop_after(("a", "b"), harm))
    path, events = attempt(store, shards("a", "b"))
    assert done_at_start(events) == 1
    assert (path / "letters" / "a.txt").read_text() == "a" * 1000


def test_a_shard_that_silently_changed_is_never_published(store: LocalStore) -> None:
    def flip(out_dir: Path) -> None:
        (out_dir / "letters" / "a.txt").write_text("x" * 1000)

    with pytest.raises(StopHereError):
        attempt(store, stop_after(("a", "b"), flip))
    with pytest.raises(Refusal, match="is not what its shard wrote"):
        attempt(store, shards("a", "b"))


def test_a_stage_may_delete_what_its_shards_wrote(store: LocalStore) -> None:
    def merge(out_dir: Path, ctx: Context) -> dict[str, Any]:
        ctx.map_shards(count_letters, letters("a", "b"))
        parts = sorted((out_dir / "letters").iterdir())
        (out_dir / "all.txt").write_text("".join(part.read_text() for part in parts))
        for part in parts:
            part.unlink()
        return {}

    path, _ = attempt(store, merge)
    assert sorted(file.name for file in path.rglob("*.txt")) == ["all.txt"]


def test_scratch_shards_survive_and_are_not_published(store: LocalStore) -> None:
    with pytest.raises(StopHereError):
        attempt(store, stop_after(("a", "b"), scratch=True))

    def body(out_dir: Path, ctx: Context) -> dict[str, Any]:
        ctx.map_shards(count_letters, letters("a", "b"), scratch=True)
        return {"there": sorted(path.name for path in (ctx.scratch / "letters").iterdir())}

    path, events = attempt(store, body)
    assert done_at_start(events) == 2
    assert [file.name for file in path.iterdir()] == ["manifest.json"]
    assert not list(store.root.glob(".work/*"))


def test_a_call_runs_elsewhere_and_its_error_is_the_stages(store: LocalStore) -> None:
    with pytest.raises(workers.PickyError, match="learning rate"):
        attempt(store, lambda out_dir, ctx: {"x": ctx.call(workers.raise_picky, 2, cpus=2)}, in_process=False)
    path, _ = attempt(store, lambda out_dir, ctx: {"four": ctx.call(workers.double, 2)}, in_process=False)
    assert json.loads((path / "manifest.json").read_text())["metrics"] == {"four": 4}


def test_a_gang_is_started_again_after_a_death_and_given_up_in_the_end(store: LocalStore, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()

    def dies(times: int, max_failures: int) -> Body:
        config = {"folder": str(marks), "times": times}
        return lambda out_dir, ctx: {
            "answer": ctx.gang(workers.rank_0_dies_until, config, workers=1, max_failures=max_failures)
        }

    with pytest.raises(WorkerDiedError, match="gave up after 2 attempts"):
        attempt(store, dies(5, 1), in_process=False)
    assert len(list(marks.iterdir())) == 2
    path, events = attempt(store, dies(4, 2), in_process=False)
    assert len([event for event in events if event.kind == "said" and "Starting all ranks again" in event.line]) == 2
    assert "was killed by SIGKILL" in next(event.line for event in events if event.kind == "said")
    assert "last words" in next(event.line for event in events if event.kind == "said")
    assert (path / "manifest.json").exists()


@pytest.mark.parametrize("in_process", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_driver_looks_about_once_a_second_while_a_gang_runs(store: LocalStore, in_process: bool) -> None:
    looks = []

    def body(out_dir: Path, ctx: Context) -> dict[str, Any]:
        def look() -> None:
            looks.append(time.monotonic())
            ctx.progress("looks", len(looks), None)

        ctx.gang(workers.sleep_in_rank, {"seconds": 2.6}, workers=1, while_waiting=look)
        return {}

    _, events = attempt(store, body, in_process=in_process)
    assert 2 <= len(looks) <= 5
    assert [event.done for event in events if event.kind == "progress"] == list(range(1, len(looks) + 1))


def test_an_error_of_the_driver_beside_a_gang_ends_the_gang(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.engine.backends.local_backend.SAVING_SECONDS", 1.0)  # the ranks do not listen

    def body(out_dir: Path, ctx: Context) -> dict[str, Any]:
        def look() -> None:
            if list(tmp_path.glob("pid*")):
                raise StopHereError

        ctx.gang(workers.wait_for_ever, {"folder": str(tmp_path)}, workers=1, while_waiting=look)
        return {}

    with pytest.raises(StopHereError):
        attempt(store, body, in_process=False)
    (pid,) = tmp_path.glob("pid*")
    deadline = time.monotonic() + 10
    while Path("/proc", pid.name.removeprefix("pid")).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert status([step(body)], store=store)[0].state == "unfinished"
