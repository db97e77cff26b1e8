"""JSON that decides where work goes on, with a checksum of itself: a wrong digit in it is found instead of believed.

path.write_text(json.dumps(sealed({"step": 10})))
unsealed(path)      # {"step": 10}, or None where the file is gone, torn or changed
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A value for a JSON file, with the sha256 of all else in it."""
    plain = json.loads(json.dumps(value))  # as it will be read: keys that are numbers sort otherwise
    return {**plain, "sha256": _seal(plain)}


def unsealed(path: Path) -> dict[str, Any] | None:
    """The value that was sealed into a file; None where it is gone, torn or changed."""
    try:
        value = json.loads(path.read_bytes())
        return value if value.pop("sha256") == _seal(value) else None
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return None


def _seal(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
