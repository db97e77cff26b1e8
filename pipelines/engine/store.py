"""Where artifacts live: found by digest, built aside, published once and whole.

    <store>/<step>/<digest16>/manifest.json    an artifact
    <store>/.work/<step>-<digest16>/t000001/   an attempt (the number is its fencing token), kept across kills
    <store>/.leases/<step>-<digest16>.json     who is at it

On a local or shared file system publishing is one rename; see object_store.py for S3.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.engine import lease as leases
from pipelines.engine import manifest as manifests
from pipelines.engine.errors import EngineError
from pipelines.engine.files import describe, fsync, read_json, tree, write_json
from pipelines.engine.fingerprint import SHORT
from pipelines.engine.lease import Held, Lease, Owner
from pipelines.engine.records import FileRecords, Records
from pipelines.engine.step import Artifact
from pipelines.engine.work import Work


def open_store(url: str | Path, *, ttl_seconds: float = leases.TTL_SECONDS) -> Store:
    """The store at a path or at ``s3://bucket/prefix``; nothing is written before something is made."""
    text = str(url)
    scheme = text.split("://", 1)[0] if "://" in text else "file"
    if scheme == "file":
        return LocalStore(Path(text.removeprefix("file://")).absolute(), ttl_seconds=ttl_seconds)
    if scheme == "s3":
        from pipelines.engine.object_store import ObjectStore  # fsspec and s3fs are slow to import

        return ObjectStore(text, ttl_seconds=ttl_seconds)
    raise EngineError(
        f"store={text}: a store is a folder or s3://bucket/prefix. Leases need writes that depend on what is there, "
        f"and {scheme}:// is not known to have them; mount it as a folder, or use its S3 interface."
    )


def fetch(artifact: Artifact) -> Path:
    """A local folder with the files of an artifact of a remote store."""
    from pipelines.engine.object_store import fetch as fetch_remote

    return fetch_remote(artifact)


class Store(ABC):
    """What the runner needs of a store."""

    url: str
    records: Records
    file_hashes: Path
    """Where hashes of files from outside are remembered."""

    def __init__(self, *, ttl_seconds: float) -> None:
        self.ttl_seconds = ttl_seconds

    def acquire(self, step: str, digest: str) -> Lease | Held | None:
        """The right to build an artifact; or who has it; or None: look again."""
        name = work_name(step, digest)
        return leases.acquire(
            self.records,
            name,
            digest=digest,
            finish=lambda token: self._finish(step, digest, token),
            ttl_seconds=self.ttl_seconds,
        )

    def holder(self, step: str, digest: str) -> Owner | None:
        """Who builds it now."""
        return leases.holder(self.records, work_name(step, digest), self.ttl_seconds)

    def publish(self, lease: Lease, work: Work, manifest: dict[str, Any]) -> Artifact:
        """Publish what is in ``work.out``: whole, once, and only if the lease is still held.

        ``manifest`` comes with everything but the files. Raises LeaseLostError, or EngineError for a file that is not
        what its shard wrote.
        """
        step, digest = manifest["step"], manifest["digest"]
        lease.check()
        files = self._describe(work)
        manifest = {
            **manifest,
            "files": files,
            "content_digest": manifests.content_digest(files, manifest["volatile"]),
            "finished": manifests.now(),
            "seconds": round(lease.seconds, 3),
            "token": lease.token,
        }
        self._stage(lease, work, manifest)
        lease.commit()
        self._finish(step, digest, lease.token)
        lease.release(published=True)
        artifact = self.find(step, digest)
        if artifact is None:
            raise EngineError(f"{step} {digest[:SHORT]} was deleted from {self.url} while it was being published.")
        return artifact

    def _describe(self, work: Work) -> dict[str, dict[str, Any]]:
        names = tree(work.out)
        if manifests.NAME in names:
            raise EngineError(
                f"a step may not write {manifests.NAME} itself: the name is the engine's; use a subfolder."
            )
        files = describe(work.out, names, durable=True)
        for path, entry in work.finished_files().items():
            if files.get(path, entry) != entry:  # a stage may delete what its shards wrote, not change it
                raise EngineError(
                    f"{work.out / path} is not what its shard wrote (checksums differ): the disk lost it or something "
                    f"changed it. Delete {work.root} and run again."
                )
        return files

    @abstractmethod
    def find(self, step: str, digest: str) -> Artifact | None:
        """The published artifact, or None."""

    @abstractmethod
    def check(self, artifact: Artifact) -> None:
        """Raise EngineError if a published artifact is visibly damaged (files missing or cut short)."""

    @abstractmethod
    def all_manifests(self, step: str) -> list[dict[str, Any]]:
        """Manifests of every published artifact of a step."""

    @abstractmethod
    def open_work(self, lease: Lease, step: str, digest: str, *, resumes: bool) -> Work:
        """The holder's folder, with what earlier attempts left and may be used."""

    @abstractmethod
    def unfinished(self, step: str, digest: str) -> str | None:
        """Where the work of an interrupted attempt is kept, if there is any."""

    @abstractmethod
    def tidy(self, step: str, digest: str) -> None:
        """Delete what an owner that died while publishing left beside a published artifact."""

    @abstractmethod
    def keep(self, work: Work, relpath: str) -> None:
        """Make ``work.out/relpath`` (or its absence) durable now."""

    @abstractmethod
    def keep_shard(self, work: Work, label: str, name: str) -> None:
        """Make a finished shard durable, soon."""

    @abstractmethod
    def _stage(self, lease: Lease, work: Work, manifest: dict[str, Any]) -> None:
        """Put everything where ``_finish`` only has to flip it visible."""

    @abstractmethod
    def _finish(self, step: str, digest: str, token: int) -> bool:
        """Make staged and committed work visible; harmless when repeated. Whether the artifact is there afterwards."""


