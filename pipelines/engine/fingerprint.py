"""Canonical bytes of what a step is made from, or an error that says what has none.

A digest is sha256 over canonical JSON: sorted keys, no spaces, shortest round-trip floats. 1 and 1.0 are the same
number. What of settings counts is said in conf/identity.py.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from conf.identity import identity

SHORT = 16  # hex characters of a digest in paths; manifests carry all 64 and are compared in full


def digest(payload: Any) -> str:
    """sha256 hex of the canonical bytes of a plain payload."""
    return hashlib.sha256(canonical(payload)).hexdigest()


def canonical(value: Any, where: str = "settings") -> bytes:
    """Canonical JSON bytes of plain data or dataclasses; Refusal names the path of what has no stable bytes."""
    plain = identity(value, where)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
