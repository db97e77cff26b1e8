"""Plain mappings (YAML, JSON) to frozen dataclasses and back: strict, with errors that teach.

Field types understood: ``bool int float str None``, ``Literal``, ``Optional``, ``tuple[T, ...]`` and fixed tuples,
``dict[str, T]``, nested dataclasses, unions of dataclasses told apart by their ``kind: Literal["..."]`` field, and the base
of a group of parts, whose registry (conf/registry.py) has the class of each ``kind``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import shlex
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, Union

from conf.refusal import NO_VALUE, Refusal
from conf.registry import FROM, Registry, origin, registry_of

T = TypeVar("T")
NoneType = type(None)
_SURROGATE = re.compile("[\ud800-\udfff]")


def from_plain(cls: type[T], mapping: Mapping[str, Any], where: str = "settings") -> T:
    """Build ``cls`` from a plain mapping.

    ``where`` is the dotted key of the mapping, empty at the root. Raises Refusal for an unknown key (with the nearest
    known one), a missing key, or a value of the wrong type; what ``__post_init__`` refuses is placed under ``where``.
    """
    return typing.cast(T, _dataclass(cls, mapping, where))


def to_plain(value: Any) -> Any:
    """The mapping ``from_plain`` reads: dataclasses to dicts, tuples to lists, scalars as they are."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        foreign = origin(type(value))
        return plain if foreign is None else {**plain, FROM: foreign.distribution}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default, made anew where there is a factory; dataclasses.MISSING where it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Resolved type of each ``__init__`` field of a dataclass, in declaration order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _dataclass(cls: type, mapping: Any, where: str) -> Any:
    if type(mapping) is cls:
        return mapping
    if not isinstance(mapping, Mapping):
        known = ", ".join(field_types(cls))
        raise Refusal(where, mapping, f"expected a mapping with the keys {known}")
    known_types = field_types(cls)
    for key in mapping:
        if key not in known_types:
            raise _unknown_key(cls, str(key), where)
    required = [
        field.name for field in dataclasses.fields(cls) if field.init and default_of(field) is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in mapping]
    if missing:
        listed = ", ".join(_at(where, name) for name in missing)
        raise Refusal(listed, NO_VALUE, "has no value and no default", "set it")
    # In the order of the fields, so that of values that follow from one another the one a person sets is named first.
    values = {key: _value(hint, mapping[key], _at(where, key)) for key, hint in known_types.items() if key in mapping}
    for field in dataclasses.fields(cls):
        if field.name in values and not field.metadata.get("path"):
            _refuse_broken_text(values[field.name], _at(where, field.name))
    try:
        return cls(**values)
    except Refusal as refusal:
        raise refusal.under(where) from refusal.__cause__


def _refuse_broken_text(value: Any, where: str) -> None:
    """A text or a list of texts is UTF-8. Only a path may hold the bytes that Python writes as lone surrogates."""
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and _SURROGATE.search(text):
            raise Refusal(
                where, text, "holds bytes that are not UTF-8, or half of a surrogate pair", "write it in UTF-8"
            )


