"""Bytes on a disk: content hashes, durable writes, trees, and the cache of hashes of files from outside."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from conf.files import fsync, in_parallel, machine_cache, sha256_of, share, write_atomic
from conf.refusal import NO_VALUE, Refusal
from pipelines.engine.fingerprint import SHORT
from pipelines.engine.waiting import waiting

RACY_SECONDS = 2.0  # a file written this recently may change again without its times moving
TRUST_SECONDS = 7 * 86400.0  # lifetime of a remembered hash
LOCK_SECONDS = 60.0  # of waiting for a lock whose holders need milliseconds


def tree(root: Path) -> list[str]:
    """Relative paths of the files under ``root``, sorted; refuses what is not a plain file."""
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if not os.path.lexists(path):  # deleted while we look, as old checkpoints are
                continue
            if path.is_symlink() or not path.is_file():
                raise Refusal(
                    path, NO_VALUE, "a step may only leave plain files", "copy the file instead of linking to it"
                )
            found.append(relative)
    return sorted(found)


def describe(root: Path, relpaths: Iterable[str], *, durable: bool) -> dict[str, dict[str, Any]]:
    """{relative path: {"bytes", "sha256"}}; ``durable`` also forces the bytes to the disk before they are counted, with
    the mode that the umask gives: some libraries write files that nobody else may read."""
    names = list(relpaths)

    def one(name: str) -> dict[str, Any]:
        path = root / name
        if durable:
            share(path)
            fsync(path)
        return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}

    return dict(zip(names, in_parallel(names, one), strict=True))


@contextlib.contextmanager
def locked(path: Path, *, why: str = "changes what it guards", seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold an exclusive lock on a file (made if missing) among all processes and threads.

    Raises Refusal after ``seconds`` of waiting for whoever holds it; ``why``: what they are at.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(descriptor, path, why, seconds)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, why: str, seconds: float) -> None:
    deadline, pause = time.monotonic() + seconds, 0.001
    with contextlib.ExitStack() as stack:
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if pause == 0.001:
                    stack.enter_context(waiting(f"the lock {path}, whose holder {why}", seconds))
            if time.monotonic() > deadline:
                raise Refusal(
                    path,
                    NO_VALUE,
                    f"has been locked for {seconds:.0f} s by another process that {why}",
                    f"see which one holds it (fuser {path}), end it if it hangs, and run again",
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.25)


def cache_folder(store_url: str) -> Path:
    """This machine's folder for a store: hashes of files; of one in S3 also work in progress and copies of artifacts.

    Raises Refusal as `machine_cache` does.
    """
    where = f"{os.environ.get('AWS_ENDPOINT_URL', '')} {store_url}"
    return machine_cache() / hashlib.sha256(where.encode()).hexdigest()[:SHORT]


class FileHashes:
    """sha256 of files that do not change, remembered in an append-only file of this machine.

    A hash is trusted as long as the file's size, mtime, ctime and inode are what they were (whoever restores an mtime
    cannot restore the ctime) and for ``TRUST_SECONDS`` at most: a disk that loses bits moves none of them.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._known: dict[str, _Known] = {}
        self._here: set[str] = set()  # hashed by this object
        lines = 0
        with contextlib.suppress(OSError), open(cache, encoding="utf-8") as remembered:
            for lines, line in enumerate(remembered, start=1):  # noqa: B007
                with contextlib.suppress(ValueError, TypeError):  # a torn last line, or an older form: hashed again
                    path, *state, sha256, hashed = json.loads(line)
                    self._known[path] = tuple(state), str(sha256), float(hashed)
        if lines > 2 * len(self._known) + 1000:  # mostly outdated entries
            with contextlib.suppress(OSError):
                write_atomic(cache, b"".join(_line(path, known) for path, known in self._known.items()), durable=False)

    def of(self, paths: Iterable[Path], *, rechecked: bool = False) -> list[str]:
        """sha256 hex of each file; ``rechecked``: ignore the cache. Raises Refusal for one that cannot be read."""
        states = [_state(path) for path in paths]
        unknown = [state for state in dict.fromkeys(states) if rechecked or not self._trusts(*state)]
        if unknown:
            in_parallel(unknown, lambda state: self._hash(*state))
        return [self._known[path][1] for path, _ in states]

    def _trusts(self, path: str, state: _State) -> bool:
        if path not in self._known or self._known[path][0] != state:
            return False
        return path in self._here or 0 <= time.time() - self._known[path][2] < TRUST_SECONDS

    def _hash(self, path: str, state: _State) -> None:
        with _readable(path):
            known = self._known[path] = (state, sha256_of(Path(path)), time.time())
        self._here.add(path)
        if time.time() - max(state[1], state[2]) / 1e9 > RACY_SECONDS:
            with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
                self._cache.parent.mkdir(parents=True, exist_ok=True)
                with open(self._cache, "ab", buffering=0) as file:
                    file.write(_line(path, known))  # one write in append mode: lines of two processes do not mix


_State = tuple[int, ...]
"""Size, mtime, ctime, inode."""
_Known = tuple[_State, str, float]
"""A file's status when it was hashed, its sha256, and the time."""


def _state(path: Path) -> tuple[str, _State]:
    with _readable(path):
        status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Refusal(
            path,
            NO_VALUE,
            "is no plain file; a folder, FIFO, socket or device cannot be an input of a run, which may read it again",
            "write its content to a file",
        )
    return os.path.realpath(path), (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _line(path: str, known: _Known) -> bytes:
    state, sha256, hashed = known
    return (json.dumps([path, *state, sha256, hashed]) + "\n").encode()


@contextlib.contextmanager
def _readable(path: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refusal(
            path,
            NO_VALUE,
            f"cannot be read ({error.strerror}); it is an input of this run",
            "see that it is there and that this user may read it",
        ) from error


def relative_names(paths: tuple[Path, ...]) -> list[str]:
    """Names of files relative to the folder they have in common: what enters a fingerprint instead of their paths."""
    absolute = [Path(os.path.abspath(path)) for path in paths]
    if not absolute:
        return []
    common = os.path.commonpath([path.parent for path in absolute])
    return [path.relative_to(common).as_posix() for path in absolute]
