"""A store in a folder: publishing is one rename. The folder may be on a file system that several machines share."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import Any

from conf.files import fsync, in_parallel, read_file, sha256_of, share, write_json
from pipelines.engine.files import cache_folder, tree
from pipelines.engine.fingerprint import SHORT
from pipelines.engine.step import Artifact
from pipelines.engine.store import lease as leases
from pipelines.engine.store import manifest as manifests
from pipelines.engine.store.base import Store
from pipelines.engine.store.lease import Lease
from pipelines.engine.store.records import FileRecords
from pipelines.engine.store.sealed import sealed
from pipelines.engine.store.work import Work, attempt_name, attempts_in, newest_attempt, work_name


class LocalStore(Store):
    """Artifacts, work and leases as files under one folder."""

    def __init__(self, root: Path, *, ttl_seconds: float = leases.TTL_SECONDS) -> None:
        super().__init__(ttl_seconds=ttl_seconds)
        self.url = str(root)
        self.root = root
        self.records = FileRecords(root / ".leases")
        self.tags = FileRecords(root / ".tags", holds_work=False)
        self.file_hashes = cache_folder(str(root.absolute())) / "file-hashes.jsonl"

    def published(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in sorted(self.root.glob(f"[!.]*/*/{manifests.NAME}")):
            found.setdefault(path.parts[-3], []).append(path.parts[-2])
        return found

    def strays(self) -> list[str]:
        lines = []
        for path in (*self.root.glob("[!.]*"), *self.root.glob("[!.]*/*")):
            in_root = path.parent == self.root
            if not path.is_dir() or not (in_root or (path / manifests.NAME).exists()):
                lines.append(f"{path}: no artifact, never read")
        for here, folders, names in os.walk(self.root):
            if Path(here) == self.root:
                folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (Path(here, name) for name in (*folders, *names)):
                target = os.path.realpath(path)
                if path.is_symlink() and not Path(target).is_relative_to(self.root.resolve()):
                    lines.append(f"{path}: a link out of the store, to {target}")
        return sorted(lines)

    def manifest_bytes(self, step: str, name: str) -> bytes | None:
        return read_file(self.root / step / name / manifests.NAME)

    def hashes_now(self, artifact: Artifact) -> dict[str, str | None]:
        there = [path for path in artifact.manifest["files"] if Path(artifact.url, path).is_file()]
        sums = in_parallel([Path(artifact.url, path) for path in there], sha256_of)
        return {**dict.fromkeys(artifact.manifest["files"]), **dict(zip(there, sums, strict=True))}

    def seal(self, artifact: Artifact) -> None:
        write_json(Path(artifact.url, manifests.NAME), sealed(artifact.manifest))

    def _manifests(self, step: str) -> dict[str, bytes]:
        found = {path.parent.name: read_file(path) for path in (self.root / step).glob(f"*/{manifests.NAME}")}
        return {name: data for name, data in sorted(found.items()) if data is not None}

    def _sizes(self, artifact: Artifact) -> dict[str, int]:
        paths = {path: Path(artifact.url, path) for path in artifact.manifest["files"]}
        return {path: file.stat().st_size for path, file in paths.items() if file.is_file()}

    def open_work(self, lease: Lease, step: str, digest: str, *, resumes: bool) -> Work:
        """The newest attempt that a lease still vouches for goes on under this one's token; older ones are removed."""
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
            with contextlib.suppress(FileNotFoundError):  # an old checkpoint may be deleted meanwhile
                share(file)  # whoever continues this may be another user
                fsync(file)

    def keep_shard(self, work: Work, label: str, name: str) -> None:
        """The worker that made it has forced it to the disk."""

    def _stage(self, lease: Lease, work: Work, manifest: dict[str, Any]) -> None:
        # Written outside and moved in: a temporary file that a kill leaves in ``out`` would be published one day.
        staged = work.root / "engine" / manifests.NAME
        write_json(staged, manifest)
        os.replace(staged, work.out / manifests.NAME)
        for folder, _, _ in os.walk(work.out):
            share(Path(folder))
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