class LocalStore(Store):
    """A store in a folder; the folder may be on a file system that several machines share."""

    def __init__(self, root: Path, *, ttl_seconds: float = leases.TTL_SECONDS) -> None:
        super().__init__(ttl_seconds=ttl_seconds)
        self.url = str(root)
        self.root = root
        self.records = FileRecords(root / ".leases")
        self.file_hashes = root / ".file-hashes.jsonl"

    def find(self, step: str, digest: str) -> Artifact | None:
        folder = self._folder(step, digest)
        manifest = read_json(folder / manifests.NAME)
        if manifest is None:
            return None
        if manifest["digest"] != digest:
            raise EngineError(
                f"{folder} holds {manifest['digest']}, not {digest}: it was moved there by hand; delete it."
            )
        return Artifact(step=step, digest=digest, url=str(folder), manifest=manifest)

    def check(self, artifact: Artifact) -> None:
        for path, entry in artifact.manifest["files"].items():
            file = Path(artifact.url, path)
            size = file.stat().st_size if file.is_file() else None
            if size != entry["bytes"]:
                state = "is missing" if size is None else f"has {size} bytes instead of {entry['bytes']}"
                raise EngineError(
                    f"{file} {state}: the artifact is damaged. Delete {artifact.url} to have it made again."
                )

    def all_manifests(self, step: str) -> list[dict[str, Any]]:
        found = (read_json(path) for path in sorted((self.root / step).glob(f"*/{manifests.NAME}")))
        return [manifest for manifest in found if manifest is not None]

    def open_work(self, lease: Lease, step: str, digest: str, *, resumes: bool) -> Work:
        attempts = self._attempts(step, digest)
        usable = [token for token in attempts if lease.floor <= token < lease.token]
        root = self._attempt(step, digest, lease.token)
        if usable:
            os.rename(attempts.pop(max(usable)), root)
        for token, folder in attempts.items():
            if token < lease.token:
                shutil.rmtree(folder, ignore_errors=True)
        work = Work(root=root)
        work.prepare(resumes=resumes)
        return work

    def unfinished(self, step: str, digest: str) -> str | None:
        newest = newest_attempt(self._attempt(step, digest, 0).parent)
        return str(newest) if newest else None

    def tidy(self, step: str, digest: str) -> None:
        folder = self._attempt(step, digest, 0).parent
        if folder.exists() and self.holder(step, digest) is None:
            shutil.rmtree(folder, ignore_errors=True)

    def keep(self, work: Work, relpath: str) -> None:
        path = work.out / relpath
        files = [path / name for name in tree(path)] if path.is_dir() else [path] if path.exists() else []
        for file in files:
            fsync(file)

    def keep_shard(self, work: Work, label: str, name: str) -> None:
        """The worker that made it has forced it to the disk."""

    def _stage(self, lease: Lease, work: Work, manifest: dict[str, Any]) -> None:
        # Written outside and moved in: a temporary file that a kill leaves in ``out`` would be published one day.
        staged = work.root / "engine" / manifests.NAME
        write_json(staged, manifest)
        os.replace(staged, work.out / manifests.NAME)
        for folder, _, _ in os.walk(work.out):
            fsync(Path(folder))

    def _finish(self, step: str, digest: str, token: int) -> bool:
        built, final = self._attempt(step, digest, token) / "out", self._folder(step, digest)
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists() and not (final / manifests.NAME).exists():  # the rest of a deletion that was cut short
            with contextlib.suppress(FileNotFoundError):
                os.rename(final, self._attempt(step, digest, token) / "deleted")
        try:
            os.rename(built, final)
            fsync(final.parent)
        except OSError as error:  # no longer there: somebody finished it; not empty: it had been published before
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise
        for older, folder in self._attempts(step, digest).items():
            if older <= token:
                shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(self._attempt(step, digest, token).parent)
        return (final / manifests.NAME).exists()

    def _folder(self, step: str, digest: str) -> Path:
        return self.root / step / digest[:SHORT]

    def _attempt(self, step: str, digest: str, token: int) -> Path:
        return self.root / ".work" / work_name(step, digest) / attempt_name(token)

    def _attempts(self, step: str, digest: str) -> dict[int, Path]:
        return attempts_in(self._attempt(step, digest, 0).parent)


