"""What is believed of a store: sealed manifests and leases, what they list, and hashes as long as they can be trusted."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from damage import LEASES, MANIFESTS
from test_runner import joined, letters

from conf.refusal import Refusal
from pipelines.__main__ import main
from pipelines.engine import files, waiting
from pipelines.engine.backends.local_backend import LocalBackend
from pipelines.engine.events import Event
from pipelines.engine.explain import why
from pipelines.engine.files import FileHashes, cache_folder, locked
from pipelines.engine.runner import plan, run, status
from pipelines.engine.store.lineage import origin
from pipelines.engine.store.local import LocalStore
from pipelines.engine.store.sealed import sealed
from pipelines.engine.store.work import Work
from pipelines.stages.checksums import check_checksums, write_checksums


def made(store: LocalStore, backend: LocalBackend) -> Path:
    """The folder of the artifact of `letters`."""
    return Path(str(run([letters()], store=store, backend=backend)[0].path))


def age(folder: Path) -> None:
    """Make an artifact and its lease what they were before seals."""
    path, lease_path = folder / "manifest.json", lease_of(folder)
    manifest, lease = json.loads(path.read_bytes()), json.loads(lease_path.read_bytes())
    for value, name in ((manifest, "sha256"), (lease, "sha256"), (lease, "format")):
        value.pop(name, None)
    path.write_text(json.dumps({**manifest, "format": 1}))
    lease_path.write_text(json.dumps(lease))


def lease_of(folder: Path) -> Path:
    """The lease of an artifact's folder."""
    return folder.parent.parent / ".leases" / f"{folder.parent.name}-{folder.name}.json"


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_manifest_that_is_not_the_published_one_is_one_sentence(
    store: LocalStore, backend: LocalBackend, damage: str
) -> None:
    manifest = made(store, backend) / "manifest.json"
    manifest.write_bytes(MANIFESTS[damage](manifest.read_bytes()))
    target = joined(letters())
    for ask in (plan, status, lambda targets, store: run(targets, store=store, backend=backend)):
        with pytest.raises(Refusal) as refused:
            ask([target], store=store)
        assert str(manifest) in str(refused.value) and "\n" not in str(refused.value)
        assert "newer one" in str(refused.value) or f"Delete {manifest.parent}" in str(refused.value)
    with pytest.raises(Refusal, match=r"manifest\.json"):
        why(letters(times=4), store=store)


@pytest.mark.parametrize("damage", LEASES)
def test_a_lease_that_no_process_wrote_is_one_sentence(store: LocalStore, backend: LocalBackend, damage: str) -> None:
    folder = made(store, backend)
    [lease] = store.root.glob(".leases/*.json")
    (folder / "manifest.json").unlink()
    lease.write_bytes(LEASES[damage](lease.read_bytes()))
    for ask in (status, lambda targets, store: run(targets, store=store, backend=backend)):
        with pytest.raises(Refusal) as refused:
            ask([letters()], store=store)
        assert str(refused.value).startswith(f"{lease}: is damaged (") and "\n" not in str(refused.value)
    lease.unlink()  # the remedy
    assert [report.state for report in run([letters()], store=store, backend=backend)] == ["made"]


@pytest.mark.parametrize("what", ["folder", "pipe"])
def test_what_is_no_file_in_the_place_of_a_manifest_or_a_lease_is_one_sentence(
    store: LocalStore, backend: LocalBackend, what: str
) -> None:
    def put(path: Path) -> None:
        path.unlink()
        path.mkdir() if what == "folder" else os.mkfifo(path)

    folder = made(store, backend)
    [lease] = store.root.glob(".leases/*.json")
    put(folder / "manifest.json")
    with pytest.raises(Refusal, match=r"manifest\.json: something else is in the place of a plain file"):
        status([letters()], store=store)
    os.rename(folder, store.root / "aside")
    put(lease)
    for ask in (status, lambda targets, store: run(targets, store=store, backend=backend)):
        with pytest.raises(Refusal, match=r"letters-\w+\.json: something else is in the place of a plain file"):
            ask([letters()], store=store)


