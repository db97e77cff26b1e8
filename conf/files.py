"""Bytes on a disk: atomic and durable writes, checksums, plain reads, and this user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from conf.refusal import NO_VALUE, Refusal


def sha256_of(path: Path) -> str:
    """sha256 hex of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_parallel(paths: Iterable[Any], work: Any) -> list[Any]:
    """``work(path)`` for each path; hashing and fsync release the GIL, so threads use all cores."""
    with ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1) + 1)) as pool:
        return list(pool.map(work, paths))


def share(path: Path) -> None:
    """Set the mode that ``open`` (or ``mkdir``) would have set under the umask."""
    status = path.stat()
    mode = (0o777 if stat.S_ISDIR(status.st_mode) else 0o666) & ~_umask()
    if stat.S_IMODE(status.st_mode) != mode:
        with contextlib.suppress(PermissionError):  # another user's, in a folder that several share
            path.chmod(mode)


def _umask() -> int:
    """This process's umask; read from the kernel, since ``os.umask`` would change it for all threads."""
    try:
        return int(Path("/proc/self/status").read_text().partition("\nUmask:")[2].split()[0], 8)
    except (OSError, IndexError, ValueError):
        return 0o022


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


def read_file(path: Path) -> bytes | None:
    """The bytes of a plain file, or None if there is none. Raises Refusal for a folder, a pipe (which would keep a
    reader waiting) or a file that may not be read."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError:
        pass
    except OSError as error:
        raise Refusal(
            path, NO_VALUE, f"cannot be read ({error.strerror})", "give this user the right to read it, or delete it"
        ) from error
    raise Refusal(path, NO_VALUE, "something else is in the place of a plain file", "delete it")


def machine_cache() -> Path:
    """This user's cache on this machine, for all stores: ``ATHANOR_CACHE`` or ``~/.cache/athanor``.

    Where there is no home, among the temporary files, in a folder of this user's own. Raises Refusal where somebody
    else's is in its place.
    """
    try:
        return Path(os.environ.get("ATHANOR_CACHE") or Path.home() / ".cache" / "athanor")
    except RuntimeError:  # a user without a home
        return private_folder(Path(tempfile.gettempdir()) / f"athanor-{os.getuid()}")


def private_folder(path: Path) -> Path:
    """A folder private to this user, at a path that others could create. Raises Refusal if they did."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise Refusal(
            path,
            NO_VALUE,
            "not a folder of this user alone: somebody else could read or replace what is put there",
            "set ATHANOR_CACHE to a folder of your own",
        )
    return path
