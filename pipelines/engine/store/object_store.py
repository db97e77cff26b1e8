"""A store in S3 (or anything that speaks its protocol), with a folder on this machine to work in.

    <store>/<step>/<digest16>/manifest.json    an artifact; its files are beside it under t000001/, named by the token
    <store>/.work/<step>-<digest16>/t000001/   what that attempt kept for another machine; its index is kept.json
    the cache folder                           this machine's work folders (`work`) and downloaded inputs (`artifacts`)

Nothing is ever overwritten by two writers: every attempt uploads under its own token, the swap on the lease decides
which one is the artifact, and only then its manifest appears.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from conf.files import json_bytes
from conf.refusal import NO_VALUE, Refusal
from pipelines.engine.files import cache_folder, tree
from pipelines.engine.fingerprint import SHORT
from pipelines.engine.step import Artifact
from pipelines.engine.store import lease as leases
from pipelines.engine.store import manifest as manifests
from pipelines.engine.store.base import Store
from pipelines.engine.store.lease import Lease
from pipelines.engine.store.listed import unlisted
from pipelines.engine.store.objects import Objects, cached_folder, data_folder, move_into_cache
from pipelines.engine.store.records import S3Records
from pipelines.engine.store.sealed import opened, sealed, unsealed
from pipelines.engine.store.work import Work, attempt_name, newest_attempt, token_of, work_name

INDEX = "kept.json"
INDEX_FORMAT = 2  # 1 had neither a format nor, at first, a seal
INDEX_SECONDS = 2.0  # shards finished faster than this are entered in the index together

Entries = dict[str, dict[str, Any]]
"""{path relative to the work folder: {"bytes", "sha256", "at": path in the store}}."""


class ObjectStore(Store):
    """A store at ``s3://bucket/prefix``."""

    def __init__(self, url: str, *, ttl_seconds: float = leases.TTL_SECONDS) -> None:
        super().__init__(ttl_seconds=ttl_seconds)
        self.url = url.rstrip("/")
        self._objects = Objects(self.url)
        self._cache = cache_folder(self.url)
        self.records = S3Records(self._objects, ".leases")
        self.tags = S3Records(self._objects, ".tags", holds_work=False)
        self.file_hashes = self._cache / "file-hashes.jsonl"
        self._kept: dict[Path, Entries] = {}
        self._indexed = 0.0
        self._keeping = threading.Lock()

    def published(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in sorted(self._objects.sizes("")):
            step, _, rest = path.partition("/")
            name, _, file = rest.partition("/")
            if file == manifests.NAME and not step.startswith("."):
                found.setdefault(step, []).append(name)
        return found

    def strays(self) -> list[str]:
        published = {f"{step}/{name}" for step, names in self.published().items() for name in names}
        paths = [path for path in sorted(self._objects.sizes("")) if not path.startswith(".")]
        return [
            f"{self.url}/{path}: no artifact, never read"
            for path in paths
            if path.count("/") < 2 or "/".join(path.split("/")[:2]) not in published
        ]

    def manifest_bytes(self, step: str, name: str) -> bytes | None:
        return self._objects.read(f"{step}/{name}/{manifests.NAME}")

    def hashes_now(self, artifact: Artifact) -> dict[str, str | None]:
        files, sizes = artifact.manifest["files"], self._sizes(artifact)
        folder = data_folder(artifact.step, artifact.manifest)
        return {
            path: self._objects.sha256(f"{folder}/{path}", sizes[path]) if path in sizes else None for path in files
        }

    def seal(self, artifact: Artifact) -> None:
        path = f"{artifact.step}/{artifact.digest[:SHORT]}/{manifests.NAME}"
        self._objects.write(path, json_bytes(sealed(artifact.manifest)))

    def _manifests(self, step: str) -> dict[str, bytes]:
        found = self._objects.read_all(f"{step}/*/{manifests.NAME}")
        return {path.split("/")[-2]: data for path, data in sorted(found.items())}

    def _sizes(self, artifact: Artifact) -> dict[str, int]:
        return self._objects.sizes(data_folder(artifact.step, artifact.manifest))

    def verify(self, artifact: Artifact, self_checking: tuple[str, ...], rechecked: tuple[str, ...] = ()) -> None:
        """What is remote is verified when it is fetched; this machine's copy of it here, and fetched again if need be."""
        self.check(artifact)
        copy = cached_folder(self.url, artifact.manifest)
        if copy.exists():
            files = {path: copy / path for path in artifact.manifest["files"]}
            sizes = {path: file.stat().st_size for path, file in files.items() if file.is_file()}
            whole = all(sizes.get(path) == entry["bytes"] for path, entry in artifact.manifest["files"].items())
            if not whole or self._damage(artifact, copy, self_checking, rechecked) is not None:
                (copy / manifests.NAME).unlink(missing_ok=True)  # `fetch` takes it for none

    def unlisted(self, artifact: Artifact) -> list[str]:
        copy = cached_folder(self.url, artifact.manifest)
        return unlisted(copy, artifact.manifest) if copy.exists() else []

    def open_work(self, lease: Lease, step: str, digest: str, *, resumes: bool) -> Work:
        """This machine's folder of the last attempt goes on if nobody else had it since; else what was kept comes down."""
        folder = self._cache / "work" / work_name(step, digest)
        before = folder / attempt_name(lease.token - 1)
        kept, notes = self._index(step, digest, below=lease.token, floor=lease.floor)
        work = Work(root=folder / attempt_name(lease.token), notes=notes)
        if before.is_dir() and lease.token - 1 >= lease.floor:  # nobody else has had it since: this is the newest
            os.rename(before, work.root)
        else:
            self._objects.download({path: entry["at"] for path, entry in kept.items()}, kept, work.root)
        for older in folder.glob("t[0-9]*"):
            if older.name < work.root.name:
                shutil.rmtree(older, ignore_errors=True)
        self._kept[work.root] = kept
        work.prepare(resumes=resumes)
        return work

    def unfinished(self, step: str, digest: str) -> str | None:
        name = work_name(step, digest)
        newest = newest_attempt(self._cache / "work" / name)
        if newest is not None:
            return str(newest)
        return f"{self.url}/.work/{name}" if self._objects.sizes(f".work/{name}") else None

    def tidy(self, step: str, digest: str) -> None:
        folder = self._cache / "work" / work_name(step, digest)
        if folder.exists() and self.holder(step, digest) is None:
            shutil.rmtree(folder, ignore_errors=True)
            self._objects.delete(f".work/{work_name(step, digest)}")

    def keep(self, work: Work, relpath: str) -> None:
        path = work.out / relpath
        names = [f"{relpath}/{name}" for name in tree(path)] if path.is_dir() else [relpath]
        self._keep(work, instead_of=f"out/{relpath}", paths=[f"out/{name}" for name in names], now=True)

    def keep_shard(self, work: Work, label: str, name: str) -> None:
        marker = work.marker(label, name)
        entries = unsealed(marker)
        if entries is None:
            raise Refusal(marker, NO_VALUE, "is gone or was changed since its shard was finished", "run again")
        files = [work.folder(entries["folder"]) / path for path in entries["files"]]
        paths = [path.relative_to(work.root).as_posix() for path in (*files, work.shard_set(label), marker)]
        self._keep(work, instead_of=None, paths=paths, now=False)

    def _keep(self, work: Work, *, instead_of: str | None, paths: list[str], now: bool) -> None:
        """Upload files and enter them in the attempt's index, in place of those under ``instead_of``."""
        folder = f".work/{work.root.parent.name}/{work.root.name}"
        uploaded: Entries = {}
        for path in paths:
            entry = self._objects.upload(work.root / path, f"{folder}/{path}")
            if entry is not None:
                uploaded[path] = {**entry, "at": f"{folder}/{path}"}
        with self._keeping:
            kept = self._kept[work.root]
            for path in list(kept):
                if instead_of is not None and (path == instead_of or path.startswith(f"{instead_of}/")):
                    del kept[path]
            kept |= uploaded
            if now or time.monotonic() - self._indexed > INDEX_SECONDS:
                self._objects.write(f"{folder}/{INDEX}", json_bytes(sealed({"format": INDEX_FORMAT, "files": kept})))
                self._indexed = time.monotonic()

    def _index(self, step: str, digest: str, *, below: int, floor: int) -> tuple[Entries, tuple[str, ...]]:
        """What the newest earlier attempt that kept anything had kept, and lines to log about its index.

        Raises Refusal for a damaged index.
        """
        found = self._objects.read_all(f".work/{work_name(step, digest)}/*/{INDEX}")
        attempts = {token_of(path.split("/")[-2]): path for path in found}
        usable = [token for token in attempts if token is not None and floor <= token < below]
        if not usable:
            return {}, ()
        path = attempts[max(usable)]
        place = f"{self.url}/{path}"
        try:
            kept, was_sealed = _read_index(found[path], place)
        except (ValueError, LookupError, TypeError) as error:
            folder = place.removesuffix(f"/{INDEX}")
            remedy = f"delete {folder}; then run again: the step begins anew"
            raise Refusal(place, NO_VALUE, f"is damaged ({error})", remedy) from error
        line = f"{place}: written before such records were sealed, so a change to it would not be noticed"
        return kept, () if was_sealed else (line,)

    def publish(self, lease: Lease, work: Work, manifest: dict[str, Any]) -> Artifact:
        artifact = super().publish(lease, work, manifest)
        move_into_cache(work.out, self.url, artifact.manifest)
        shutil.rmtree(work.root.parent, ignore_errors=True)
        self._kept.pop(work.root, None)
        return artifact

    def _stage(self, lease: Lease, work: Work, manifest: dict[str, Any]) -> None:
        data = data_folder(manifest["step"], manifest)
        kept = self._kept[work.root]
        for path, entry in manifest["files"].items():
            lease.check()
            before = kept.get(f"out/{path}", {})
            if before.get("sha256") == entry["sha256"]:
                self._objects.copy(before["at"], f"{data}/{path}", entry["bytes"])
            elif self._objects.upload(work.out / path, f"{data}/{path}") != entry:
                raise Refusal(work.out / path, NO_VALUE, "changed while it was being published", "run again")
        folder = f".work/{work_name(manifest['step'], manifest['digest'])}/{attempt_name(lease.token)}"
        self._objects.write(f"{folder}/{manifests.NAME}", json_bytes(manifest))

    def _finish(self, step: str, digest: str, token: int) -> bool:
        folder = f".work/{work_name(step, digest)}"
        attempt = f"{folder}/{attempt_name(token)}"
        data = self._objects.read(f"{attempt}/{manifests.NAME}")
        if data is not None:
            self.read_manifest(data, f"{self.url}/{attempt}")  # raises if damaged
            self._objects.write(f"{step}/{digest[:SHORT]}/{manifests.NAME}", data)
        if self.find(step, digest) is None:
            return False
        self._objects.delete(folder)
        return True


def _read_index(data: bytes, place: str) -> tuple[Entries, bool]:
    """(what an index lists, whether it was sealed).

    Raises ValueError, LookupError or TypeError for other bytes than were written, Refusal for those of a newer program.
    """
    value, was_sealed = opened(data)
    index_format, entries = value.get("format"), value
    if index_format is not None:
        if not was_sealed:
            raise ValueError("it has no seal, and every one with a format is sealed")
        if index_format != INDEX_FORMAT:
            rule = f"has format {index_format!r:.60} and this program knows {INDEX_FORMAT}: a newer one wrote it"
            raise Refusal(place, NO_VALUE, rule, "continue with that one")
        entries = value["files"]
    for path, entry in entries.items():
        if not manifests.is_entry(path, entry) or not isinstance(entry["at"], str):
            raise ValueError(f"its entry for {path!r:.60} is {entry!r:.60}")
    return entries, was_sealed