def test_a_manifest_from_before_seals_is_used_and_one_line_says_so(store: LocalStore, backend: LocalBackend) -> None:
    age(made(store, backend))
    assert [report.sealed for report in plan([letters()], store=store)] == [False]
    events: list[Event] = []
    assert run([letters()], store=store, backend=backend, on_event=events.append)[0].state == "cached"
    [line] = [event.line for event in events if event.kind == "said"]
    assert f"athanor verify --seal store={store.url}" in line
    events.clear()
    for expected in ("made", "cached"):  # then nothing asks for it any more, and the table at the end shows it
        reports = run([joined(letters())], store=store, backend=backend, on_event=events.append)
        assert [report.state for report in reports] == ["cached", expected]
        assert [event.line for event in events if event.kind == "said"] == [line]
        events.clear()


def test_a_lease_from_before_seals_is_read_and_sealed_by_the_next_write(
    store: LocalStore, backend: LocalBackend
) -> None:
    folder = made(store, backend)
    [lease] = store.root.glob(".leases/*.json")
    value = json.loads(lease.read_bytes())
    assert value == sealed({name: entry for name, entry in value.items() if name != "sha256"})
    del value["sha256"], value["format"]
    lease.write_text(json.dumps(value))
    (folder / "manifest.json").unlink()
    assert run([letters()], store=store, backend=backend)[0].state == "made"
    assert json.loads(lease.read_bytes())["token"] == value["token"] + 1
    assert "sha256" in json.loads(lease.read_bytes())


@pytest.mark.parametrize(
    "data", [b"[1", b'{"names": 3}', b'{"names": ["a", "b"]}', b'{"sha256": "0", "names": ["a"]}', b"7"]
)
def test_a_damaged_list_of_shards_is_one_sentence(tmp_path: Path, data: bytes) -> None:
    work = Work(root=tmp_path / "work" / "t000001")
    work.finished_shards("read", ["a", "b"])
    assert work.finished_shards("read", ["a", "b"]) == {}
    work.shard_set("read").write_bytes(b'["a", "b"]')  # as it was written before seals
    assert work.finished_shards("read", ["a", "b"]) == {}
    work.shard_set("read").write_bytes(data)
    with pytest.raises(Refusal, match=r"is damaged .* to start this step over"):
        work.finished_shards("read", ["a", "b"])


def test_folders_that_are_no_attempts_are_not_taken_for_some(store: LocalStore, backend: LocalBackend) -> None:
    digest = plan([letters()], store=store)[0].digest
    for name in ("t1x", "tmp", "t000001.bak"):
        (store.root / ".work" / f"letters-{digest[:16]}" / name).mkdir(parents=True)
    assert status([letters()], store=store)[0].state == "to make"
    assert run([letters()], store=store, backend=backend)[0].state == "made"


