"""One small JSON record that many processes change without losing an update: read, then write if nobody else did.

Leases need exactly this and nothing more. On a file system the comparison is made under a file lock; on S3 by the
server (``If-Match`` / ``If-None-Match`` on the object's ETag). Every value written must differ from the one before it
(leases carry a revision), so equal bytes mean the same write.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from conf.files import json_bytes, read_file, write_atomic
from conf.refusal import NO_VALUE, Refusal
from pipelines.engine.files import locked
from pipelines.engine.store.sealed import opened, sealed

if TYPE_CHECKING:
    from pipelines.engine.store.objects import Objects


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A record as it was read. ``age_seconds`` is measured on one clock, the storage's, so skew cannot matter."""

    value: dict[str, Any]
    version: str
    age_seconds: float
    sealed: bool = True


class Records(Protocol):
    """Named records with compare-and-swap."""

    def damaged(self, name: str, why: str) -> Refusal:
        """What to raise for a damaged record."""
        ...

    def names(self) -> list[str]:
        """Names of all records."""
        ...

    def read(self, name: str) -> Seen | None:
        """The record, or None if there is none. Raises Refusal for one that is damaged."""
        ...

    def write(self, name: str, value: dict[str, Any], expected: str | None) -> str | None:
        """Write if the version still is ``expected`` (None: no record yet). Returns the new version; None: lost."""
        ...


def opened_record(records: Records, name: str, data: bytes) -> tuple[dict[str, Any], bool]:
    """The value of a record from its bytes, wherever they were, and whether it is sealed. Raises Refusal for other
    bytes than were written.

    One that was written before records were sealed has no format: it is taken as it is, and the next write seals it.
    """
    try:
        value, was_sealed = opened(data)
        if not was_sealed and "format" in value:
            raise ValueError("it has no seal, and every record with a format is sealed")
        return value, was_sealed
    except ValueError as error:
        raise records.damaged(name, str(error)) from error


def _damaged(record: str | Path, why: str, work: str | Path | None) -> Refusal:
    remedy = "delete it"
    if work is not None:
        remedy += f", and {work} if it is there; then run again: the step begins anew"
    return Refusal(record, NO_VALUE, f"is damaged ({why})", remedy)


class FileRecords(Records):
    """Records as files of one folder, also on a shared file system that has ``flock``.

    holds_work: each is a lease on an attempt, which is not to be believed either where its record is damaged.
    """

    def __init__(self, folder: Path, *, holds_work: bool = True) -> None:
        self._folder = folder
        self._holds_work = holds_work
        self._lock = folder / ".lock"

    def read(self, name: str) -> Seen | None:
        """The bytes themselves are the version; the age is by the file server's clock."""
        data = read_file(self._path(name))
        if data is None:
            return None
        (value, was_sealed), age_seconds = opened_record(self, name, data), 0.0
        with contextlib.suppress(FileNotFoundError):
            age_seconds = self._now() - self._path(name).stat().st_mtime
        return Seen(value=value, version=_version(data), age_seconds=age_seconds, sealed=was_sealed)

    def damaged(self, name: str, why: str) -> Refusal:
        work = self._folder.parent / ".work" / name
        return _damaged(self._path(name), why, work if self._holds_work else None)

    def names(self) -> list[str]:
        return sorted(path.stem for path in self._folder.glob("*.json"))

    def write(self, name: str, value: dict[str, Any], expected: str | None) -> str | None:
        """Compare and write under a lock of the file system; None where another's version stands."""
        data = json_bytes(sealed(value))
        with locked(self._lock):
            current = read_file(self._path(name))
            if (None if current is None else _version(current)) != expected:
                return None
            write_atomic(self._path(name), data)
        return _version(data)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _now(self) -> float:
        """The file server's clock: the time it stamps on a file touched now."""
        try:
            self._lock.touch()
            return self._lock.stat().st_mtime
        except OSError:  # a store that may only be read
            return time.time()


def _version(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


class S3Records(Records):
    """Records as objects under one folder of a store in S3."""

    def __init__(self, objects: Objects, folder: str, *, holds_work: bool = True) -> None:
        self._objects, self._folder, self._holds_work = objects, folder, holds_work

    def read(self, name: str) -> Seen | None:
        """The ETag is the version; the age is by the server's clock."""
        try:
            data, answer = self._objects.get_with_answer(self._path(name))
        except FileNotFoundError:
            return None
        written: datetime = answer["LastModified"]
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        age_seconds = (now - written).total_seconds()
        value, was_sealed = opened_record(self, name, data)
        return Seen(value=value, version=answer["ETag"], age_seconds=age_seconds, sealed=was_sealed)

    def damaged(self, name: str, why: str) -> Refusal:
        url = self._objects.url
        work = f"{url}/.work/{name}" if self._holds_work else None
        return _damaged(f"{url}/{self._path(name)}", why, work)

    def names(self) -> list[str]:
        return sorted(
            path.removesuffix(".json") for path in self._objects.sizes(self._folder) if path.endswith(".json")
        )

    def write(self, name: str, value: dict[str, Any], expected: str | None) -> str | None:
        """A conditional put; None where another's version stands."""
        data = json_bytes(sealed(value))
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        try:
            return self._objects.put_if(self._path(name), data, condition)
        except OSError:
            # Refused, or the answer got lost on the way and a retry was refused: what is stored tells which.
            seen = self.read(name)
            if seen is not None and seen.value == value:
                return seen.version
            if (seen.version if seen else None) != expected:
                return None
            raise

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}.json"
