"""The folder in which one attempt builds an artifact, and what in it survives a kill.

    <root>/out/            what the stage writes; published as a whole
    <root>/engine/shards/  one marker per finished shard: its result and the checksums of its files
    <root>/engine/tmp/     shards in the making
    <root>/engine/scratch/ the stage's own notes, never published

Every attempt has its own root, named by its fencing token; taking a step over renames the folder. A process that lost
its lease therefore writes to paths that are no longer there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from conf.files import fsync, read_file, write_json
from conf.refusal import NO_VALUE, Refusal
from pipelines.engine.files import describe, tree
from pipelines.engine.fingerprint import SHORT
from pipelines.engine.store import manifest
from pipelines.engine.store.sealed import opened, sealed, unsealed


@dataclass(frozen=True, kw_only=True)
class Work:
    """One attempt's folder; can be pickled, so worker processes use it too."""

    root: Path
    notes: tuple[str, ...] = ()
    """Lines to log about what earlier attempts left."""

    @property
    def out(self) -> Path:
        """What the stage writes; published as a whole."""
        return self.root / "out"

    @property
    def scratch(self) -> Path:
        """The stage's own notes, never published."""
        return self.root / "engine" / "scratch"

    @property
    def logs(self) -> Path:
        """What ranks of gangs printed."""
        return self.root / "engine" / "logs"

    @property
    def failure(self) -> Path:
        """Error message of the last attempt, until the next one begins."""
        return self.root / "engine" / "failure.txt"

    def folder(self, kind: str) -> Path:
        """Where shards put their files: "out" or "scratch"."""
        return {"out": self.out, "scratch": self.scratch}[kind]

    def marker(self, label: str, name: str) -> Path:
        """The done-marker of a shard."""
        return self.root / "engine" / "shards" / quote(label, safe="") / f"{quote(name, safe='')}.json"

    def shard_set(self, label: str) -> Path:
        """The file that holds the names of all shards of a label."""
        return self.marker(label, "x").with_name(SET_NAME)

    def prepare(self, *, resumes: bool) -> None:
        """Make the folders; unless the stage resumes by itself, leave only what finished shards wrote."""
        shutil.rmtree(self.root / "engine" / "tmp", ignore_errors=True)
        for folder in (self.out, self.scratch, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        self.failure.unlink(missing_ok=True)
        (self.out / manifest.NAME).unlink(missing_ok=True)  # from an attempt that died while publishing
        if not resumes:
            self._sweep()

    def _sweep(self) -> None:
        finished = self.finished_files()
        for relpath in tree(self.out):
            if relpath not in finished:
                (self.out / relpath).unlink()
        for folder, _, _ in os.walk(self.out, topdown=False):
            if Path(folder) != self.out and not os.listdir(folder):
                os.rmdir(folder)

    def finished_files(self) -> dict[str, dict[str, Any]]:
        """{relative path: {"bytes", "sha256"}} of every file that finished shards wrote into ``out``."""
        found: dict[str, dict[str, Any]] = {}
        for path in (self.root / "engine" / "shards").glob("*/*.json"):
            if path.name != SET_NAME:
                marker = unsealed(path)
                found |= marker["files"] if marker is not None and marker["folder"] == "out" else {}
        return found

    def finished_shards(self, label: str, names: list[str]) -> dict[str, dict[str, Any]]:
        """Results of the shards that are done. Raises Refusal if the set of shards is another than before."""
        set_path = self.shard_set(label)
        before = self._set_before(set_path)
        if before is None:
            write_json(set_path, sealed({"names": names}))
        elif before != names:
            raise _changed_set(label, before, names, self.root)
        done = {}
        for name in names:
            marker = unsealed(self.marker(label, name))
            if marker is not None and self._intact(marker):
                done[name] = marker["result"]
        return done

    def _set_before(self, path: Path) -> list[str] | None:
        data = read_file(path)
        if data is None:
            return None
        try:
            if data.startswith(b"["):  # written before seals
                return sorted(map(str, json.loads(data)))
            value, was_sealed = opened(data)
            if not was_sealed:
                raise ValueError("it has no seal")
            return sorted(map(str, value["names"]))
        except (ValueError, LookupError, TypeError) as error:
            remedy = f"delete {self.root.parent} to start this step over"
            raise Refusal(path, NO_VALUE, f"is damaged ({error})", remedy) from error

    def _intact(self, marker: Mapping[str, Any]) -> bool:
        # Size only: the content is compared with the marker's checksum when the artifact is published.
        folder = self.folder(marker["folder"])
        paths = ((folder / relpath, entry["bytes"]) for relpath, entry in marker["files"].items())
        return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def work_name(step: str, digest: str) -> str:
    """The name of a step's lease and work folder."""
    return f"{step}-{digest[:SHORT]}"


def attempt_name(token: int) -> str:
    """The name of the folder of the attempt with this fencing token; names sort as tokens do."""
    return f"t{token:06d}"


def attempts_in(folder: Path) -> dict[int, Path]:
    """{token: folder} of the attempts in a step's work folder."""
    found = {token_of(path.name): path for path in sorted(folder.glob("t[0-9]*")) if path.is_dir()}
    return {token: path for token, path in found.items() if token is not None}


def token_of(name: str) -> int | None:
    """Token of the attempt whose folder has this name; None for other folders."""
    return int(name[1:]) if re.fullmatch(r"t\d{6,}", name) else None


def newest_attempt(folder: Path) -> Path | None:
    """The folder of the attempt with the highest token, if there is any."""
    attempts = attempts_in(folder)
    return attempts[max(attempts)] if attempts else None


SET_NAME = "=set.json"  # quote() writes "=" as %3D, so no shard can be called this


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard of an attempt: whose it is, what it is called, where its files go ("out" or "scratch")."""

    work: Work
    label: str
    name: str
    folder: str


def run_shard(shard: Shard, fn: Callable[[Any, Path], dict[str, Any]], payload: Any) -> dict[str, Any]:
    """Make one shard (in a worker process): build aside, force to disk, move in, mark as done."""
    work = shard.work
    if not work.out.is_dir():
        raise Refusal(
            work.out,
            NO_VALUE,
            "does not exist on this machine, where a worker was started",
            "put the store on a file system that all machines of the cluster share, or on s3://",
        )
    building = work.root / "engine" / "tmp" / uuid.uuid4().hex
    building.mkdir(parents=True)
    result = as_json(fn(payload, building), f"the result of shard {shard.name}")
    files = describe(building, tree(building), durable=True)
    for relpath in files:
        target = work.folder(shard.folder) / relpath
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(building / relpath, target)
        fsync(target.parent)
    marker = sealed({"result": result, "files": files, "folder": shard.folder})
    write_json(work.marker(shard.label, shard.name), marker)
    shutil.rmtree(building, ignore_errors=True)
    return result


def as_json(value: Any, what: str) -> dict[str, Any]:
    """``value`` as it reads back from JSON; Refusal if it is not such a mapping.

    Tuples become lists, NaN becomes null, and keys are sorted as in a marker: what a stage writes from a result must not
    tell whether the result was made now or before a kill.
    """
    try:
        plain = json.loads(json.dumps(value, sort_keys=True), parse_constant=lambda _: None)
    except (TypeError, ValueError) as error:
        raise Refusal(what, NO_VALUE, f"must be a mapping of names to JSON values ({error})") from error
    if not isinstance(plain, dict):
        raise Refusal(what, value, "must be a mapping of names to JSON values")
    return plain


def _changed_set(label: str, before: list[str], now: list[str], root: Path) -> Refusal:
    gone, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
    return Refusal(
        label,
        NO_VALUE,
        f"an earlier attempt worked on {len(before)} shards and this one asks for {len(now)} (no longer there: "
        f"{', '.join(gone[:3]) or 'none'}; new: {', '.join(new[:3]) or 'none'}). Mixing them would publish something no "
        "single run makes",
        f"ask for the former set of shards again, or delete {root.parent} to start this step over",
    )