def work_name(step: str, digest: str) -> str:
    """The name of a step's lease and work folder."""
    return f"{step}-{digest[:SHORT]}"


def attempt_name(token: int) -> str:
    """The name of the folder of the attempt with this fencing token; names sort as tokens do."""
    return f"t{token:06d}"


def attempts_in(folder: Path) -> dict[int, Path]:
    """{token: folder} of the attempts in a step's work folder."""
    return {int(path.name[1:]): path for path in sorted(folder.glob("t[0-9]*")) if path.is_dir()}


def newest_attempt(folder: Path) -> Path | None:
    """The folder of the attempt with the highest token, if there is any."""
    attempts = attempts_in(folder)
    return attempts[max(attempts)] if attempts else None


@contextlib.contextmanager
def storage_errors(store: Store) -> Iterator[None]:
    """Turn a full or unwritable disk, wherever it showed, into an EngineError with the remedy."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        message = _explain(error, store)
        if message is None:
            raise
        raise EngineError(message) from error


def _explain(error: BaseException, store: Store) -> str | None:
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(cause):
            return (
                f"The disk is full (store={store.url}). Everything finished so far is kept: free some space and run the "
                f"same command again, and it continues."
            )
        path = str(getattr(cause, "filename", None) or "")
        refused = number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
        if refused and path.startswith(store.url) and isinstance(cause, OSError):
            return (
                f"store={store.url}: {path} cannot be written ({cause.strerror}). Give this user the right to write "
                f"there, or choose another store."
            )
        remote = "://" in store.url
        if remote and (type(cause).__module__.startswith("botocore") or isinstance(cause, PermissionError)):
            return (
                f"store={store.url}: {cause}. Check the bucket, the credentials in the environment and, for a server "
                f"other than Amazon's, AWS_ENDPOINT_URL."
            )
        cause = cause.__cause__ or cause.__context__
    return None
