"""Objects in S3 and this machine's copies of them.

Credentials and endpoint come from the environment (``AWS_ENDPOINT_URL``, ``AWS_PROFILE``, ...). The cache is
``ATHANOR_CACHE`` or ``~/.cache/athanor``; when workers run on other machines than the driver it must be a folder they
share.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec

from pipelines.engine import manifest as manifests
from pipelines.engine.errors import EngineError
from pipelines.engine.files import cache_folder, in_parallel, json_bytes, locked, read_json, sha256_of, write_json
from pipelines.engine.fingerprint import SHORT
from pipelines.engine.work import attempt_name

SMALL_BYTES = 32 * 2**20


class Objects:
    """Files under one ``s3://bucket/prefix``, by relative path."""

    def __init__(self, url: str) -> None:
        # A connection that is refused is told twice: by the error of the call, and by a log of a task left behind.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        # Listings must show what other processes did a moment ago.
        self.filesystem, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        self.root = str(root).rstrip("/")

    def read_json(self, path: str) -> Any:
        """The JSON in an object, or None if there is none."""
        try:
            return json.loads(self.filesystem.cat_file(self.key(path)))
        except FileNotFoundError:
            return None

    def read_all_json(self, pattern: str) -> dict[str, Any]:
        """{relative path: its JSON} of the objects that match a glob pattern."""
        keys = self.filesystem.glob(self.key(pattern))
        found = self.filesystem.cat(keys) if keys else {}
        return {key.removeprefix(f"{self.root}/"): json.loads(data) for key, data in found.items()}

    def write_json(self, path: str, value: Any) -> None:
        """Store a value as JSON, keys sorted."""
        self.filesystem.pipe_file(self.key(path), json_bytes(value))

    def sizes(self, folder: str) -> dict[str, int]:
        """{path relative to the folder: bytes} of every object under it."""
        prefix = f"{self.key(folder)}/"
        found = self.filesystem.find(prefix, detail=True)
        return {key.removeprefix(prefix): int(entry["size"]) for key, entry in found.items()}

    def delete(self, folder: str) -> None:
        """Delete everything under a folder; nothing happens if there is nothing."""
        keys = self.filesystem.find(self.key(folder))
        if keys:
            self.filesystem.rm(keys)

    def copy(self, source: str, target: str) -> None:
        """Copy on the server."""
        self.filesystem.copy(self.key(source), self.key(target))

    def upload(self, source: Path, path: str) -> dict[str, Any] | None:
        """Upload a file as it is at one moment: {"bytes", "sha256"} of what was uploaded, None if it is gone.

        The file may be growing (a log) or about to be deleted (an old checkpoint) while this happens.
        """
        try:
            while True:
                before = source.stat()
                if before.st_size <= SMALL_BYTES:
                    data = source.read_bytes()
                    self.filesystem.pipe_file(self.key(path), data)
                    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                sha256 = sha256_of(source)
                self.filesystem.put_file(str(source), self.key(path))
                after = source.stat()
                if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
                    return {"bytes": before.st_size, "sha256": sha256}
        except FileNotFoundError:
            return None

    def download(self, paths: Mapping[str, str], expected: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """Fetch {path in the folder: path here}; EngineError if a checksum is not the expected one."""
        for name in paths:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if paths:
            keys = [self.key(path) for path in paths.values()]
            self.filesystem.get(keys, [str(folder / name) for name in paths])
        sums = in_parallel([folder / name for name in paths], sha256_of)
        for (name, path), sha256 in zip(paths.items(), sums, strict=True):
            if sha256 != expected[name]["sha256"]:
                raise EngineError(
                    f"s3://{self.key(path)} is not what was uploaded (checksum): delete it and run again."
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
    with locked(folder.with_name(f".{folder.name}.lock")):
        if (read_json(folder / manifests.NAME) or {}).get("digest") == manifest["digest"]:
            return folder
        data = data_folder(manifest["step"], manifest)
        entries = manifest["files"]
        arriving = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        try:
            Objects(store_url).download({path: f"{data}/{path}" for path in entries}, entries, arriving)
            move_into_cache(arriving, store_url, manifest)
        finally:
            shutil.rmtree(arriving, ignore_errors=True)
    return folder


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
