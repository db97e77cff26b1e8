"""An artifact's manifest: written sealed, and read by one reader for every store."""

from __future__ import annotations

import fnmatch
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from conf.refusal import NO_VALUE, Refusal
from pipelines.engine.fingerprint import digest
from pipelines.engine.store.sealed import SEAL, opened, sealed

FORMAT = 2  # 1 had no seal
NAME = "manifest.json"
_FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("step", "digest", "content_digest", "finished"), str),
    **dict.fromkeys(("identity", "inputs", "sources", "metrics", "files"), dict),
    **{"volatile": list, "seconds": (int, float), "token": int},
}
_HEX = re.compile(r"[0-9a-f]{64}")


def read(data: bytes, place: str) -> dict[str, Any]:
    """The manifest in the bytes of `place`/manifest.json, its seal still in it if it has one: see `is_sealed`.

    Raises Refusal for what is no manifest, or not the one that was published.
    """
    try:
        manifest, was_sealed = opened(data)
        wrong = _malformed(manifest) or (None if was_sealed else _unsealed_wrong(manifest))
    except ValueError as error:
        was_sealed, wrong = False, str(error)
    if wrong is None and manifest["format"] > FORMAT:
        raise Refusal(
            f"{place}/{NAME}",
            NO_VALUE,
            f"has format {_shown(manifest['format'])} and this program knows up to {FORMAT}: it was published by a newer "
            "one",
            "use that one, or another store",
        )
    if wrong is not None:
        raise damaged(place, wrong)
    return sealed(manifest) if was_sealed else manifest


def damaged(place: str, why: str) -> Refusal:
    """What to raise for a damaged manifest."""
    return Refusal(
        f"{place}/{NAME}",
        NO_VALUE,
        f"is damaged, or was changed after it was published ({why})",
        f"delete {place} to have it made again",
    )


def is_sealed(manifest: Mapping[str, Any]) -> bool:
    """False for one that was published before manifests were sealed."""
    return SEAL in manifest


def without_seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """All of a manifest but its seal."""
    return {name: value for name, value in manifest.items() if name != SEAL}


def _malformed(manifest: Mapping[str, Any]) -> str | None:
    """Description of the first malformed field; None if there is none."""
    if type(manifest.get("format")) is not int or manifest["format"] < 1:  # True and 1.0 equal 1
        return f"its format is {_shown(manifest.get('format'))}"
    for name, kind in _FIELDS.items():
        value = manifest.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"its {name} is {_shown(value)}"
    if not all(isinstance(pattern, str) for pattern in manifest["volatile"]):
        return f"its volatile is {_shown(manifest['volatile'])}"
    if not all(_HEX.fullmatch(manifest[name]) for name in ("digest", "content_digest")):
        return "its digests are not 64 hexadecimal digits"
    for path, entry in manifest["files"].items():
        if not is_entry(path, entry):
            return f"its entry for the file {path!r} is {_shown(entry)}"
    wrong = [name for name, source in manifest["inputs"].items() if not isinstance(source, dict)]
    return f"its input {wrong[0]!r} is none" if wrong else None


def is_entry(path: str, entry: Any) -> bool:
    """Whether a file is listed as it should be: a relative path that stays inside, {"bytes", "sha256"}."""
    inside = path and not path.startswith("/") and ".." not in PurePosixPath(path).parts and "\0" not in path
    if not inside or not isinstance(entry, dict) or type(entry.get("bytes")) is not int or entry["bytes"] < 0:
        return False
    return isinstance(entry.get("sha256"), str) and _HEX.fullmatch(entry["sha256"]) is not None


def _unsealed_wrong(manifest: Mapping[str, Any]) -> str | None:
    """Why an unsealed manifest is not one of format 1 that agrees with its own digests; None if it is."""
    if manifest["format"] == FORMAT:
        return f"it has no seal, and every manifest of format {FORMAT} is sealed"
    if manifest["content_digest"] != content_digest(manifest["files"], manifest["volatile"]):
        return "its content_digest is not that of its files"
    return None if manifest["digest"] == digest(manifest["identity"]) else "its digest is not that of its identity"


def _shown(value: Any) -> str:
    return "missing" if value is None else f"{value!r:.60}"


def content_digest(files: Mapping[str, Mapping[str, Any]], volatile: Iterable[str]) -> str:
    """sha256 over (path, sha256) of the files that equal runs make equal."""
    patterns = list(volatile)
    stable = {path: entry["sha256"] for path, entry in files.items() if not _matches(path, patterns)}
    return digest(sorted(stable.items()))


def _matches(path: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)  # * crosses folders


def provenance() -> dict[str, Any]:
    """Package versions, commit and host: recorded for people, never part of an identity."""
    return {"commit": _commit(), "host": platform.node(), "python": platform.python_version(), "versions": _versions()}


@functools.cache
def _versions() -> dict[str, str]:
    """Installed versions of this distribution and of what it requires."""
    versions = {}
    try:
        required = importlib.metadata.requires("athanor") or []
    except importlib.metadata.PackageNotFoundError:
        required = []
    for requirement in ["athanor", *(line for line in required if "extra ==" not in line)]:
        name = re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0]
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def _commit() -> str | None:
    """The commit of the code that runs, "+changes" if the tree differs from it; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("ATHANOR_COMMIT")
    return answer.stdout.strip()


def now() -> str:
    """The time as manifests write it: UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
