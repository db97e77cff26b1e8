"""A store in S3, on a real server process on loopback: the promises of a disk, and another machine continues."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from damage import LEASES, MANIFESTS
from engine_program import graph, make
from test_engine_kills import lines_until, made_by, start
from test_leases import paused, take
from test_runner import joined, letters

from conf.refusal import Refusal
from pipelines.engine import waiting
from pipelines.engine.backends.local_backend import LocalBackend
from pipelines.engine.events import Event
from pipelines.engine.runner import plan, run, status
from pipelines.engine.store import objects
from pipelines.engine.store.lease import LeaseLostError
from pipelines.engine.store.object_store import ObjectStore
from pipelines.engine.store.objects import Objects, is_copy
from pipelines.engine.store.open import open_store
from pipelines.engine.store.sealed import sealed
from pipelines.engine.store.verify import findings
from pipelines.engine.store.work import Work

pytestmark = pytest.mark.slow


def on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int = 2) -> None:
    monkeypatch.setenv("ATHANOR_CACHE", str(tmp_path / f"machine{number}"))


def test_what_is_made_there_is_what_is_made_on_a_disk(
    bucket: str, tmp_path: Path, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk = make(open_store(tmp_path / "store"), backend, graph()[:1])
    assert make(open_store(f"{bucket}/store"), backend, graph()[:1]) == on_disk
    on_another_machine(tmp_path, monkeypatch)
    store = open_store(f"{bucket}/store")
    reports = run(graph()[:1], store=store, backend=backend)
    assert [report.state for report in reports] == ["cached", "cached"]
    artifact = store.find("walk", reports[1].digest)
    assert artifact is not None
    assert sorted(path.name for path in artifact.path.iterdir()) == [
        "checkpoints",
        "final.txt",
        "log.txt",
        "manifest.json",
    ]
    assert artifact.path.is_relative_to(tmp_path / "machine2")
    downloaded = (artifact.path / "final.txt").stat().st_mtime_ns
    assert (artifact.path / "final.txt").stat().st_mtime_ns == downloaded  # once
    assert store._objects.sizes(".work") == {}  # type: ignore[attr-defined]


def test_another_machine_continues_a_killed_run(
    bucket: str, tmp_path: Path, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = make(open_store(tmp_path / "store"), backend, graph()[:1])
    url = f"{bucket}/store"
    driver = start(url, "--target", "0", "--ttl", "2", "--backend", "in-process", SHARD_SECONDS="1.1")  # type: ignore[arg-type]
    # The index is written with the first shard and then every two seconds: with the third at the latest.
    list(lines_until(driver, "progress letters again 4"))
    driver.kill()
    driver.wait()
    on_another_machine(tmp_path, monkeypatch)
    second = start(url, "--target", "0", "--ttl", "2", "--backend", "in-process", STEP_SECONDS="0.3")  # type: ignore[arg-type]
    lines = list(lines_until(second, "progress walk steps 3"))
    assert int(next(line for line in lines if line.startswith("progress letters again")).split()[3]) >= 3
    second.kill()
    second.wait()
    on_another_machine(tmp_path, monkeypatch, 3)
    third = start(url, "--target", "0", "--ttl", "2", "--backend", "in-process")  # type: ignore[arg-type]
    first = next(line for line in lines_until(third, "progress walk") if line.startswith("progress walk"))
    assert first.split()[3] in ("3", "4")  # the third checkpoint may have been kept just before the kill, or not
    assert made_by(third) == undisturbed


def test_a_machine_that_worked_on_an_older_attempt_discards_it(bucket: str, tmp_path: Path) -> None:
    store = open_store(f"{bucket}/store", ttl_seconds=0.3)
    digest = "a" * 64
    first = paused(store.acquire("x", digest))  # type: ignore[arg-type]
    work = store.open_work(first, "x", digest, resumes=True)
    (work.out / "old.txt").write_text("old")
    store.keep(work, "old.txt")
    (work.out / "unkept.txt").write_text("lost with its machine")
    time.sleep(1.5)  # S3 tells ages in whole seconds

    os.environ["ATHANOR_CACHE"] = str(tmp_path / "machine2")
    elsewhere = open_store(f"{bucket}/store", ttl_seconds=0.3)
    second = paused(elsewhere.acquire("x", digest))  # type: ignore[arg-type]
    there = elsewhere.open_work(second, "x", digest, resumes=True)
    assert [path.name for path in there.out.iterdir()] == ["old.txt"]
    (there.out / "old.txt").unlink()
    elsewhere.keep(there, "old.txt")
    (there.out / "new").mkdir()
    (there.out / "new" / "file.txt").write_text("new")
    elsewhere.keep(there, "new")
    time.sleep(1.5)

    os.environ["ATHANOR_CACHE"] = str(tmp_path / "machine1")
    third = store.acquire("x", digest)
    again = store.open_work(third, "x", digest, resumes=True)  # type: ignore[arg-type]
    assert [path.relative_to(again.out).as_posix() for path in again.out.rglob("*.txt")] == ["new/file.txt"]
    third.release()  # type: ignore[union-attr]


def test_a_paused_owner_cannot_commit_after_a_takeover(bucket: str) -> None:
    records = ObjectStore(f"{bucket}/store").records
    zombie = paused(take(records, ttl_seconds=0.5))
    time.sleep(2.1)
    successor = take(records, ttl_seconds=0.5)
    assert successor.token == zombie.token + 1
    with pytest.raises(LeaseLostError):
        zombie.commit()
    successor.commit()


def test_a_zombie_process_cannot_publish(bucket: str, tmp_path: Path, backend: LocalBackend) -> None:
    url = f"{bucket}/store"
    zombie = start(url, "--target", "0", "--backend", "in-process", "--ttl", "2", STEP_SECONDS="0.3")  # type: ignore[arg-type]
    list(lines_until(zombie, "progress walk steps 2"))
    zombie.send_signal(signal.SIGSTOP)
    try:
        successor = made_by(start(url, "--target", "0", "--backend", "in-process", "--ttl", "2"))  # type: ignore[arg-type]
    finally:
        zombie.send_signal(signal.SIGCONT)
    assert made_by(zombie) == successor
    (walk,) = [report for report in status(graph()[:1], store=open_store(url)) if report.name == "walk"]
    manifest = open_store(url).find("walk", walk.digest).manifest  # type: ignore[union-attr]
    assert manifest["token"] == 2


def test_drivers_that_race_make_each_artifact_once(bucket: str) -> None:
    url = f"{bucket}/store"
    drivers = [
        start(
            url,
            "--target",
            "0",
            "--backend",
            "in-process",
            STEP_SECONDS="0.1",
            ATHANOR_CACHE=f"{os.environ['ATHANOR_CACHE']}{n}",
        )  # type: ignore[arg-type]
        for n in range(3)
    ]
    outputs = [driver.communicate(timeout=90)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0] * 3
    assert sum(output.count("started walk") for output in outputs) == 1


def test_a_download_that_is_not_what_was_published_is_refused(
    bucket: str, tmp_path: Path, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"{bucket}/store")
    make(store, backend, graph()[:1])
    (letters, _) = plan(graph()[:1], store=store)
    key, files = f"{letters.path}/t000001/summary.txt", store._objects.filesystem  # type: ignore[attr-defined]
    files.pipe_file(key, b"x" * len(files.cat_file(key)))  # type: ignore[attr-defined]
    on_another_machine(tmp_path, monkeypatch)
    artifact = open_store(f"{bucket}/store").find("letters", letters.digest)
    assert artifact is not None
    with pytest.raises(Refusal, match="checksum"):
        _ = artifact.path
    files.rm(key)
    shutil.rmtree(tmp_path / "machine2")
    with pytest.raises(Refusal, match=r"summary\.txt: is missing: the artifact is damaged"):
        open_store(f"{bucket}/store").check(artifact)


def test_a_manifest_or_a_lease_that_is_not_as_it_was_written_is_one_sentence(
    bucket: str, backend: LocalBackend
) -> None:
    store = open_store(f"{bucket}/store")
    make(store, backend, [letters()])
    stored = store._objects  # type: ignore[attr-defined]
    name = str(plan([letters()], store=store)[0].path).removeprefix(f"{store.url}/")
    [lease] = stored.sizes(".leases")
    for place, folder, kinds in (
        (f"{name}/manifest.json", f"{store.url}/{name}", MANIFESTS),
        (f".leases/{lease}", f"{store.url}/.leases/{lease}", LEASES),
    ):
        good = stored.read(place)
        for damage in kinds:
            stored.write(place, kinds[damage](good))
            with pytest.raises(Refusal) as refused:
                status([letters()], store=store)
            assert str(refused.value).startswith(folder) and "\n" not in str(refused.value), damage
        stored.delete(place)  # and without a manifest, the lease is looked at
    assert [report.state for report in status([letters()], store=store)] == ["to make"]
    assert run([letters()], store=store, backend=backend)[0].state == "made"


def test_an_index_of_kept_files_is_sealed_and_believed_only_as_it_was_written(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"{bucket}/store")
    digest = "a" * 64
    lease = paused(store.acquire("x", digest))  # type: ignore[arg-type]
    work = store.open_work(lease, "x", digest, resumes=True)
    (work.out / "kept.txt").write_text("kept")
    store.keep(work, "kept.txt")
    lease.release()
    stored = store._objects  # type: ignore[attr-defined]
    index = f".work/{work.root.parent.name}/{work.root.name}/kept.json"
    good = json.loads(stored.read(index))
    assert good == sealed({"format": 2, "files": good["files"]})

    def continued(machine: int, value: Any) -> Work:
        """The work that another machine finds where the index holds this."""
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        stored.write(index, data)
        on_another_machine(tmp_path, monkeypatch, machine)
        there = open_store(f"{bucket}/store")
        lease = paused(there.acquire("x", digest))  # type: ignore[arg-type]
        try:
            return there.open_work(lease, "x", digest, resumes=True)
        finally:
            lease.release()

    outside = {f"out/../../{name}": entry for name, entry in good["files"].items()}
    for damage in (
        *(b"{", {"out/x": {"at": 1}}, {"sha256": "0"}, {**good, "files": {}}, sealed({"format": 2})),
        *({"format": 2, "files": good["files"]}, {"files": good["files"]}, outside, sealed(outside)),
    ):
        with pytest.raises(Refusal, match=rf"{index}: is damaged .* the step begins anew") as refused:
            continued(2, damage)
        assert "\n" not in str(refused.value)
    with pytest.raises(Refusal, match="has format 3 and this program knows 2"):
        continued(2, sealed({"format": 3}))
    for machine, (value, notes) in enumerate(((good, 0), (sealed(good["files"]), 0), (good["files"], 1)), start=3):
        work = continued(machine, value)
        assert (work.out / "kept.txt").read_text() == "kept" and len(work.notes) == notes
    assert work.notes[0].startswith(f"{store.url}/{index}: written before such records were sealed")


def test_a_stranger_in_this_machines_copy_is_not_read(bucket: str, backend: LocalBackend) -> None:
    store = open_store(f"{bucket}/store")
    make(store, backend, [letters()])
    artifact = store.find("letters", plan([letters()], store=store)[0].digest)
    assert artifact is not None
    copy = artifact.path
    (copy / "stranger.parquet").write_text("x")
    assert artifact.path != copy and not (artifact.path / "stranger.parquet").exists()
    assert (artifact.path / "letters.txt").read_text() == "aaa"
    assert store.unlisted(artifact) == ["stranger.parquet"]


def test_a_server_that_takes_connections_and_never_answers_is_one_sentence_in_a_stated_time(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(waiting, "tell", said.append)
    monkeypatch.setattr(waiting, "LOG_AFTER_SECONDS", 0.2)
    monkeypatch.setattr(objects, "ANSWER_SECONDS", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        begun = time.monotonic()
        with pytest.raises(Refusal, match=f"store = '{bucket}/silent': {url} takes connections and gave no answer"):
            status([letters()], store=open_store(f"{bucket}/silent"))
        assert time.monotonic() - begun < 10
    assert [line.partition(" to answer")[0] for line in said] == [f"waiting for {url}"]


def test_a_damaged_copy_on_this_machine_is_fetched_again_before_anything_is_built_on_it(
    bucket: str, tmp_path: Path, backend: LocalBackend
) -> None:
    walk = graph()[0]
    undisturbed = make(open_store(tmp_path / "store"), backend, [walk])
    store = open_store(f"{bucket}/store")
    make(store, backend, [walk.sources["letters"]])
    [summary] = (tmp_path / "machine1").rglob("artifacts/letters/*/summary.txt")
    good = summary.read_bytes()
    summary.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    assert make(store, backend, [walk]) == undisturbed
    letters = store.find("letters", plan([walk], store=store)[0].digest)
    assert letters is not None and (letters.path / "summary.txt").read_bytes() == good


def test_a_bucket_that_is_not_there_is_one_clear_error(bucket: str, backend: LocalBackend) -> None:
    with pytest.raises(Refusal, match="store = 's3://no-such-bucket/x'"):
        run(graph()[:1], store=open_store("s3://no-such-bucket/x"), backend=backend)


def test_other_urls_are_refused_with_the_remedy() -> None:
    with pytest.raises(Refusal, match="a store is a folder or s3://bucket/prefix"):
        open_store("gs://bucket/store")


def test_a_server_that_is_not_there_is_one_clear_error(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(Refusal, match="Could not connect to the endpoint"):
        plan(graph(), store=open_store(f"{bucket}/elsewhere"))


def test_what_is_kept_of_a_growing_or_vanishing_file_is_what_its_checksum_says(bucket: str, tmp_path: Path) -> None:
    there, log, done = Objects(f"{bucket}/store"), tmp_path / "metrics.jsonl", threading.Event()
    log.write_text("first\n")

    def grow() -> None:
        while not done.is_set():
            with log.open("a") as file:
                file.write("another line of the log\n" * 1000)
            time.sleep(0.001)  # faster than any upload, slower than without end

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        for number in range(3):
            entry = there.upload(log, f"log{number}")
            assert entry is not None
            there.download({"log": f"log{number}"}, {"log": entry}, tmp_path / "back")
    finally:
        done.set()
        thread.join()
    assert there.upload(tmp_path / "none", "none") is None


def test_verify_reads_a_bucket_names_its_strays_and_refuses_a_downgraded_manifest(
    bucket: str, backend: LocalBackend
) -> None:
    store = open_store(f"{bucket}/store")
    make(store, backend, [letters()])
    stored = store._objects  # type: ignore[attr-defined]
    artifact = store.find("letters", plan([letters()], store=store)[0].digest)
    assert artifact is not None
    stored.write("notes.txt", b"x")
    stored.write("letters/notes.txt", b"x")
    stored.write("letters/0123456789abcdef/t000001/letters.txt", b"x")  # of an upload that was never published
    intact = list(findings(store))
    assert [finding.damage for finding in intact] == [[]] * 5
    assert [finding.notes[0] for finding in intact if finding.kind == "stray"] == [
        f"{store.url}/{path}: no artifact, never read"
        for path in ("letters/0123456789abcdef/t000001/letters.txt", "letters/notes.txt", "notes.txt")
    ]
    copy = artifact.path
    for place in (artifact.url.removeprefix(f"{store.url}/"), copy):
        path = f"{place}/manifest.json"
        value = json.loads(stored.read(path) if isinstance(place, str) else Path(path).read_bytes())
        del value["sha256"]
        data = json.dumps({**value, "format": 1}).encode()
        stored.write(path, data) if isinstance(place, str) else Path(path).write_bytes(data)
    [damaged] = [finding for finding in findings(store) if finding.damage]
    assert damaged.place == artifact.url and "published by a program that seals" in damaged.damage[0]
    assert not is_copy(copy, artifact.manifest)
    assert artifact.path == copy and is_copy(copy, artifact.manifest)  # fetched again


def test_a_manifest_set_back_to_format_1_whose_lease_is_gone_is_used_and_told(
    bucket: str, backend: LocalBackend
) -> None:
    store = open_store(f"{bucket}/store")
    target = joined(letters())
    make(store, backend, [target])
    stored, url = store._objects, str(plan([letters()], store=store)[0].path)  # type: ignore[attr-defined]
    name = url.removeprefix(f"{store.url}/")
    value = json.loads(stored.read(f"{name}/manifest.json"))
    del value["sha256"]
    changed = {**value, "format": 1, "metrics": {"characters": 7}}
    stored.write(f"{name}/manifest.json", json.dumps(changed).encode())
    stored.delete(f".leases/{name.replace('/', '-')}.json")
    events: list[Event] = []
    reports = run([target], store=store, backend=backend, on_event=events.append)
    assert [(report.state, report.sealed) for report in reports] == [("cached", False), ("cached", True)]
    [line] = [event.line for event in events if event.kind == "said"]  # though nothing asks for it
    assert line.startswith(f"{url}: published before") and f"athanor verify --seal store={store.url}" in line
    assert [report.sealed for report in status([target], store=store)] == [False, True]
    [told] = [finding.notes for finding in findings(store) if finding.unsealed]
    assert told == [f"{url}: its manifest has no seal, so a change to its metrics would not be noticed"]
