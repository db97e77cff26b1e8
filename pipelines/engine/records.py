"""One small JSON record that many processes change without losing an update: read, then write if nobody else did.

Leases need exactly this and nothing more. On a file system the comparison is made under a file lock; on S3 by the
server (``If-Match`` / ``If-None-Match`` on the object's ETag). Every value written must differ from the one before it
(leases carry a revision), so equal bytes mean the same write.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Protocol

from pipelines.engine.errors import EngineError
from pipelines.engine.files import json_bytes, locked, write_atomic


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A record as it was read. ``age_seconds`` is measured on one clock, the storage's, so skew cannot matter."""

    value: dict[str, Any]
    version: str
    age_seconds: float


class Records(Protocol):
    """Named records with compare-and-swap."""

    def read(self, name: str) -> Seen | None:
        """The record, or None if there is none."""
        ...

    def write(self, name: str, value: dict[str, Any], expected: str | None) -> str | None:
        """Write if the version still is ``expected`` (None: no record yet). Returns the new version; None: lost."""
        ...


class FileRecords(Records):
    """Records as files of one folder, also on a shared file system that has ``flock``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = folder / ".lock"

    def read(self, name: str) -> Seen | None:
        """The bytes themselves are the version; the age is by the file server's clock. Raises EngineError for a record
        that is none."""
        path = self._folder / f"{name}.json"
        try:
            data, written = path.read_bytes(), path.stat().st_mtime
        except FileNotFoundError:
            return None
        try:
            return Seen(value=json.loads(data), version=data.decode(), age_seconds=self._now() - written)
        except ValueError as error:
            raise EngineError(
                f"{path} is damaged ({error}). Delete it, and {self._folder.parent / '.work' / name} if it is there; then "
                "run again: the step begins anew."
            ) from error

    def write(self, name: str, value: dict[str, Any], expected: str | None) -> str | None:
        """Compare and write under a lock of the file system; None where another's version stands."""
        path = self._folder / f"{name}.json"
        data = json_bytes(value)
        with locked(self._lock):
            current = path.read_bytes().decode() if path.exists() else None
            if current != expected:
                return None
            write_atomic(path, data)
        return data.decode()

    def _now(self) -> float:
        """The file server's clock: the time it stamps on a file touched now."""
        try:
            self._lock.touch()
            return self._lock.stat().st_mtime
        except OSError:  # a store that may only be read
            return time.time()


class S3Records(Records):
    """Records as objects under one prefix (``bucket/prefix``) of an S3 file system of ``s3fs``."""

    def __init__(self, filesystem: Any, prefix: str) -> None:
        self._s3 = filesystem
        self._bucket, _, self._prefix = prefix.partition("/")

    def read(self, name: str) -> Seen | None:
        """The ETag is the version; the age is by the server's clock."""
        try:
            data, answer = self._get(name)
        except FileNotFoundError:
            return None
        written: datetime = answer["LastModified"]
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        age_seconds = (now - written).total_seconds()
        return Seen(value=json.loads(data), version=answer["ETag"], age_seconds=age_seconds)

    def write(self, name: str, value: dict[str, Any], expected: str | None) -> str | None:
        """A conditional put; None where another's version stands."""
        data = json_bytes(value)
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        try:
            answer = self._s3.call_s3("put_object", Bucket=self._bucket, Key=self._key(name), Body=data, **condition)
            return str(answer["ETag"])
        except OSError:
            # Refused, or the answer got lost on the way and a retry was refused: what is stored tells which.
            seen = self.read(name)
            if seen is not None and seen.value == value:
                return seen.version
            if (seen.version if seen else None) != expected:
                return None
            raise

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}.json".lstrip("/")

    def _get(self, name: str) -> tuple[bytes, dict[str, Any]]:
        answer = self._s3.call_s3("get_object", Bucket=self._bucket, Key=self._key(name))
        from fsspec.asyn import sync  # the body of an answer is read on the file system's own event loop

        return sync(self._s3.loop, answer["Body"].read), answer
