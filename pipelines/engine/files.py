"""Bytes on a disk: content hashes, durable writes, trees, and the cache of hashes of files from outside."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipelines.engine.errors import EngineError
from pipelines.engine.fingerprint import SHORT

RACY_SECONDS = 2.0  # a file written this recently may change again without its mtime moving


def sha256_of(path: Path) -> str:
    """sha256 hex of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_parallel(paths: Iterable[Any], work: Any) -> list[Any]:
    """``work(path)`` for each path; hashing and fsync release the GIL, so threads use all cores."""
    with ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1) + 1)) as pool:
        return list(pool.map(work, paths))


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
                raise EngineError(f"{path}: a step may only leave plain files; copy the file instead of linking to it.")
            found.append(relative)
    return sorted(found)


def describe(root: Path, relpaths: Iterable[str], *, durable: bool) -> dict[str, dict[str, Any]]:
    """{relative path: {"bytes", "sha256"}}; ``durable`` also forces the bytes to the disk before they are counted."""
    names = list(relpaths)

    def one(name: str) -> dict[str, Any]:
        path = root / name
        if durable:
            fsync(path)
        return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}

    return dict(zip(names, in_parallel(names, one), strict=True))


def fsync(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file so that a reader, or a kill at any instant, sees the old bytes or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync(path.parent)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """``write_atomic`` of readable JSON."""
    write_atomic(path, json_bytes(value), durable=durable)


def json_bytes(value: Any) -> bytes:
    """JSON as people read it in manifests."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def read_json(path: Path) -> Any:
    """The JSON in a file, or None if there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold an exclusive lock on a file (made if missing) among all processes and threads; yields its descriptor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def cache_folder(store_url: str) -> Path:
    """This machine's folder for a store: hashes of files; of one in S3 also work in progress and copies of artifacts.

    In ``ATHANOR_CACHE`` or ``~/.cache/athanor``; where there is no home, among the temporary files.
    """
    try:
        base = Path(os.environ.get("ATHANOR_CACHE") or Path.home() / ".cache" / "athanor")
    except RuntimeError:  # a user without a home
        base = Path(tempfile.gettempdir()) / f"athanor-{os.getuid()}"
    where = f"{os.environ.get('AWS_ENDPOINT_URL', '')} {store_url}"
    return base / hashlib.sha256(where.encode()).hexdigest()[:SHORT]


class FileHashes:
    """sha256 of files from outside the graph, remembered by (path, size, mtime) in an append-only file."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._known: dict[tuple[str, int, int], str] = {}
        with contextlib.suppress(OSError), open(cache, encoding="utf-8") as lines:
            for line in lines:
                with contextlib.suppress(ValueError):  # a torn last line: that file is hashed again
                    path, size, mtime_ns, sha256 = json.loads(line)
                    self._known[path, size, mtime_ns] = sha256

    def of(self, paths: Iterable[Path]) -> list[str]:
        """sha256 hex of each file. Raises EngineError for one that cannot be read."""
        keys = [self._key(path) for path in paths]
        unknown = [key for key in dict.fromkeys(keys) if key not in self._known]
        if unknown:
            in_parallel(unknown, self._hash)
        return [self._known[key] for key in keys]

    def _key(self, path: Path) -> tuple[str, int, int]:
        with _readable(path):
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise EngineError(
                    f"{path} is no plain file; a folder, FIFO, socket or device cannot be an input of a run, which may read "
                    "it again. Write its content to a file."
                )
            return os.path.realpath(path), status.st_size, status.st_mtime_ns

    def _hash(self, key: tuple[str, int, int]) -> None:
        path, _, mtime_ns = key
        with _readable(path):
            self._known[key] = sha256_of(Path(path))
        if time.time() - mtime_ns / 1e9 > RACY_SECONDS:
            self._remember(key)

    def _remember(self, key: tuple[str, int, int]) -> None:
        line = json.dumps([*key, self._known[key]]) + "\n"
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            with open(self._cache, "ab", buffering=0) as file:
                file.write(line.encode())  # one write in append mode: lines of two processes do not mix


@contextlib.contextmanager
def _readable(path: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EngineError(f"{path} cannot be read ({error.strerror}); it is an input of this run.") from error


def relative_names(paths: tuple[Path, ...]) -> list[str]:
    """Names of files relative to the folder they have in common: what enters a fingerprint instead of their paths."""
    absolute = [Path(os.path.abspath(path)) for path in paths]
    if not absolute:
        return []
    common = os.path.commonpath([path.parent for path in absolute])
    return [path.relative_to(common).as_posix() for path in absolute]
