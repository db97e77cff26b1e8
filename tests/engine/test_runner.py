"""The walk over a graph: what is skipped, what runs beside what, what is reported, what an error leaves behind."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from conf.refusal import Refusal
from pipelines.engine import files
from pipelines.engine.backends.base import Backend
from pipelines.engine.backends.local_backend import LocalBackend
from pipelines.engine.events import Event
from pipelines.engine.explain import why
from pipelines.engine.runner import plan, run, status
from pipelines.engine.step import Inputs, Step
from pipelines.engine.store.lease import Lease
from pipelines.engine.store.local import LocalStore
from pipelines.engine.store.open import open_store


@dataclass(frozen=True, kw_only=True)
class Settings:
    letter: str = "a"
    times: int = 3
    workers: int = field(default=1, metadata={"execution": True})


def write_letters(settings: Settings, inputs: Inputs, out_dir: Path, ctx: Any) -> dict[str, Any]:
    text = settings.letter * settings.times
    (out_dir / "letters.txt").write_text(text)
    return {"characters": len(text), "workers": settings.workers}


def join(settings: Any, inputs: Inputs, out_dir: Path, ctx: Any) -> dict[str, Any]:
    text = "".join((artifact.path / "letters.txt").read_text() for artifact in inputs.by_key.values())
    (out_dir / "letters.txt").write_text(text)
    return {"characters": len(text)}


def letters(name: str = "letters", *, run: Any = write_letters, version: int = 1, **settings: Any) -> Step:
    return Step(name=name, kind="letters", run=run, version=version, settings=Settings(**settings))


def joined(*inputs: Step, name: str = "joined", **more: Any) -> Step:
    sources = {f"part{number}": step for number, step in enumerate(inputs)}
    keys = {f"parts/{part}": part for part in sources}
    return Step(
        name=name,
        kind="letters",
        run=join,
        version=1,
        settings={"sep": ""},
        inputs={"parts": sources},
        keys=keys,
        **more,
    )


def digests(step: Step, store: LocalStore) -> dict[str, str]:
    return {report.name: report.digest for report in plan([step], store=store)}


def test_a_second_run_makes_nothing_and_says_so(store: LocalStore, backend: Backend) -> None:
    target = joined(letters(), letters("more", letter="b"))
    assert [(report.name, report.state) for report in plan([target], store=store)] == [
        ("letters", "to make"),
        ("more", "to make"),
        ("joined", "to make"),
    ]
    first = run([target], store=store, backend=backend)
    assert [report.state for report in first] == ["made"] * 3
    events: list[Event] = []
    second = run([target], store=store, backend=backend, on_event=events.append)
    assert [report.state for report in second] == ["cached"] * 3
    assert {event.kind for event in events} == {"cached"}
    assert second[2].metrics == {"characters": 6}
    assert second[2].bytes == 6
    assert Path(str(second[2].path), "letters.txt").read_text() == "aaabbb"


def test_nothing_is_written_by_plan_and_status(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a tale")
    monkeypatch.setattr(files, "RACY_SECONDS", -1.0)  # not so young that its hash is not remembered
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    step = replace(letters(), files={"text": (text,)})
    for made in (store, open_store("runs")):
        plan([joined(step)], store=made)
        status([joined(step)], store=made)
    assert not store.root.exists() and list(here.iterdir()) == []
    assert json.loads(store.file_hashes.read_text())[0] == str(text)  # among what this machine remembers


def test_where_hashes_cannot_be_remembered_files_are_hashed_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no-folder").write_text("")
    monkeypatch.setenv("ATHANOR_CACHE", str(tmp_path / "no-folder"))
    text = tmp_path / "text.txt"
    text.write_text("a tale")
    monkeypatch.setattr(files, "RACY_SECONDS", -1.0)
    [report] = plan([replace(letters(), files={"text": (text,)})], store=open_store(tmp_path / "store"))
    assert report.state == "to make"


def test_an_input_that_is_gone_is_not_made_when_nothing_asks_for_it(store: LocalStore, backend: Backend) -> None:
    import shutil

    target = joined(letters())
    reports = run([target], store=store, backend=backend)
    shutil.rmtree(str(reports[0].path))
    assert [report.state for report in plan([target], store=store)] == ["not needed", "cached"]
    assert [report.state for report in run([target], store=store, backend=backend)] == ["not needed", "cached"]


@pytest.mark.parametrize(
    ("changed", "moved"),
    [
        ({"workers": 5}, set()),
        ({"letter": "z"}, {"letters", "joined"}),
        ({"times": 4}, {"letters", "joined"}),
        ({"version": 2}, {"letters", "joined"}),
    ],
)
def test_exactly_the_steps_downstream_of_an_identity_change_move(
    store: LocalStore, changed: dict[str, Any], moved: set[str]
) -> None:
    before = digests(joined(letters(), letters("other")), store)
    after = digests(joined(letters(**changed), letters("other")), store)
    assert {name for name in before if before[name] != after[name]} == moved


def test_how_a_step_runs_is_not_what_it_makes(store: LocalStore) -> None:
    step = joined(letters())
    for changed in ({"cpus": 2}, {"gpus": 1}, {"volatile": ("x",)}, {"resumes": True}, {"run": write_letters}):
        assert digests(replace(step, **changed), store) == digests(step, store)


def test_files_enter_by_content_and_name_not_by_place(store: LocalStore, tmp_path: Path) -> None:
    def step(folder: str, name: str, text: str) -> Step:
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return replace(letters(), files={"corpus": (path,)})

    first = digests(step("one", "a.txt", "hello"), store)
    assert digests(step("two", "a.txt", "hello"), store) == first
    assert digests(step("one", "a.md", "hello"), store) != first
    assert digests(step("one", "a.txt", "hellO"), store) != first
    with pytest.raises(Refusal, match="cannot be read"):
        digests(replace(letters(), files={"corpus": (tmp_path / "none.txt",)}), store)


def test_a_file_that_changes_while_it_is_read_is_not_published_as_what_it_was(
    store: LocalStore, backend: Backend, tmp_path: Path
) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("before")

    def read(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
        path.write_text("after!")
        return {}

    step = replace(letters(run=read), files={"corpus": (path,)})
    with pytest.raises(Refusal, match=r"changed while the step was reading it \(corpus.txt\)"):
        run([step], store=store, backend=backend)
    assert run([step], store=store, backend=backend)[0].state == "made"


def test_equal_steps_are_made_once_however_often_they_occur(store: LocalStore, backend: Backend) -> None:
    events: list[Event] = []
    run([joined(letters(), letters())], store=store, backend=backend, on_event=events.append)
    assert [event.step for event in events if event.kind == "started"] == ["letters", "joined"]


def test_independent_steps_run_side_by_side_within_the_cpus(store: LocalStore, backend: Backend) -> None:
    together = threading.Barrier(2, timeout=5)

    def meet(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
        together.wait()
        return {}

    run([letters("one", run=meet), letters("two", run=meet)], store=store, backend=backend)

    running, most = [0], [0]

    def alone(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.1)
        running[0] -= 1
        return {}

    both = [replace(letters(name, run=alone), cpus=2) for name in ("three", "four")]
    run(both, store=store, backend=backend)
    assert most == [1]


def test_more_than_there_is_is_refused_before_anything_runs(store: LocalStore, backend: Backend) -> None:
    target = joined(letters(), name="hungry", gpus=1)
    with pytest.raises(Refusal, match="hungry: asks for 1 GPUs where there are 0"):
        run([target], store=store, backend=backend)
    assert status([target], store=store)[0].state == "to make"


def test_an_error_leaves_what_is_finished_and_continues(store: LocalStore, backend: Backend) -> None:
    def fail(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
        raise ZeroDivisionError("a bug")

    good, bad = letters(), joined(letters(), name="bad")
    events: list[Event] = []
    with pytest.raises(ZeroDivisionError):
        run([replace(bad, run=fail)], store=store, backend=backend, on_event=events.append)
    assert [event.line for event in events if event.kind == "failed"] == ["a bug"]
    assert [report.state for report in status([bad], store=store)] == ["cached", "unfinished"]
    # Why it ended stands with its state until another attempt begins.
    assert status([bad], store=store)[1].metrics == {"warnings": ["the last attempt ended: a bug"]}
    assert [report.state for report in run([bad], store=store, backend=backend)] == ["cached", "made"]
    assert status([bad], store=store)[1].metrics == {"characters": 3}
    assert digests(good, store)["letters"] in {report.digest for report in status([bad], store=store)}


def failing(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
    raise Refusal("luck", 0, "no such luck")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Settings of a step that is made of what there is."""

    without: dict[str, str] = field(default_factory=dict)


