"""Where artifacts live: found by digest, built aside, published once and whole.

    <store>/<step>/<digest16>/manifest.json    an artifact
    <store>/.work/<step>-<digest16>/t000001/   an attempt (the number is its fencing token), kept across kills
    <store>/.leases/<step>-<digest16>.json     who is at it
    <store>/.tags/<name>.json                  a name for an artifact

This is what all stores have in common; local_store.py has files, object_store.py has S3, store.py opens either.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.refusal import NO_VALUE, Refusal
from pipelines.engine.files import FileHashes, describe, tree
from pipelines.engine.fingerprint import SHORT
from pipelines.engine.step import Artifact
from pipelines.engine.store import lease as leases
from pipelines.engine.store import manifest as manifests
from pipelines.engine.store.lease import Held, Lease, Owner
from pipelines.engine.store.listed import unlisted
from pipelines.engine.store.records import Records
from pipelines.engine.store.sealed import sealed
from pipelines.engine.store.work import Work, work_name


class Store(ABC):
    """What the runner needs of a store."""

    url: str
    records: Records
    """Leases."""
    tags: Records
    """Names that people gave artifacts (tags.py)."""
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

        ``manifest`` comes with everything but its format and the files. Raises LeaseLostError, or Refusal for a file
        that is not what its shard wrote.
        """
        step, digest = manifest["step"], manifest["digest"]
        lease.check()
        files = self._describe(work)
        manifest = sealed(
            {
                "format": manifests.FORMAT,
                **manifest,
                "files": files,
                "content_digest": manifests.content_digest(files, manifest["volatile"]),
                "finished": manifests.now(),
                "seconds": round(lease.seconds, 3),
                "token": lease.token,
            }
        )
        self._stage(lease, work, manifest)
        lease.commit()
        self._finish(step, digest, lease.token)
        lease.release(published=True)
        artifact = self.find(step, digest)
        if artifact is None:
            raise Refusal(self.address(step, digest), NO_VALUE, "was deleted while it was being published", "run again")
        return artifact

    def _describe(self, work: Work) -> dict[str, dict[str, Any]]:
        names = tree(work.out)
        if manifests.NAME in names:
            raise Refusal(
                work.out / manifests.NAME,
                NO_VALUE,
                "a step may not write this file itself: its name is the engine's",
                "use a subfolder",
            )
        files = describe(work.out, names, durable=True)
        for path, entry in work.finished_files().items():
            if files.get(path, entry) != entry:  # a stage may delete what its shards wrote, not change it
                raise Refusal(
                    work.out / path,
                    NO_VALUE,
                    "is not what its shard wrote (checksums differ): the disk lost it or something changed it",
                    f"delete {work.root} and run again",
                )
        return files

    def address(self, step: str, digest: str) -> str:
        """The `url` of that artifact, whether or not it is there."""
        return f"{self.url}/{step}/{digest[:SHORT]}"

    def find(self, step: str, digest: str) -> Artifact | None:
        """The published artifact, or None. Raises Refusal for a manifest that is damaged or of another artifact."""
        data = self.manifest_bytes(step, digest[:SHORT])
        if data is None:
            return None
        url = self.address(step, digest)
        manifest = self.read_manifest(data, url)
        if (manifest["step"], manifest["digest"]) != (step, digest):
            raise Refusal(
                url,
                NO_VALUE,
                f"holds {manifest['step']} {manifest['digest']}, not {step} {digest}: it was moved there by hand",
                "delete it",
            )
        return Artifact(step=step, digest=digest, url=url, manifest=manifest)

    def read_manifest(self, data: bytes, place: str) -> dict[str, Any]:
        """The manifest in the bytes of `place`/manifest.json. Raises Refusal for one that is damaged."""
        return leases.read_manifest(data, place, self.records)

    def check(self, artifact: Artifact) -> None:
        """Sizes only, which are cheap to query. Raises Refusal for a file that is missing or of another size."""
        sizes = self._sizes(artifact)
        for path, entry in artifact.manifest["files"].items():
            if sizes.get(path) != entry["bytes"]:
                state = f"has {sizes[path]} bytes instead of {entry['bytes']}" if path in sizes else "is missing"
                raise damaged_file(artifact, f"{artifact.url}/{path}", state)

    def verify(self, artifact: Artifact, self_checking: tuple[str, ...], rechecked: tuple[str, ...] = ()) -> None:
        """Raise Refusal if a file of an artifact is not what was published, before another step builds on it.

        Files that match `self_checking` are looked at by size only. Hashes of unchanged files are remembered on this
        machine for a while; not trusted for those that match `rechecked`.
        """
        self.check(artifact)
        damage = self._damage(artifact, Path(artifact.url), self_checking, rechecked)
        if damage is not None:
            raise damage

    def unlisted(self, artifact: Artifact) -> list[str]:
        """Relative paths of files in the artifact's folder that its manifest does not list, if readers would see them."""
        return unlisted(Path(artifact.url), artifact.manifest)

    def _damage(
        self, artifact: Artifact, folder: Path, self_checking: tuple[str, ...], rechecked: tuple[str, ...] = ()
    ) -> Refusal | None:
        """What to raise about a file of an artifact in `folder`; None where every one is what was published."""
        files = {
            path: e["sha256"] for path, e in artifact.manifest["files"].items() if not _matches(path, self_checking)
        }
        hashes = FileHashes(self.file_hashes)
        for distrust in (False, True):
            entries = {path: sha256 for path, sha256 in files.items() if _matches(path, rechecked) == distrust}
            found = hashes.of([folder / path for path in entries], rechecked=distrust)
            for (path, expected), sha256 in zip(entries.items(), found, strict=True):
                if sha256 != expected:
                    state = f"is not what was published (its sha256 is {sha256} and was {expected})"
                    return damaged_file(artifact, folder / path, state)
        return None

    def all_manifests(self, step: str) -> list[dict[str, Any]]:
        """Manifests of every published artifact of a step; copies under other names are none."""
        found = (
            (name, self.read_manifest(data, f"{self.url}/{step}/{name}"))
            for name, data in self._manifests(step).items()
        )
        return [manifest for name, manifest in found if manifest["digest"][:SHORT] == name]

    @abstractmethod
    def published(self) -> dict[str, list[str]]:
        """{step: names of folders that hold a manifest} of the whole store."""

    @abstractmethod
    def strays(self) -> list[str]:
        """One line per file or folder that lies where artifacts lie and is none, and per link out of the store."""

    @abstractmethod
    def manifest_bytes(self, step: str, name: str) -> bytes | None:
        """Manifest of the artifact in the folder `name`; None if there is none."""

    @abstractmethod
    def hashes_now(self, artifact: Artifact) -> dict[str, str | None]:
        """{relative path: sha256} of every file of an artifact, read now; None for one that is not there."""

    @abstractmethod
    def seal(self, artifact: Artifact) -> None:
        """Rewrite the manifest of an artifact, sealed."""

    @abstractmethod
    def _manifests(self, step: str) -> dict[str, bytes]:
        """{folder: bytes of its manifest} of a step's artifacts."""

    @abstractmethod
    def _sizes(self, artifact: Artifact) -> dict[str, int]:
        """{relative path: bytes} of the files of an artifact that are there."""

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