def all_files(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
    """What a stage finds in its input's folder, by patterns, by walking and by asking for a name."""
    folder = inputs["parts"]["part0"].path
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {"found": found, "tokenizer": (folder / "tokenizer.json").exists()}


@pytest.mark.parametrize("stranger", ["00000x.parquet", "tokenizer.json", "sub/x.parquet", ".hidden.parquet", "link"])
def test_a_stage_sees_the_files_of_the_manifest_and_no_stranger(
    store: LocalStore, backend: LocalBackend, tmp_path: Path, stranger: str
) -> None:
    target = replace(joined(letters()), run=all_files)
    clean = run([target], store=store, backend=backend)
    assert clean[1].metrics == {"found": ["letters.txt", "manifest.json"], "tokenizer": False}
    (Path(str(clean[1].path)) / "manifest.json").unlink()

    folder = Path(str(clean[0].path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.parquet").write_text("x")
    if stranger == "link":
        (folder / "link").symlink_to(tmp_path / "elsewhere")
    else:
        (folder / stranger).parent.mkdir(exist_ok=True)
        (folder / stranger).write_text("not of it")
    events: list[Event] = []
    again = run([target], store=store, backend=backend, on_event=events.append)
    assert again[1].metrics == clean[1].metrics
    assert again[1].digest == clean[1].digest
    [line] = [event.line for event in events if event.kind == "said"]
    assert line.startswith(f"{folder / stranger}") and "no part of that artifact" in line


def test_the_folder_of_links_follows_an_artifact_that_is_made_again(store: LocalStore, backend: LocalBackend) -> None:
    folder = made(store, backend)
    artifact = store.find("letters", plan([letters()], store=store)[0].digest)
    assert artifact is not None and artifact.path == folder
    (folder / "stray").write_text("x")
    view = artifact.path
    assert view != folder and (view / "letters.txt").read_text() == "aaa"
    (view / "stray").write_text("put there by hand")
    assert not (artifact.path / "stray").exists()
    (folder / "stray").unlink()
    assert artifact.path == folder


def flip_keeping_times(folder: Path) -> None:
    """Change bytes of a file and give it back its times, as programs that keep mtimes do."""
    path = folder / "letters.txt"
    status = path.stat()
    path.write_text("zzz")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_change_that_keeps_size_and_mtime_is_noticed(
    store: LocalStore, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "RACY_SECONDS", -1.0)
    folder = made(store, backend)
    assert run([joined(letters())], store=store, backend=backend)[1].state == "made"  # and the hash is remembered
    assert store.file_hashes.exists()
    flip_keeping_times(folder)
    with pytest.raises(Refusal, match=r"letters\.txt: is not what was published"):
        run([joined(letters(), name="again")], store=store, backend=backend)


def test_a_source_that_changes_with_its_size_and_mtime_kept_is_another_source(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "RACY_SECONDS", -1.0)
    text = tmp_path / "letters.txt"
    text.write_text("aaa")
    step = replace(letters(), files={"text": (text,)})
    before = plan([step], store=store)[0].digest
    assert plan([step], store=store)[0].digest == before
    flip_keeping_times(tmp_path)
    assert plan([step], store=store)[0].digest != before
    other = tmp_path / "other.txt"
    other.write_text("bbb")
    os.utime(other, ns=(text.stat().st_atime_ns, text.stat().st_mtime_ns))
    os.replace(other, text)  # another inode
    assert plan([step], store=store)[0].digest not in (before, "")


class Hashing:
    """Counts what is hashed, in the place of `sha256_of`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        real: Callable[[Path], str] = files.sha256_of

        def counting(path: Path) -> str:
            self.paths.append(path.name)
            return real(path)

        monkeypatch.setattr(files, "sha256_of", counting)


def test_a_remembered_hash_is_trusted_for_a_while_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RACY_SECONDS", -1.0)
    (text := tmp_path / "a.txt").write_text("a")
    hashing = Hashing(monkeypatch)
    cache = tmp_path / "cache" / "hashes.jsonl"
    for _ in range(2):
        FileHashes(cache).of([text])
    assert hashing.paths == ["a.txt"]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + files.TRUST_SECONDS + 1)
    FileHashes(cache).of([text])
    assert hashing.paths == ["a.txt"] * 2
    monkeypatch.setattr(time, "time", lambda: now - 3600)  # a clock that was set back
    FileHashes(cache).of([text])
    assert hashing.paths == ["a.txt"] * 3


def test_the_file_of_remembered_hashes_does_not_grow_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "RACY_SECONDS", -1.0)
    (text := tmp_path / "a.txt").write_text("a")
    cache = tmp_path / "hashes.jsonl"
    [sha256] = FileHashes(cache).of([text])
    cache.write_bytes(b'["old", 1, 2, "form"]\n{torn\n' + cache.read_bytes() * 1100)
    hashing = Hashing(monkeypatch)
    assert FileHashes(cache).of([text]) == [sha256] and hashing.paths == []
    assert len(cache.read_bytes().splitlines()) == 1


def test_what_leaves_the_store_is_compared_byte_by_byte_whatever_is_remembered(
    store: LocalStore, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "RACY_SECONDS", -1.0)
    folder = made(store, backend)
    run([joined(letters())], store=store, backend=backend)
    rotten = folder / "letters.txt"
    rotten.write_text("zzz")
    # A disk that loses bits moves no time: the cache remembers the file as it now is, with the hash it had.
    state = files._state(rotten)
    published = json.loads((folder / "manifest.json").read_bytes())["files"]["letters.txt"]["sha256"]
    store.file_hashes.write_bytes(files._line(state[0], (state[1], published, time.time())))
    assert run([joined(letters(), name="believes")], store=store, backend=backend)[1].state == "made"
    export = replace(joined(letters(), name="export"), rechecked=("parts/part0/*.txt",))
    with pytest.raises(Refusal, match=r"letters\.txt: is not what was published"):
        run([export], store=store, backend=backend)


def test_files_of_an_artifact_have_the_mode_that_the_umask_gives(store: LocalStore, backend: LocalBackend) -> None:
    def private(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
        (out_dir / "private").mkdir(mode=0o700)
        for path in (out_dir / "weights", out_dir / "private" / "weights", out_dir / "kept"):
            path.write_text("x")
            path.chmod(0o600)  # as safetensors writes
        ctx.keep("kept")
        seen.append(stat.S_IMODE((out_dir / "kept").stat().st_mode))
        ctx.map_shards(shard, {"a": None})
        return {}

    seen: list[int] = []
    before = os.umask(0o027)
    try:
        folder = Path(str(run([letters(run=private)], store=store, backend=backend)[0].path))
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
    assert {name for name, mode in modes.items() if mode == 0o750} == {folder.name, "private"}
    assert {name for name, mode in modes.items() if mode == 0o640} == {"weights", "kept", "manifest.json", "shard"}
    assert seen == [0o640]


def shard(payload: Any, out_dir: Path) -> dict[str, Any]:
    """A shard's file that its library keeps private."""
    (out_dir / "shard").write_text("x")
    (out_dir / "shard").chmod(0o600)
    return {}


def test_a_lock_that_somebody_holds_is_waited_for_aloud_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(waiting, "tell", said.append)
    monkeypatch.setattr(waiting, "LOG_AFTER_SECONDS", 0.05)
    path = tmp_path / "lock"
    refused = pytest.raises(Refusal, match="has been locked for 0 s by another process that downloads")
    with locked(path), refused, locked(path, why="downloads x", seconds=0.3):
        pass
    with locked(path):
        pass
    assert said == [f"waiting for the lock {path}, whose holder downloads x; this gives up after 0 s in all"]


def test_without_a_home_notes_go_into_a_folder_of_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.delenv("ATHANOR_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    folder = cache_folder("store").parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refusal, match="not a folder of this user alone"):
        cache_folder("store")
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(Refusal, match="not a folder of this user alone"):
        cache_folder("store")


def test_verify_reads_every_byte_names_the_damage_and_seals_what_is_whole(
    store: LocalStore, backend: LocalBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    def verified(*options: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            main(["verify", f"store={store.url}", *options])
        return int(str(left.value.code)), capsys.readouterr().out

    reports = run([joined(letters(), letters("more", letter="b"))], store=store, backend=backend)
    (store.root / "notes.txt").write_text("x")
    (store.root / "letters" / "empty").mkdir()
    (store.root / "letters" / "away").symlink_to("/")
    code, said = verified()
    assert code == 0 and said.endswith("all as they were written\n")
    assert f"{store.root}/notes.txt: no artifact" in said and f"{store.root}/letters/empty: no artifact" in said
    assert f"{store.root}/letters/away: a link out of the store, to /" in said
    folders = {report.name: Path(str(report.path)) for report in reports}
    for folder in folders.values():
        age(folder)
    code, said = verified()
    assert code == 0 and "3 without a seal" in said and "all as they were written" not in said
    assert f"athanor verify --seal store={store.url}" in said
    lease = lease_of(folders["more"])
    (folders["letters"] / "stray.txt").write_text("x")
    flip_keeping_times(folders["joined"])
    code, said = verified("--seal")
    assert code == 1 and said.count("is not what was published") == 1 and str(folders["joined"]) in said
    assert f"{folders['letters']}/stray.txt: no part of the artifact, never read" in said
    assert [report.sealed for report in plan([joined(letters(), letters("more", letter="b"))], store=store)] == [
        *(True, True),  # and the damaged one is not sealed
        False,
    ]
    assert "sha256" in json.loads(lease.read_bytes())
    (folders["more"] / "letters.txt").unlink()
    lease.write_text("{")
    code, said = verified()
    assert code == 1 and "letters.txt: is missing" in said and f"{lease}: is damaged" in said
    assert "3 damaged" in said.splitlines()[-1]


def test_verify_takes_a_store_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["verify", "optim.lr=1"])
    assert left.value.code == 2 and "athanor verify store=DIR" in capsys.readouterr().err


def test_an_exported_folder_carries_checksums_that_are_compared(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("model.safetensors", "sub/über uns.txt"):
        (tmp_path / name).write_text(name)
    check_checksums(tmp_path)  # none there
    write_checksums(tmp_path)
    check_checksums(tmp_path)
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path).returncode == 0
    flip = tmp_path / "model.safetensors"
    flip.write_text("model.safetensorz")
    with pytest.raises(Refusal, match=r"model\.safetensors: is not what was exported"):
        check_checksums(tmp_path)
    flip.unlink()
    with pytest.raises(Refusal, match=r"model\.safetensors: is missing"):
        check_checksums(tmp_path)
    (tmp_path / "SHA256SUMS").write_text("garbage\n")
    with pytest.raises(Refusal, match="is no checksum"):
        check_checksums(tmp_path)


def downgrade(manifest: Path) -> None:
    """Make a manifest pass for one from before seals."""
    value = json.loads(manifest.read_bytes())
    del value["sha256"]
    manifest.write_text(json.dumps({**value, "format": 1}))


def test_a_manifest_downgraded_to_format_1_is_refused_outside_its_store_too(
    store: LocalStore, backend: LocalBackend, tmp_path: Path
) -> None:
    def with_tokenizer(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
        (out_dir / "model").mkdir()
        (out_dir / "model" / "config.json").write_text("{}")
        return {}

    tokenizer = letters("tokenizer")
    weights = replace(
        joined(),
        name="pretrain",
        run=with_tokenizer,
        inputs={"tokenizer": {"tokenizer": tokenizer}},
        keys={"tokenizer/tokenizer": "tokenizer"},
    )
    folders = {r.name: Path(str(r.path)) for r in run([weights], store=store, backend=backend)}
    found = origin(folders["pretrain"] / "model")
    assert found is not None and found.tokenizer("pretrain.init_from") == folders["tokenizer"]
    for name, ask in (
        ("tokenizer", lambda: found.tokenizer("pretrain.init_from")),
        ("pretrain", lambda: origin(folders["pretrain"])),
    ):
        downgrade(folders[name] / "manifest.json")
        with pytest.raises(Refusal, match=r"published by a program that seals\)\. Delete "):
            ask()
    copy = shutil.copytree(folders["pretrain"], tmp_path / "copies" / "of" / folders["pretrain"].name)
    assert origin(copy) is not None  # no lease there says how it was published
    for folder in folders.values():
        age(folder)
    assert origin(folders["pretrain"]) is not None