def summarize(settings: Summary, inputs: Inputs, out_dir: Path, ctx: Any) -> dict[str, Any]:
    (out_dir / "summary.json").write_text(json.dumps([sorted(inputs.by_key), settings.without]))
    return {}


def summary(**inputs: Step) -> Step:
    return Step(
        name="summary",
        kind="summary",
        run=summarize,
        version=1,
        settings=Summary(),
        inputs={"all": inputs},
        keys={f"all/{name}": name for name in inputs},
        despite=lambda lost: Summary(without=lost),
    )


def test_a_failed_step_takes_only_what_needs_it_and_a_summary_says_so(store: LocalStore, backend: Backend) -> None:
    bad = replace(letters("bad"), run=failing)
    needs_bad = joined(bad, name="needs-bad")
    target = summary(good=letters("good"), bad=bad, needs_bad=needs_bad, late=joined(letters("later"), name="late"))
    events: list[Event] = []
    with pytest.raises(Refusal, match="no such luck"):
        run([target, needs_bad], store=store, backend=backend, on_event=events.append)
    states = {report.name: report.state for report in status([target], store=store)}
    assert states == {
        "good": "cached",
        "bad": "unfinished",
        "needs-bad": "to make",
        "later": "cached",
        "late": "cached",
        "summary": "to make",  # the whole one: what was made of a part is another artifact
    }
    [made] = store.root.glob("summary/*/summary.json")
    assert json.loads(made.read_text()) == [
        ["good", "late"],
        {"bad": "luck = 0: no such luck.", "needs_bad": "not made: it needs part0"},
    ]
    lines = [event.line for event in events if event.kind == "said"]
    assert lines == ["not made: it needs part0, which is not there", f"made without bad, needs_bad: {made.parent}"]
    better = {**target.sources, "bad": letters("bad"), "needs_bad": joined(letters("bad"), name="needs-bad")}
    reports = run([replace(target, inputs={"all": better})], store=store, backend=backend)
    assert json.loads((Path(str(reports[-1].path)) / "summary.json").read_text()) == [sorted(target.sources), {}]


