"""What of settings decides what is made: their payload in digests.

A field is part of it under its name, its default too, unless its metadata says otherwise:

    {"execution": True}           it says where or how fast, never what: left out
    {"absent_at_default": True}   it came later, and its default is what was always made: left out at its default
    {"identity": "old_name"}      it was renamed: its old name is hashed
    {"flat": True}                settings that were grouped later: their fields are hashed in their place

A part from another package adds that package's name and the version that its class gives itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from conf.refusal import NO_VALUE, Refusal
from conf.registry import FROM, origin
from conf.typed import default_of


def identity(value: Any, where: str = "settings") -> Any:
    """``value`` as plain JSON data without its execution fields.

    Raises Refusal for what has no stable bytes.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise Refusal(where, value, "has no stable bytes", "use a finite number or null")
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _of_settings(value, where)
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


def _of_settings(settings: Any, where: str) -> dict[str, Any]:
    payload: dict[str, Any] = {}
    if (foreign := origin(type(settings))) is not None:
        payload[FROM] = [foreign.distribution, foreign.version]
    for field in dataclasses.fields(settings):
        if is_execution(field) or is_absent(field, settings):
            continue
        plain = identity(getattr(settings, field.name), f"{where}.{field.name}")
        payload |= plain if field.metadata.get("flat", False) else {field.metadata.get("identity", field.name): plain}
    return payload


def is_execution(field: dataclasses.Field[Any]) -> bool:
    """Whether a settings field only says where or how fast."""
    return bool(field.metadata.get("execution", False))


def is_absent(field: dataclasses.Field[Any], settings: Any) -> bool:
    """Whether a settings field is left out because it was added later and still has its default."""
    if not field.metadata.get("absent_at_default", False):
        return False
    return bool(getattr(settings, field.name) == default_of(field))
