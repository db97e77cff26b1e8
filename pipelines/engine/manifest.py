"""What a manifest says about an artifact, and what it must never say."""

from __future__ import annotations

import fnmatch
import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.engine.errors import EngineError
from pipelines.engine.fingerprint import digest

FORMAT = 1
NAME = "manifest.json"
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


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


def refuse_secrets(value: Any, what: str) -> None:
    """Raise EngineError if any text in plain data contains the value of a secret of the environment."""
    written = json.dumps(value, default=str)
    for name, secret in _secrets().items():
        if secret in written:
            raise EngineError(
                f"{what} contains the value of the environment variable {name}. Secrets are never written to disk: "
                f"leave it out of the settings; what needs it reads the environment itself."
            )


def without_secrets(value: Any) -> Any:
    """Plain data with the values of secrets of the environment blotted out."""
    written = json.dumps(value)
    for name, secret in _secrets().items():
        written = written.replace(secret, f"<{name}>")
    return json.loads(written)


def _secrets() -> dict[str, str]:
    """Secrets of the environment as they would look inside JSON: named as such, and long enough to be one."""
    named = {name: value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 12}
    return {name: json.dumps(value)[1:-1] for name, value in named.items()}