def test_where_nothing_is_made_there_is_no_summary_and_an_error_with_a_code_of_its_own_ends_the_run(
    store: LocalStore, backend: Backend
) -> None:
    class GoneError(Exception):
        exit_code = 143

    def gone(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
        raise GoneError("the machine is taken away")

    with pytest.raises(Refusal):
        run([summary(bad=replace(letters("bad"), run=failing))], store=store, backend=backend)
    target = summary(gone=replace(letters("gone"), run=gone), after=joined(letters("good"), name="after"))
    with pytest.raises(GoneError):
        run([target], store=store, backend=LocalBackend(cpus=1, gpus=0, in_process=True))
    assert not list(store.root.glob("summary/*")) and not list(store.root.glob("after/*"))


def test_what_a_step_would_refuse_is_refused_before_any_other_runs(store: LocalStore, backend: Backend) -> None:
    def refuse() -> None:
        raise Refusal("this", 1, "cannot be")

    target = replace(joined(letters()), check=refuse)
    with pytest.raises(Refusal, match="cannot be"):
        run([target], store=store, backend=backend)
    assert [report.state for report in status([target], store=store)] == ["to make", "to make"]


def test_leftovers_of_a_failed_attempt_are_never_published(store: LocalStore, backend: Backend) -> None:
    fails = [True]

    def half(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
        if fails.pop():
            (out_dir / "folder").mkdir()
            (out_dir / "folder" / "leftover.txt").write_text("x")
            fails.append(False)
            raise ValueError
        (out_dir / "result.txt").write_text("y")
        return {}

    step = letters(run=half)
    with pytest.raises(ValueError):
        run([step], store=store, backend=backend)
    (report,) = run([step], store=store, backend=backend)
    assert sorted(path.name for path in Path(str(report.path)).iterdir()) == ["manifest.json", "result.txt"]


def test_seconds_are_summed_over_attempts(store: LocalStore, backend: Backend) -> None:
    fails = [False, True]

    def slow(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
        time.sleep(0.3)
        if fails.pop():
            raise ValueError
        return {}

    with pytest.raises(ValueError):
        run([letters(run=slow)], store=store, backend=backend)
    (report,) = run([letters(run=slow)], store=store, backend=backend)
    assert report.seconds is not None
    assert 0.6 <= report.seconds < 2


def test_a_step_held_by_another_is_waited_for_and_its_result_used(store: LocalStore, backend: Backend) -> None:
    step = letters()
    digest = digests(step, store)["letters"]
    lease = store.acquire("letters", digest)
    assert isinstance(lease, Lease)
    assert status([step], store=store)[0].state == "running"
    events: list[Event] = []
    thread = threading.Thread(target=lambda: run([step], store=store, backend=backend, on_event=events.append))
    thread.start()
    deadline = time.monotonic() + 20
    while not events:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    work = store.open_work(lease, "letters", digest, resumes=False)
    (work.out / "by_hand.txt").write_text("x")
    made = {key: dict[str, Any]() for key in ("identity", "inputs", "sources", "metrics")}
    identity = {"step": "letters", "digest": digest, "volatile": [], **made}
    store.publish(lease, work, identity)
    thread.join()
    assert [event.kind for event in events] == ["waiting", "cached"]
    assert "is making it" in events[0].line


def test_ctrl_c_releases_leases_keeps_work_and_goes_on(store: LocalStore, backend: Backend) -> None:
    def interrupt(event: Event) -> None:
        if event.kind == "progress" and event.done == 1:
            threading.Thread(target=press_ctrl_c).start()

    def press_ctrl_c() -> None:
        import _thread

        time.sleep(0.1)
        _thread.interrupt_main()

    def patient(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
        (out_dir / "half.txt").write_text("half")
        for done in range(100):
            ctx.progress("waits", done, 100)
            ctx.still_holds()
            time.sleep(0.05)
        return {}

    step = letters(run=patient)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run([step], store=store, backend=backend, on_event=interrupt)
    assert time.monotonic() - started < 4
    (report,) = status([step], store=store)
    assert report.state == "unfinished"
    assert Path(str(report.path), "out", "half.txt").exists()
    lease = store.acquire("letters", report.digest)
    assert isinstance(lease, Lease)
    lease.release()


def test_a_manifest_tells_everything_and_no_secret(
    store: LocalStore, backend: Backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOME_API_KEY", 'sk-"quoted"-0123456789')

    def tell(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
        return {"url": 'https://x?key=sk-"quoted"-0123456789', "loss": float("nan"), "shape": (1, 2)}

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("text")
    step = replace(joined(letters()), run=tell, files={"corpus": (corpus,)})
    reports = run([step], store=store, backend=backend)
    text = Path(str(reports[1].path), "manifest.json").read_text()
    manifest = json.loads(text)
    assert "0123456789" not in text
    assert manifest["metrics"] == {"url": "https://x?key=<SOME_API_KEY>", "loss": None, "shape": [1, 2]}
    assert manifest["identity"]["inputs"] == {"part0": reports[0].digest}
    assert manifest["inputs"]["part0"]["step"] == "letters"
    assert manifest["sources"]["corpus"][0][0] == "corpus.txt"
    assert manifest["versions"]["ray"]
    assert manifest["token"] == 1
    assert manifest["started"] <= manifest["finished"]
    with pytest.raises(Refusal, match="SOME_API_KEY"):
        run([letters(letter='sk-"quoted"-0123456789')], store=store, backend=backend)


def test_why_names_the_field_the_file_and_the_input(store: LocalStore, backend: Backend, tmp_path: Path) -> None:
    corpus = tmp_path / "a.txt"
    corpus.write_text("one")

    def step(*, times: int = 3, letter: str = "a", text: str = "one") -> Step:
        corpus.write_text(text)
        source = replace(letters(times=times, letter=letter), files={"corpus": (corpus,)})
        return joined(source, letters("other"))

    assert "was never made" in str(why(step(), store=store))
    run([step()], store=store, backend=backend)
    run([step(letter="q", times=9)], store=store, backend=backend)
    assert "is there" in str(why(step(), store=store))
    answer = why(step(times=4), store=store)
    (change,) = answer.changes
    assert change.field == "inputs.part0"
    assert change.because is not None
    assert [(inner.field, inner.before, inner.now) for inner in change.because.changes] == [("settings.times", 3, 4)]
    assert "settings.times: 3 → 4" in str(answer)
    assert "files.corpus: a.txt (of 1) → a.txt (of 1)" in str(why(step(text="two"), store=store))


def stage_that(error: Callable[[], Any]) -> Step:
    def stage(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
        (out_dir / "kept.txt").write_text("x")
        error()
        return {}

    return replace(letters(run=stage), resumes=True)


def test_a_full_disk_is_one_clear_error_and_work_is_kept(store: LocalStore, backend: Backend) -> None:
    def fill() -> None:
        with open("/dev/full", "w") as full:
            full.write("x")

    with pytest.raises(Refusal, match="the disk is full"):
        run([stage_that(fill)], store=store, backend=backend)
    (report,) = status([stage_that(fill)], store=store)
    assert Path(str(report.path), "out", "kept.txt").exists()


def test_a_store_that_cannot_be_written_is_one_clear_error(backend: Backend, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(Refusal, match="cannot be written"):
        run([letters()], store=open_store(tmp_path / "file" / "store"), backend=backend)


def test_other_files_a_step_may_not_leave_are_refused(store: LocalStore, backend: Backend) -> None:
    def link(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
        (out_dir / "link").symlink_to("/etc/passwd")
        return {}

    def own_manifest(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
        (out_dir / "manifest.json").write_text("{}")
        return {}

    def no_json(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> Any:
        return {"path": out_dir}

    for number, (stage, says) in enumerate([(link, "plain files"), (own_manifest, "subfolder"), (no_json, "JSON")]):
        with pytest.raises(Refusal, match=says):
            run([letters(f"bad{number}", run=stage)], store=store, backend=backend)


def test_a_damaged_artifact_is_named_and_not_used(store: LocalStore, backend: Backend) -> None:
    (report,) = run([letters()], store=store, backend=backend)
    Path(str(report.path), "letters.txt").write_text("a")
    assert [report.state for report in status([letters()], store=store)] == ["damaged"]
    with pytest.raises(Refusal, match="has 1 bytes instead of 3: the artifact is damaged"):
        run([joined(letters())], store=store, backend=backend)


def refuse_few(inputs: Inputs) -> None:
    """What tuning refuses of its letters, once they are there."""
    chats = inputs.first("parts")
    if chats is not None and chats.metrics["characters"] < 5:
        raise Refusal("tune.batch", 5, f"only {chats.metrics['characters']} letters")


def tuning() -> tuple[Step, Step, Step]:
    """Chats, a training that comes after them, and a tuning of it on them."""

    def slowly(*given: Any) -> dict[str, Any]:
        time.sleep(0.2)  # a training that waits for its own inputs alone would have begun
        return write_letters(*given)

    chats = letters("chats", run=slowly)
    training = replace(joined(letters("rows"), name="training"), after=(chats,))
    return chats, training, replace(joined(chats, training, name="tuned"), check_inputs=refuse_few)


def test_inputs_that_a_step_refuses_end_the_run_before_what_comes_after_them_begins(
    store: LocalStore, backend: Backend
) -> None:
    _, training, tuned = tuning()
    everything = [training, tuned]  # the training is named before what it comes after
    for state in ("to make", "cached"):  # refused once the chats are made, and then before anything runs
        assert {r.name: r.state for r in plan(everything, store=store)}["chats"] == state
        events: list[Event] = []
        with pytest.raises(Refusal, match="only 3 letters"):
            run(everything, store=store, backend=backend, on_event=events.append)
        assert "training" not in {event.step for event in events if event.kind == "started"}
    with pytest.raises(Refusal, match="only 3 letters"):
        plan(everything, store=store, checked=True)
    plan([training], store=store, checked=True)
    reports = run([training], store=store, backend=backend)  # alone it waits for nobody
    assert [report.name for report in reports] == ["rows", "training"]


def test_what_comes_after_a_failed_step_is_not_made_and_a_summary_says_why(store: LocalStore, backend: Backend) -> None:
    chats, training, _ = tuning()
    bad = replace(chats, run=failing)
    training = replace(training, after=(bad,))
    target = summary(training=training, good=letters("good"), chats=bad)
    with pytest.raises(Refusal, match="no such luck"):
        run([target], store=store, backend=backend)
    [made] = store.root.glob("summary/*/summary.json")
    reason = "not made: it comes after chats, which failed"
    assert json.loads(made.read_text()) == [["good"], {"chats": "luck = 0: no such luck.", "training": reason}]
