"""Who may build and publish one artifact: a lease with a fencing token, kept in one compare-and-swap record.

The token only ever grows, across owners, releases and kills. A holder renews the lease in the background. Another
process takes it when it was released, when it has not been renewed for ``ttl_seconds``, or at once when its owner was a
process of this machine that is dead.

Publishing is decided by one swap, ``commit``: it succeeds only for the current holder, and afterwards nobody can take
the lease until the committed work is published, by its owner or by whoever comes next. So a process that was paused
past its lease and wakes up cannot publish, whatever it had checked before.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.refusal import NO_VALUE, Refusal
from pipelines.engine.store import manifest as manifests
from pipelines.engine.store.records import Records, Seen
from pipelines.engine.store.work import work_name

TTL_SECONDS = 60.0
FORMAT = 2  # leases without a format may be older than seals


class LeaseLostError(Refusal):
    """Another process has taken the step over; this one must stop writing."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process, told apart from any other on any machine."""

    host: str
    machine: str  # boot and process namespace: the same pid elsewhere is someone else
    pid: int
    started: str  # the kernel's start time of the pid: a reused pid is someone else

    def is_dead(self) -> bool:
        """True only if this certainly is a process of this machine that no longer runs."""
        if self.machine != _machine():
            return False
        return not _runs(self.pid) or _start_of(self.pid) not in ("", self.started)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """A held lease. Renews itself until ``release``, ``commit`` or loss; safe to use from several threads."""

    def __init__(
        self, records: Records, name: str, value: dict[str, Any], version: str, ttl_seconds: float = TTL_SECONDS
    ) -> None:
        self.token: int = value["token"]
        self.floor: int = value["floor"]
        """Work of tokens below this is rubbish left by a zombie."""
        self.lost = threading.Event()
        self._records, self._name = records, name
        self._value, self._version = value, version
        self._started, self._seconds_before = time.monotonic(), float(value["seconds"])
        self._ttl_seconds = ttl_seconds
        self._swap = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease {name}", daemon=True)
        self._thread.start()

    @property
    def seconds(self) -> float:
        """Time spent on this artifact, earlier attempts included (those killed count up to their last renewal)."""
        return self._seconds_before + time.monotonic() - self._started

    def check(self) -> None:
        """Raise LeaseLostError if another process is known to have taken over."""
        if self.lost.is_set():
            raise LeaseLostError(
                self._name,
                NO_VALUE,
                f"this process did not renew its lease for {self._ttl_seconds:.0f} s (paused? cut off from the store?) "
                "and another took the step over. Nothing is lost",
                "run again to use its result",
            )

    def look(self) -> None:
        """Like ``check``, but asks the store first: for when something inexplicable happened to the work folder."""
        with contextlib.suppress(Exception):  # whatever a storage that is out of reach raises
            seen = self._records.read(self._name)
            if seen is None or seen.value.get("nonce") != self._value["nonce"]:
                self.lost.set()
        self.check()

    def commit(self) -> None:
        """Decide that this holder's finished work is the artifact. Raises LeaseLostError if it no longer holds."""
        self._write(state="committed", seconds=self.seconds)

    def release(self, *, published: bool = False) -> None:
        """Give the lease back; the token stays. After loss this does nothing."""
        self._stop.set()
        if self.lost.is_set():
            return
        changes: dict[str, Any] = {"state": "free", "owner": None, "seconds": self.seconds}
        if published:
            changes |= {"floor": self.token + 1, "seconds": 0.0}
        with contextlib.suppress(Exception):  # lost, or the storage is full or out of reach: it runs out by itself
            self._write(**changes)

    def _write(self, **changes: Any) -> None:
        with self._swap:
            self.check()
            value = {**self._value, **changes, "revision": self._value["revision"] + 1}
            version = self._records.write(self._name, value, self._version)
            if version is None:
                seen = self._records.read(self._name)
                if seen is not None and seen.value.get("nonce") == value["nonce"]:
                    # It was this process that wrote last, and never heard so: the answer was lost on its way.
                    value["revision"] = seen.value["revision"] + 1
                    version = self._records.write(self._name, value, seen.version)
            if version is None:
                self.lost.set()
                self.check()
            self._value, self._version = value, str(version)

    def _renew(self) -> None:
        while not self._stop.wait(self._ttl_seconds / 6):
            try:
                with self._swap:
                    if self._stop.is_set() or self._value["state"] != "held":
                        return
                self._write(seconds=self.seconds)
            except LeaseLostError:
                return
            except Exception:
                continue  # storage out of reach: try again; if that lasts, others take over and commit() will refuse


@dataclass(frozen=True, kw_only=True)
class Held:
    """Why a lease was not given: someone else works on it."""

    owner: Owner
    age_seconds: float