def damaged_file(artifact: Artifact, file: str | Path, state: str) -> Refusal:
    """What to raise for a file of an artifact that is not as it was published; ``state``: what is wrong with it."""
    return Refusal(file, NO_VALUE, f"{state}: the artifact is damaged", f"delete {artifact.url} to have it made again")


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


@contextlib.contextmanager
def storage_errors(store: Store) -> Iterator[None]:
    """Turn a full or unwritable disk, wherever it showed, into a Refusal with the remedy."""
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        refusal = _storage_refusal(error, store)
        if refusal is None:
            raise
        raise refusal from error


def _storage_refusal(error: BaseException, store: Store) -> Refusal | None:
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(cause):
            return Refusal(
                "store",
                store.url,
                "the disk is full. Everything finished so far is kept",
                "free some space and run the same command again, and it continues",
            )
        path = str(getattr(cause, "filename", None) or "")
        refused = number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
        refused |= number == errno.ENOENT and not Path(store.url).exists()  # a folder that cannot be made, as in /proc
        if refused and path.startswith(store.url) and isinstance(cause, OSError):
            return Refusal(
                "store",
                store.url,
                f"{path} cannot be written ({cause.strerror})",
                "give this user the right to write there, or choose another store",
            )
        remote = "://" in store.url
        if remote and (type(cause).__module__.startswith("botocore") or isinstance(cause, PermissionError)):
            return Refusal(
                "store",
                store.url,
                str(cause),
                "check the bucket, the credentials in the environment and, for a server other than Amazon's, "
                "AWS_ENDPOINT_URL",
            )
        cause = cause.__cause__ or cause.__context__
    return None
