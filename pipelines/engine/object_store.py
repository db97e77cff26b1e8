"""A store in S3 (or anything that speaks its protocol), with a folder on this machine to work in.

    <store>/<step>/<digest16>/manifest.json    an artifact; its files are beside it under t000001/, named by the token
    <store>/.work/<step>-<digest16>/t000001/   what that attempt kept for another machine; its index is kept.json
    <cache>/work/, <cache>/artifacts/          this machine's work folders and downloaded inputs

Nothing is ever overwritten by two writers: every attempt uploads under its own token, the swap on the lease decides
which one is the artifact, and only then its manifest appears. Credentials and endpoint come from the environment
(``AWS_ENDPOINT_URL``, ``AWS_PROFILE``, ...). The cache is ``ATHANOR_CACHE`` or ``~/.cache/athanor``; when workers run
on other machines than the driver it must be a folder they share.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec

from pipelines.engine import lease as leases
from pipelines.engine import manifest as manifests
from pipelines.engine.errors import EngineError
from pipelines.engine.files import describe, in_parallel, json_bytes, locked, read_json, sha256_of, tree, write_json
from pipelines.engine.fingerprint import SHORT
from pipelines.engine.lease import Lease
from pipelines.engine.records import S3Records
from pipelines.engine.step import Artifact
from pipelines.engine.store import Store, attempt_name, newest_attempt, work_name
from pipelines.engine.work import Work

INDEX = "kept.json"
INDEX_SECONDS = 2.0  # shards finished faster than this are entered in the index together


class ObjectStore(Store):
    """A store at ``s3://bucket/prefix``."""

    def __init__(self, url: str, *, ttl_seconds: float = leases.TTL_SECONDS) -> None:
        super().__init__(ttl_seconds=ttl_seconds)
        self.url = url.rstrip("/")
        self._files, self._root = _filesystem(self.url)
        self._cache = cache_folder(self.url)
        self.records = S3Records(self._files, f"{self._root}/.leases")
        self.file_hashes = self._cache / "file-hashes.jsonl"
        self._kept: dict[Path, dict[str, dict[str, Any]]] = {}
        self._indexed = 0.0
        self._keeping = threading.Lock()

    def find(self, step: str, digest: str) -> Artifact | None:
        manifest = self._read(f"{step}/{digest[:SHORT]}/{manifests.NAME}")
        if manifest is None:
            return None
        url = f"{self.url}/{step}/{digest[:SHORT]}"
        if manifest["digest"] != digest:
            raise EngineError(
                f"{url} holds {manifest['digest']}, not {digest}: it was copied there by hand; delete it."
            )
        return Artifact(step=step, digest=digest, url=url, manifest=manifest)

    def check(self, artifact: Artifact) -> None:
        prefix = _data_prefix(self._path(f"{artifact.step}/{artifact.digest[:SHORT]}"), artifact.manifest)
        sizes = {path: entry["size"] for path, entry in self._files.find(prefix, detail=True).items()}
        for path, entry in artifact.manifest["files"].items():
            if sizes.get(f"{prefix}/{path}") != entry["bytes"]:
                raise EngineError(
                    f"{artifact.url}: {path} is missing or cut short: the artifact is damaged. Delete it to have it "
                    f"made again."
                )

    def all_manifests(self, step: str) -> list[dict[str, Any]]:
        found = self._files.glob(self._path(f"{step}/*/{manifests.NAME}"))
        return [json.loads(data) for data in self._files.cat(found).values()] if found else []

    def open_work(self, lease: Lease, step: str, digest: str, *, resumes: bool) -> Work:
        folder = self._cache / "work" / work_name(step, digest)
        work = Work(root=folder / attempt_name(lease.token))
        before = folder / attempt_name(lease.token - 1)
        kept = self._index(step, digest, below=lease.token, floor=lease.floor)
        if before.is_dir() and lease.token - 1 >= lease.floor:  # nobody else has had it since: this is the newest
            os.rename(before, work.root)
        else:
            self._download({path: entry["key"] for path, entry in kept.items()}, kept, work.root)
        for older in folder.glob("t[0-9]*"):
            if older.name < work.root.name:
                shutil.rmtree(older, ignore_errors=True)
        with self._keeping:
            self._kept[work.root] = kept
        work.prepare(resumes=resumes)
        return work

    def unfinished(self, step: str, digest: str) -> str | None:
        name = work_name(step, digest)
        newest = newest_attempt(self._cache / "work" / name)
        if newest is not None:
            return str(newest)
        return f"{self.url}/.work/{name}" if self._files.find(self._path(f".work/{name}")) else None

    def tidy(self, step: str, digest: str) -> None:
        folder = self._cache / "work" / work_name(step, digest)
        if folder.exists() and self.holder(step, digest) is None:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                self._files.rm(self._path(f".work/{work_name(step, digest)}"), recursive=True)

    def keep(self, work: Work, relpath: str) -> None:
        path = work.out / relpath
        names = [f"{relpath}/{name}" for name in tree(path)] if path.is_dir() else [relpath] if path.is_file() else []
        self._keep(work, drop=f"out/{relpath}", add=[f"out/{name}" for name in names], now=True)

    def keep_shard(self, work: Work, label: str, name: str) -> None:
        marker = work.marker(label, name)
        entries = json.loads(marker.read_bytes())
        folder = work.folder(entries["folder"])
        paths = [*(folder / file for file in entries["files"]), marker, work.shard_set(label)]
        add = [path.relative_to(work.root).as_posix() for path in paths]
        self._keep(work, drop=None, add=add, now=False)

    def _keep(self, work: Work, *, drop: str | None, add: list[str], now: bool) -> None:
        """Upload files (paths relative to the work folder) and enter them in the attempt's index."""
        described = describe(work.root, add, durable=False)
        with self._keeping:
            kept = self._kept[work.root]
            for path in list(kept):
                if drop is not None and (path == drop or path.startswith(f"{drop}/")):
                    del kept[path]
            new = {path: entry for path, entry in described.items() if _plain(kept.get(path)) != entry}
        prefix = self._path(f".work/{work.root.parent.name}/{work.root.name}")
        keys = {path: f"{prefix}/{path}" for path in new}
        if keys:
            self._files.put([str(work.root / path) for path in keys], list(keys.values()))
        with self._keeping:
            kept |= {path: {**entry, "key": keys[path]} for path, entry in new.items()}
            if now or time.monotonic() - self._indexed > INDEX_SECONDS:
                self._files.pipe_file(f"{prefix}/{INDEX}", json_bytes(kept))
                self._indexed = time.monotonic()

    def _index(self, step: str, digest: str, *, below: int, floor: int) -> dict[str, dict[str, Any]]:
        """What the newest earlier attempt that kept anything had kept."""
        found = self._files.glob(self._path(f".work/{work_name(step, digest)}/*/{INDEX}"))
        attempts = {int(path.split("/")[-2][1:]): path for path in found}
        usable = [token for token in attempts if floor <= token < below]
        return dict(json.loads(self._files.cat_file(attempts[max(usable)]))) if usable else {}

    def publish(self, lease: Lease, work: Work, manifest: dict[str, Any]) -> Artifact:
        artifact = super().publish(lease, work, manifest)
        _move_into_cache(work.out, artifact, self._cache)
        shutil.rmtree(work.root.parent, ignore_errors=True)
        with self._keeping:
            self._kept.pop(work.root, None)
        return artifact

    def _stage(self, lease: Lease, work: Work, manifest: dict[str, Any]) -> None:
        step, digest = manifest["step"], manifest["digest"]
        prefix = _data_prefix(self._path(f"{step}/{digest[:SHORT]}"), manifest)
        kept = self._kept[work.root]
        for path, entry in manifest["files"].items():
            lease.check()
            before = kept.get(f"out/{path}")
            if before is not None and _plain(before) == entry:
                self._files.copy(before["key"], f"{prefix}/{path}")
            else:
                self._files.put_file(str(work.out / path), f"{prefix}/{path}")
        staged = f".work/{work_name(step, digest)}/{attempt_name(lease.token)}/{manifests.NAME}"
        self._files.pipe_file(self._path(staged), json_bytes(manifest))

    def _finish(self, step: str, digest: str, token: int) -> bool:
        folder = f".work/{work_name(step, digest)}"
        manifest = self._read(f"{folder}/{attempt_name(token)}/{manifests.NAME}")
        if manifest is not None:
            self._files.pipe_file(self._path(f"{step}/{digest[:SHORT]}/{manifests.NAME}"), json_bytes(manifest))
        if self.find(step, digest) is None:
            return False
        if self._files.exists(self._path(folder)):
            self._files.rm(self._path(folder), recursive=True)
        return True

    def _download(self, keys: dict[str, str], expected: dict[str, dict[str, Any]], folder: Path) -> None:
        """Fetch {relative path: key} into a folder; EngineError if a checksum differs from the expected one."""
        for path in keys:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if keys:
            self._files.get(list(keys.values()), [str(folder / path) for path in keys])
        sums = in_parallel([folder / path for path in keys], sha256_of)
        for (path, key), sha256 in zip(keys.items(), sums, strict=True):
            if sha256 != expected[path]["sha256"]:
                raise EngineError(f"s3://{key} is not what was uploaded (checksum): delete it and run again.")

    def _read(self, relpath: str) -> Any:
        try:
            return json.loads(self._files.cat_file(self._path(relpath)))
        except FileNotFoundError:
            return None

    def _path(self, relpath: str) -> str:
        return f"{self._root}/{relpath}"


