"""Objects in S3 and this machine's copies of them.

Credentials and endpoint come from the environment (``AWS_ENDPOINT_URL``, ``AWS_PROFILE``, ...). The cache is
``ATHANOR_CACHE`` or ``~/.cache/athanor``; when workers run on other machines than the driver it must be a folder they
share.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import fsspec.asyn
from fsspec.exceptions import FSTimeoutError

from conf.files import in_parallel, read_file, sha256_of, write_json
from conf.refusal import NO_VALUE, Refusal
from pipelines.engine.files import cache_folder, locked
from pipelines.engine.fingerprint import SHORT
from pipelines.engine.store import manifest as manifests
from pipelines.engine.store.listed import listed
from pipelines.engine.store.work import attempt_name
from pipelines.engine.waiting import waiting

SMALL_BYTES = 32 * 2**20
ANSWER_SECONDS = 60.0  # limit of one call, retries included, plus
SLOWEST_BYTES_PER_SECOND = 100_000  # for the bytes it transfers
FETCH_SECONDS = 12 * 3600.0  # limit for another process of this machine to download an artifact


class Objects:
    """Files under one ``s3://bucket/prefix``, by relative path. Every call ends in a stated time."""

    def __init__(self, url: str) -> None:
        # A connection that is refused is told twice: by the error of the call, and by a log of a task left behind.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        # Listings must show what other processes did a moment ago.
        self.filesystem, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        self.url, self.root = url, str(root).rstrip("/")

    def read(self, path: str) -> bytes | None:
        """The bytes of an object, or None if there is none."""
        try:
            data: bytes = self._ask(path, "_cat_file", self.key(path))
        except FileNotFoundError:
            return None
        return data

    def read_all(self, pattern: str) -> dict[str, bytes]:
        """{relative path: its bytes} of the objects that match a glob pattern."""
        keys = self._ask(pattern, "_glob", self.key(pattern))
        found = self._ask(pattern, "_cat", keys) if keys else {}
        return {key.removeprefix(f"{self.root}/"): data for key, data in found.items()}

    def get_with_answer(self, path: str) -> tuple[bytes, dict[str, Any]]:
        """The bytes of an object, and its metadata."""
        bucket, _, key = self.key(path).partition("/")
        answer = self._ask(path, "_call_s3", "get_object", Bucket=bucket, Key=key)
        return self._wait(path, answer["Body"].read), answer

    def put_if(self, path: str, data: bytes, condition: Mapping[str, str]) -> str:
        """Write under a condition; the ETag. Raises OSError where it does not hold."""
        bucket, _, key = self.key(path).partition("/")
        what: dict[str, Any] = {"Bucket": bucket, "Key": key, "Body": data, **condition}
        answer = self._ask(path, "_call_s3", "put_object", **what)
        return str(answer["ETag"])

    def sha256(self, path: str, size: int) -> str:
        """Of an object of ``size`` bytes, read now in pieces that fit into memory."""
        sha256 = hashlib.sha256()
        for start in range(0, size, SMALL_BYTES):
            end = min(start + SMALL_BYTES, size)
            sha256.update(self._ask(path, "_cat_file", self.key(path), start=start, end=end, size=end - start))
        return sha256.hexdigest()

    def write(self, path: str, data: bytes) -> None:
        """Store bytes."""
        self._ask(path, "_pipe_file", self.key(path), data)

    def sizes(self, folder: str) -> dict[str, int]:
        """{path relative to the folder: bytes} of every object under it."""
        prefix = f"{self.key(folder).rstrip('/')}/"
        found = self._ask(folder, "_find", prefix, detail=True)
        return {key.removeprefix(prefix): int(entry["size"]) for key, entry in found.items()}

    def delete(self, folder: str) -> None:
        """Delete everything under a folder; nothing happens if there is nothing."""
        keys = self._ask(folder, "_find", self.key(folder))
        if keys:
            self._ask(folder, "_rm", keys)

    def copy(self, source: str, target: str, size: int) -> None:
        """Copy ``size`` bytes on the server."""
        self._ask(target, "_copy", self.key(source), self.key(target), size=size)

    def _ask(self, path: str, method: str, *args: Any, size: int = 0, **options: Any) -> Any:
        return self._wait(path, getattr(self.filesystem, method), *args, size=size, **options)

    def _wait(self, path: str, function: Callable[..., Any], *args: Any, size: int = 0, **options: Any) -> Any:
        """The server's response. Raises Refusal past the time limit."""
        seconds = ANSWER_SECONDS + size / SLOWEST_BYTES_PER_SECOND
        server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "S3"
        try:
            with waiting(f"{server} to answer about {self.url}/{path}", seconds):
                return fsspec.asyn.sync(self.filesystem.loop, function, *args, timeout=seconds, **options)
        except FSTimeoutError as error:
            raise Refusal(
                "store",
                self.url,
                f"{server} takes connections and gave no answer about {path} in {seconds:.0f} s",
                "check that AWS_ENDPOINT_URL names an S3 server and that it is well, then run again: what is finished is "
                "kept",
            ) from error

    def upload(self, source: Path, path: str) -> dict[str, Any] | None:
        """Upload a file as it is at one moment: {"bytes", "sha256"} of what was uploaded, None if it is gone.

        The file may be growing (a log) or about to be deleted (an old checkpoint) while this happens.
        """
        try:
            while True:
                before = source.stat()
                if before.st_size <= SMALL_BYTES:
                    data = source.read_bytes()
                    self._ask(path, "_pipe_file", self.key(path), data, size=len(data))
                    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                sha256 = sha256_of(source)
                self._ask(path, "_put_file", str(source), self.key(path), size=before.st_size)
                after = source.stat()
                if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
                    return {"bytes": before.st_size, "sha256": sha256}
        except FileNotFoundError:
            return None

    def download(self, paths: Mapping[str, str], expected: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """Fetch {path in the folder: path here}; Refusal if a checksum is not the expected one."""
        for name in paths:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if paths:
            keys = [self.key(path) for path in paths.values()]
            size = sum(int(expected[name]["bytes"]) for name in paths)
            try:
                self._ask(f"{len(keys)} files", "_get", keys, [str(folder / name) for name in paths], size=size)
            except FileNotFoundError as error:
                raise Refusal(
                    self.url, NO_VALUE, f"an object is missing ({error})", "run again: what lacks it is refused"
                ) from error
        sums = in_parallel([folder / name for name in paths], sha256_of)
        for (name, path), sha256 in zip(paths.items(), sums, strict=True):
            if sha256 != expected[name]["sha256"]:
                raise Refusal(
                    f"{self.url}/{path}", NO_VALUE, "is not what was uploaded (checksum)", "delete it and run again"
                )

    def key(self, path: str) -> str:
        """bucket/key of a relative path."""
        return f"{self.root}/{path}"


def data_folder(step: str, manifest: Mapping[str, Any]) -> str:
    """Where in a store the files of a published artifact are: under the token of the attempt that made them."""
    return f"{step}/{manifest['digest'][:SHORT]}/{attempt_name(manifest['token'])}"


def fetch(url: str, manifest: Mapping[str, Any]) -> Path:
    """The files of the artifact at ``url`` in this machine's cache; downloaded once, however many processes ask."""
    store_url = url.rsplit("/", 2)[0]
    folder = cached_folder(store_url, manifest)
    lock = folder.with_name(f".{folder.name}.lock")
    with locked(lock, why=f"downloads {url} for all on this machine", seconds=FETCH_SECONDS):
        if is_copy(folder, manifest):
            return listed(folder, manifest)
        data = data_folder(manifest["step"], manifest)
        entries = manifest["files"]
        arriving = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        try:
            Objects(store_url).download({path: f"{data}/{path}" for path in entries}, entries, arriving)
            move_into_cache(arriving, store_url, manifest)
        finally:
            shutil.rmtree(arriving, ignore_errors=True)
    return listed(folder, manifest)


def is_copy(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a folder's manifest is this artifact's, but for its seal; a remade artifact has another under the same
    digest."""
    try:
        data = read_file(folder / manifests.NAME)
        there = manifests.read(data, str(folder)) if data is not None else {}
    except Refusal:
        return False
    return manifests.without_seal(there) == manifests.without_seal(manifest)


def move_into_cache(source: Path, store_url: str, manifest: Mapping[str, Any]) -> None:
    """Make a folder this machine's copy of an artifact."""
    folder = cached_folder(store_url, manifest)
    folder.parent.mkdir(parents=True, exist_ok=True)
    source.mkdir(parents=True, exist_ok=True)
    write_json(source / manifests.NAME, manifest)
    if folder.exists():
        os.rename(folder, folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.old"))
    os.rename(source, folder)


def cached_folder(store_url: str, manifest: Mapping[str, Any]) -> Path:
    """Where this machine keeps its copy of an artifact."""
    return cache_folder(store_url) / "artifacts" / manifest["step"] / manifest["digest"][:SHORT]