def acquire(
    records: Records, name: str, *, digest: str, finish: Callable[[int], bool], ttl_seconds: float = TTL_SECONDS
) -> Lease | Held | None:
    """The lease called ``name``; or who holds it; or None when things have moved meanwhile: look again.

    ``finish(token)`` publishes work that its owner had committed and perhaps did not live to publish, and says whether
    it is there now. ``digest`` (64 hex) guards against two steps whose shortened names collide.
    """
    seen = read(records, name)
    if seen is None:
        previous: dict[str, Any] = {"token": 0, "floor": 1, "seconds": 0.0, "revision": 0, "digest": digest}
    else:
        previous = seen.value
        if previous["digest"] != digest:
            raise Refusal(name, NO_VALUE, f"stands for two different digests, {digest} and {previous['digest']}")
        if previous["state"] == "held" and not _may_be_taken(seen, ttl_seconds):
            return Held(owner=Owner(**previous["owner"]), age_seconds=seen.age_seconds)
        if previous["state"] == "committed":
            if finish(previous["token"]):
                return None
            # Published once and deleted since, by hand: start over.
            previous = {**previous, "floor": previous["token"] + 1, "seconds": 0.0}
    value = {
        **previous,
        "format": FORMAT,
        "state": "held",
        "token": previous["token"] + 1,
        "revision": previous["revision"] + 1,
        "owner": this_process().__dict__,
        "nonce": uuid.uuid4().hex,  # two threads of one process are two owners
    }
    version = records.write(name, value, seen.version if seen else None)
    return Lease(records, name, value, version, ttl_seconds) if version is not None else None


def holder(records: Records, name: str, ttl_seconds: float = TTL_SECONDS) -> Owner | None:
    """Who is at work on it now, if anyone."""
    seen = read(records, name)
    if seen is None or seen.value["state"] != "held" or _may_be_taken(seen, ttl_seconds):
        return None
    return Owner(**seen.value["owner"])


def read(records: Records, name: str) -> Seen | None:
    """The record of a lease. Raises Refusal for a malformed one."""
    seen = records.read(name)
    wrong = None if seen is None else _malformed(seen.value)
    if wrong is not None:
        raise records.damaged(name, wrong)
    return seen


def read_manifest(data: bytes, place: str, records: Records) -> dict[str, Any]:
    """The manifest in the bytes of `place`/manifest.json, in whose store the leases are `records`.

    Raises Refusal for one that is damaged, as one of format 1, without a seal, is where it was published with one.
    """
    manifest = manifests.read(data, place)
    if not manifests.is_sealed(manifest) and _was_sealed(records, manifest):
        raise manifests.damaged(place, "it has no seal, and was published by a program that seals")
    return manifest


def _was_sealed(records: Records, manifest: Mapping[str, Any]) -> bool:
    """Whether an artifact's lease is sealed: the program that seals leases seals manifests."""
    seen = read(records, work_name(manifest["step"], manifest["digest"]))
    if seen is None or not seen.sealed:
        return False
    published = seen.value["floor"] == manifest["token"] + 1
    committed = seen.value["state"] == "committed" and seen.value["token"] == manifest["token"]
    return published or committed


def _malformed(value: dict[str, Any]) -> str | None:
    """Description of the first malformed field; None if there is none."""
    for field, kind in _FIELDS.items():
        if not isinstance(value.get(field), kind) or isinstance(value.get(field), bool):
            return f"its {field} is {value.get(field, 'missing')!r:.60}"
    if value["state"] not in ("held", "committed", "free"):
        return f"its state is {value['state']!r:.60}"
    owner = value.get("owner")
    if value["state"] == "held" and not (
        isinstance(owner, dict)
        and owner.keys() == _OWNER.keys()
        and all(isinstance(owner[field], kind) for field, kind in _OWNER.items())
    ):
        return f"its owner is {owner!r:.60}"
    return None


_FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("token", "floor", "revision"), int),
    **dict.fromkeys(("state", "digest"), str),
    "seconds": (int, float),
}
_OWNER = {"host": str, "machine": str, "pid": int, "started": str}


def _may_be_taken(seen: Seen, ttl_seconds: float) -> bool:
    return seen.age_seconds > ttl_seconds or Owner(**seen.value["owner"]).is_dead()


def this_process() -> Owner:
    """The calling process as an owner."""
    pid = os.getpid()
    return Owner(host=socket.gethostname(), machine=_machine(), pid=pid, started=_start_of(pid))


@functools.cache
def _machine() -> str:
    """This boot of this machine and this process namespace; unique per process where the kernel does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex


def _start_of(pid: int) -> str:
    """When the kernel started a process (clock ticks since boot); empty if there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _runs(pid: int) -> bool:
    """False if there certainly is no such process; /proc may hide those of other users, a signal's refusal does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _start_of(pid) != ""
