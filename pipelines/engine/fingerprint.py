"""Canonical bytes of what a step is made from, or an error that says what has none.

A digest is sha256 over canonical JSON: sorted keys, no spaces, shortest round-trip floats. 1 and 1.0 are the same
number. Fields declared ``metadata={"execution": True}`` (where or how fast, never what) are left out, at any depth.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from conf.refusal import NO_VALUE, Refusal
from conf.typed import default_of

SHORT = 16  # hex characters of a digest in paths; manifests carry all 64 and are compared in full


def digest(payload: Any) -> str:
    """sha256 hex of the canonical bytes of a plain payload."""
    return hashlib.sha256(canonical(payload)).hexdigest()


def canonical(value: Any, where: str = "settings") -> bytes:
    """Canonical JSON bytes of plain data or dataclasses; Refusal names the path of what has no stable bytes."""
    plain = identity(value, where)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def identity(value: Any, where: str = "settings") -> Any:
    """``value`` as plain JSON data without its execution fields.

    A field left at its default is part of it, unless it is declared ``metadata={"absent_at_default": True}``: a field that
    came later, whose default is what was always made, then moves no digest.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise Refusal(where, value, "has no stable bytes", "use a finite number or null")
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = [field for field in dataclasses.fields(value) if not (is_execution(field) or is_absent(field, value))]
        return {field.name: identity(getattr(value, field.name), f"{where}.{field.name}") for field in kept}
    if isinstance(value, Mapping):
        for key in value:
            if type(key) is not str:
                raise Refusal(where, NO_VALUE, f"the key {key!r} is not text", "only text keys have stable bytes")
        return {key: identity(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [identity(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise Refusal(
        where,
        value,
        f"a {type(value).__name__} has no stable bytes, so nothing made from it could be found again",
        "use text, numbers, lists or settings; pass files in Step.files; or declare the field "
        'metadata={"execution": True} if it does not change what is made',
    )


def is_execution(field: dataclasses.Field[Any]) -> bool:
    """Whether a settings field only says where or how fast."""
    return bool(field.metadata.get("execution", False))


def is_absent(field: dataclasses.Field[Any], settings: Any) -> bool:
    """Whether a settings field is left out because it was added later and still has its default."""
    if not field.metadata.get("absent_at_default", False):
        return False
    return bool(getattr(settings, field.name) == default_of(field))