def fetch(artifact: Artifact) -> Path:
    """The artifact's files in this machine's cache; downloaded once, verified, however many processes ask."""
    cache = cache_folder(artifact.url.rsplit("/", 2)[0])
    folder = _cached(artifact, cache)
    with locked(folder.with_name(f".{folder.name}.lock")):
        if (read_json(folder / manifests.NAME) or {}).get("digest") == artifact.digest:
            return folder
        store = ObjectStore(artifact.url.rsplit("/", 2)[0])
        prefix = _data_prefix(artifact.url.removeprefix("s3://"), artifact.manifest)
        entries = artifact.manifest["files"]
        arriving = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        try:
            store._download({path: f"{prefix}/{path}" for path in entries}, entries, arriving)
            _move_into_cache(arriving, artifact, cache)
        finally:
            shutil.rmtree(arriving, ignore_errors=True)
    return folder


def _move_into_cache(source: Path, artifact: Artifact, cache: Path) -> None:
    folder = _cached(artifact, cache)
    folder.parent.mkdir(parents=True, exist_ok=True)
    source.mkdir(parents=True, exist_ok=True)
    write_json(source / manifests.NAME, artifact.manifest)
    if folder.exists():
        os.rename(folder, folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.old"))
    os.rename(source, folder)


def _cached(artifact: Artifact, cache: Path) -> Path:
    return cache / "artifacts" / artifact.step / artifact.digest[:SHORT]


def cache_folder(url: str) -> Path:
    """This machine's folder for a store: work in progress, downloaded artifacts, hashes of files."""
    base = Path(os.environ.get("ATHANOR_CACHE") or Path.home() / ".cache" / "athanor")
    where = f"{os.environ.get('AWS_ENDPOINT_URL', '')} {url}"
    return base / hashlib.sha256(where.encode()).hexdigest()[:SHORT]


def _filesystem(url: str) -> tuple[Any, str]:
    # Listings must show what other processes did a moment ago.
    filesystem, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return filesystem, str(root).rstrip("/")


def _data_prefix(folder: str, manifest: dict[str, Any]) -> str:
    return f"{folder}/{attempt_name(manifest['token'])}"


def _plain(entry: dict[str, Any] | None) -> dict[str, Any] | None:
    """An index entry as manifests describe files."""
    return {"bytes": entry["bytes"], "sha256": entry["sha256"]} if entry else None
