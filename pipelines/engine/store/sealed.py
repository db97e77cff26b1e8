"""JSON that decides where work goes on, with a checksum of itself: a wrong digit in it is found instead of believed.

A seal is a checksum against damage and casual edits. It is not a signature: whoever can write the file can compute it.

path.write_text(json.dumps(sealed({"step": 10})))
unsealed(path)                  # {"step": 10}, or None where the file is gone, torn or changed
opened(path.read_bytes())       # ({"step": 10}, True), or a ValueError that says what is wrong with it
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEAL = "sha256"
"""The key of the seal, beside the keys of what it seals."""


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A value for a JSON file, with the sha256 of all else in it."""
    plain = json.loads(json.dumps(value))  # as it will be read: keys that are numbers sort otherwise
    return {**plain, SEAL: _seal(plain)}


def unsealed(path: Path) -> dict[str, Any] | None:
    """The value that was sealed into a file; None where it is gone, torn or changed."""
    try:
        value, was_sealed = opened(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if was_sealed else None


def opened(data: bytes) -> tuple[dict[str, Any], bool]:
    """(the value without its seal, whether it had one). Raises ValueError for other JSON and a wrong seal."""
    try:
        value = json.loads(data, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__} instead of an object")
    if SEAL not in value:
        return value, False
    seal = value.pop(SEAL)
    if seal != _seal(value):
        raise ValueError("its checksum is not that of its content")
    return value, True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(n for n in names if names.count(n) > 1)!r:.60} twice")
    return value


def _seal(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