def _at(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _unknown_key(cls: type, key: str, where: str) -> Refusal:
    known = list(field_types(cls))
    near = [_at(where, name) for name in difflib.get_close_matches(key, known, n=1, cutoff=0.6)]
    deeper = [path for path in _paths(cls, where) if path.rpartition(".")[2] == key]
    vaguely = [_at(where, name) for name in difflib.get_close_matches(key, known, n=1, cutoff=0.5)]
    guesses = near or deeper or vaguely
    advice = f"did you mean {guesses[0]}?" if guesses else "the keys here are " + ", ".join(known)
    return Refusal(_at(where, key), NO_VALUE, "no such key", advice)


def _paths(cls: type, where: str, above: tuple[type, ...] = ()) -> Iterator[str]:
    """Every dotted key under ``cls``, for suggestions; a type that holds itself is gone through once."""
    for name, hint in field_types(cls).items():
        yield _at(where, name)
        for inner in arms(hint):
            if dataclasses.is_dataclass(inner) and isinstance(inner, type) and inner not in (*above, cls):
                yield from _paths(inner, _at(where, name), (*above, cls))


def arms(hint: Any) -> list[Any]:
    """The types that a value of a type may have: a union's members, the classes of a group's kinds, else itself."""
    if (registry := registry_of(hint)) is not None:
        return list(registry.classes())
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [inner for arm in typing.get_args(hint) for inner in arms(arm)]
    return [hint]


def _value(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``hint``, or Refusal naming ``where``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SCALARS:
        return _SCALARS[hint](value, where)
    if hint in (None, NoneType):
        if value is None:
            return None
        raise Refusal(where, value, "the only value here is null")
    if origin is Literal:
        return _literal(arguments, value, where)
    if origin in (Union, types.UnionType):
        return _union(arguments, value, where)
    if origin is tuple:
        return _tuple(arguments, value, where)
    if origin is dict and arguments[0] is str:
        if not isinstance(value, Mapping):
            raise Refusal(where, value, "expected a mapping of names to values")
        return {str(key): _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if (registry := registry_of(hint)) is not None:
        return _registered(hint, registry, value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(hint, value, where)
    raise TypeError(f"{where}: settings cannot have the type {hint!r} (allowed: see conf/typed.py)")


def _bool(value: Any, where: str) -> bool:
    if isinstance(value, bool):
        return value
    raise Refusal(where, value, "expected true or false")


def _int(value: Any, where: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _number(value)
    # 1e9 is how people write a billion; YAML makes a float of it.
    if number is not None and number.is_integer() and abs(number) < 2**53:
        return int(number)
    raise Refusal(where, value, "expected a whole number")


def _float(value: Any, where: str) -> float:
    number = float(value) if isinstance(value, int) and not isinstance(value, bool) else _number(value)
    if number is None or not math.isfinite(number):
        raise Refusal(where, value, "expected a finite number")
    return number


def _number(value: Any) -> float | None:
    """A float, or a string that spells one (YAML 1.1 reads ``1e-3`` as a string)."""
    if isinstance(value, float):
        return value
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return None


def _str(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    raise Refusal(where, value, "expected text", "put it in quotes if it is meant as text")


_SCALARS: dict[Any, Any] = {bool: _bool, int: _int, float: _float, str: _str}


def _literal(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if isinstance(value, bool) and ("on" if value else "off") in choices:
        return "on" if value else "off"  # YAML 1.1 reads a bare on or off as a boolean
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    listed = ", ".join(str(choice) for choice in choices)
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.6)
    raise Refusal(where, value, f"must be one of {listed}", f"did you mean {near[0]}?" if near else "")


def _tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise Refusal(where, value, "expected a list", f"write {shlex.quote(f'{where}=[{value}]')}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if len(value) != len(arguments):
        raise Refusal(where, value, f"expected exactly {len(arguments)} values")
    pairs = zip(arguments, value, strict=True)
    return tuple(_value(hint, item, f"{where}[{index}]") for index, (hint, item) in enumerate(pairs))


def _union(arms: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and NoneType in arms:
        return None
    concrete = [arm for arm in arms if arm is not NoneType]
    if len(concrete) == 1:
        return _value(concrete[0], value, where)
    classes = [arm for arm in concrete if dataclasses.is_dataclass(arm) and isinstance(arm, type)]
    if classes and (isinstance(value, Mapping) or type(value) in classes or len(classes) == len(concrete)):
        return _by_kind(classes, value, where)
    for arm in concrete:  # an exact type wins over one reached by conversion: 1 stays an int in `int | float`
        if arm is type(value):
            return value
    refusals = []
    for arm in concrete:
        if arm in classes:
            continue
        try:
            return _value(arm, value, where)
        except Refusal as refusal:
            refusals.append(refusal)
    raise Refusal(where, value, "; or: ".join(dict.fromkeys(refusal.rule for refusal in refusals)))


def _registered(base: type, registry: Registry, value: Any, where: str) -> Any:
    """A part of a group, by its kind."""
    if isinstance(value, base):
        return value
    if not isinstance(value, Mapping) or "kind" not in value:
        raise Refusal(where, value, f"needs a kind, one of {', '.join(registry.names())}")
    cls = registry.load(value["kind"], _at(where, "kind"), value.get(FROM))
    return _dataclass(cls, {key: item for key, item in value.items() if key != FROM}, where)


def _by_kind(classes: list[type], value: Any, where: str) -> Any:
    if type(value) in classes:
        return value
    by_kind = {kind: cls for cls in classes for kind in typing.get_args(field_types(cls)["kind"])}
    if not isinstance(value, Mapping) or "kind" not in value:
        raise Refusal(where, value, f"needs a kind, one of {', '.join(by_kind)}")
    kind = _literal(tuple(by_kind), value["kind"], f"{where}.kind")
    return _dataclass(by_kind[kind], value, where)
