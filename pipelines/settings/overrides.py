"""Translate KEY=VALUE as typed on the command line into Hydra's override grammar.

    hydra_overrides(["experiment=text", "corpus.paths=[Bücher/a (1).txt]"], Settings)
    # ["experiment='text'", "++corpus.paths=['Bücher/a (1).txt']"]

Outside quotes Hydra's grammar accepts no `=`, `(`, `#`, `~`, `!` and no letter beyond ASCII, and a shell strips one pair of
quotes. So the whole value of a setting of type text is quoted here: `store=2024`, `tracking.name=a(b)`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import conf
from conf.refusal import NO_VALUE, Refusal, Shown
from conf.typed import arms, field_types
from pipelines.settings import hydra_private

CONF_DIR = Path(conf.__file__).parent
_OVERRIDE = re.compile(r"^(?P<prefix>\+\+|\+|~)?(?P<key>[\w./@-]+?)(?:=(?P<value>.*))?$", re.DOTALL)
_QUOTED = re.compile(r"""\s*(?P<quote>['"])(?:\\.|(?!(?P=quote)).)*(?P=quote)\s*""", re.DOTALL)
_SWEEP = re.compile(r"\s*(choice|range|interval|glob|shuffle|sort|tag)\(.*\)\s*", re.DOTALL)
_ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")
_PAIRS = {"(": ")", "[": "]", "{": "}"}
ENDLESS = (
    "this names no values that a sweep could try one after the other",
    "write them out and add -m, as in athanor run -m … optim.lr=1e-3,3e-4 or 'model.n_layers=range(2,6,2)'",
)
"""Rule and remedy."""


def hydra_overrides(overrides: Sequence[str], root: type, *, sweep: bool = False) -> list[str]:
    """Overrides in Hydra's grammar; `root`: the dataclass whose fields the keys name. Raises Refusal.

    A group choice is checked here, where the options are known. A value is forced (`++`): whether the key exists is checked
    by the dataclasses, whose defaults are in no YAML file. Commas separate points of a sweep, or are text.
    """
    result = []
    for override in overrides:
        match = _OVERRIDE.match(override)
        if match is None or (match["value"] is None and match["prefix"] != "~"):
            raise Refusal(
                "overrides", override, "no override", "write KEY=VALUE, for example experiment=demo or optim.lr=3e-4"
            )
        key, value = match["key"], match["value"] or ""
        if not key.isascii():
            raise Refusal(
                "overrides",
                override,
                "names of settings and of sources are ASCII letters, digits and _",
                f"rename {key}",
            )
        if match["prefix"] == "~" and (CONF_DIR / key).is_dir():
            choices = ", ".join(f"{key}={option}" for option in options(key))
            raise Refusal(
                override, NO_VALUE, f"{key} is a group, which has one option chosen", f"write one of {choices}"
            )
        if key.startswith("hydra") or match["prefix"] == "~":
            result.append(override)
        elif (CONF_DIR / key).is_dir() and _SWEEP.fullmatch(value):
            if not sweep:
                raise _several(key, value)
            result.append(f"{key}={value}")
        elif (CONF_DIR / key).is_dir():
            chosen = [_bare(option) for option in value.split(",")]
            for option in chosen:
                _check_option(key, option)
            if len(chosen) > 1 and not sweep:
                raise _several(key, value)
            # Quoted, since Hydra would take zero=2 for the number and refuse it as the name of an option.
            result.append(f"{key}=" + ",".join(f"'{option}'" for option in chosen))
        else:
            result.append(f"++{key}={_value(key, value, root, sweep=sweep)}")
    if not any(override.startswith("experiment=") for override in result):
        known = ", ".join(options("experiment"))
        raise Refusal("experiment", None, "none is chosen", f"add experiment=NAME, one of {known}")
    return result


def _value(key: str, value: str, root: type, *, sweep: bool) -> str:
    """One value in Hydra's grammar."""
    kind, optional = _kind(root, key.split("."))
    if _SWEEP.fullmatch(value) and (kind != "texts" or sweep):
        if sweep:
            return value
        raise _several(key, value)
    if kind is None:
        return _literal(key, value, sweep=sweep)
    if not sweep:
        return _texts(key, value) if kind == "texts" else _text(value, optional=optional)
    points = _split(value)
    return ",".join(_texts(key, point) if kind == "texts" else _text(point, optional=optional) for point in points)


def _texts(key: str, value: str) -> str:
    """A list of texts; a single one needs no brackets."""
    inner = value.strip()
    if not inner.startswith("["):
        if len(_split(inner)) > 1:
            raise Refusal(
                key,
                Shown(value),
                "several stand in brackets, and a name that has a comma in quotes of its own",
                f"write {shlex.quote(f'{key}=[{inner}]')} or {shlex.quote(f'{key}=[{_quoted(inner)}]')}",
            )
        return f"[{_text(inner)}]" if inner else "[]"
    if not inner.endswith("]"):
        raise Refusal(key, Shown(value), "the bracket is not closed", f"write {shlex.quote(f'{key}={inner}]')}")
    items = _split(inner[1:-1]) if inner[1:-1].strip() else []
    if not all(item.strip() for item in items):
        filled = ",".join(item.strip() for item in items if item.strip())
        raise Refusal(key, Shown(value), "an entry of the list is empty", f"write {shlex.quote(f'{key}=[{filled}]')}")
    return "[" + ",".join(map(_text, items)) + "]"


def _text(item: str, *, optional: bool = False) -> str:
    """One text: unchanged where it is quoted or null, else quoted. A backslash escapes a comma or bracket."""
    item = item.strip()
    if _QUOTED.fullmatch(item) or (optional and item.lower() == "null"):
        return item
    return _quoted(_ESCAPED.sub(r"\1", item))


def _quoted(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return str(QuotedString(text=text, quote=Quote.single).with_quotes())


def _literal(key: str, value: str, *, sweep: bool) -> str:
    """A value of another type: unchanged where Hydra can parse it, else quoted for the dataclass to refuse."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(f"++{key}={value}")
    except HydraException as error:
        if value.lstrip()[:1] in ("[", "{") or sweep:
            raise Refusal(
                key,
                Shown(value),
                reason(error),
                "lists are written [a,b], mappings {name: value}, and text with other signs in quotes of its own; the whole "
                "in quotes for the shell",
            ) from error
        return _quoted(value)
    if parsed.is_sweep_override() and not sweep:
        raise _several(key, value)
    return value


def _several(key: str, value: str) -> Refusal:
    if value.lstrip().startswith("interval("):
        return Refusal(key, Shown(value), *ENDLESS)
    return Refusal(
        key,
        Shown(value),
        "several values are a sweep, and this command takes one",
        f"choose one, or let every one run: athanor run -m … {shlex.quote(f'{key}={value}')}",
    )


def reason(error: Exception) -> str:
    """The message of Hydra's parser, without its pointers."""
    message = str(error).split("\n")[0].strip()
    return message if message.startswith(("no viable", "mismatched", "extraneous")) else "it cannot be read"


def _split(text: str) -> list[str]:
    """Split at commas outside quotes and, where these are balanced, outside brackets."""
    parts, start, at = [], 0, 0
    closing: list[str] = []
    is_balanced = _is_balanced(text)
    while at < len(text):
        if at == start and (quoted := re.compile(_QUOTED.pattern + r"(?=,|$)", re.DOTALL).match(text, at)):
            at = quoted.end()
            continue
        sign = text[at]
        if sign == "\\":
            at += 2
            continue
        if sign == "," and not closing:
            parts.append(text[start:at])
            start = at + 1
        elif is_balanced and sign in _PAIRS:
            closing.append(_PAIRS[sign])
        elif is_balanced and closing and sign == closing[-1]:
            closing.pop()
        at += 1
    return [*parts, text[start:]]


def _is_balanced(text: str) -> bool:
    expected: list[str] = []
    for sign in text:
        if sign in _PAIRS:
            expected.append(_PAIRS[sign])
        elif sign in _PAIRS.values() and (not expected or expected.pop() != sign):
            return False
    return not expected


def _kind(root: type, path: Sequence[str]) -> tuple[Literal["text", "texts"] | None, bool]:
    """Whether the field at a dotted path is text or a list of texts, and whether it may be null."""
    arms = types_at(root, path)
    optional = type(None) in arms
    kinds = {
        arm if arm is str else "texts" if arm == tuple[str, ...] else None for arm in arms if arm is not type(None)
    }
    if kinds == {str}:
        return "text", optional
    return ("texts", False) if kinds == {"texts"} and not optional else (None, optional)


def types_at(root: type, path: Sequence[str]) -> list[Any]:
    """The types that a value at a dotted path may have; empty where no settings class has the path."""
    hints: list[Any] = [root]
    for name in path:
        hints = [inner for hint in hints for inner in _inside(hint, name)]
    return [arm for hint in hints for arm in arms(hint)]


def fields_by_kind(root: type, path: Sequence[str], kind: str) -> tuple[set[str], set[str]]:
    """Fields of the class of `kind` at a dotted path, and fields of the other kinds (none where `kind` is unknown)."""
    classes = [arm for arm in types_at(root, path) if dataclasses.is_dataclass(arm) and isinstance(arm, type)]
    kinds = {cls: typing.get_args(field_types(cls).get("kind")) for cls in classes}
    own = {name for cls in classes if kind in kinds[cls] for name in field_types(cls)}
    return own, {name for cls in classes if own and kind not in kinds[cls] for name in field_types(cls)}


def _inside(hint: Any, name: str) -> Iterator[Any]:
    """Types of the item `name` in values of a type."""
    for arm in arms(hint):
        if typing.get_origin(arm) is dict:
            yield typing.get_args(arm)[1]
        elif dataclasses.is_dataclass(arm) and isinstance(arm, type) and name in field_types(arm):
            yield field_types(arm)[name]


def points_of(overrides: Sequence[str], root: type) -> list[tuple[str, ...]]:
    """The overrides of each point of a sweep, in Hydra's own order. Raises Refusal for one without an end."""
    from hydra.errors import HydraException

    written = [
        override for override in hydra_overrides(overrides, root, sweep=True) if not override.startswith("hydra")
    ]
    for override in written:
        try:
            hydra_private.sweep_points([override])
        except HydraException as error:
            key, _, value = override.removeprefix("++").partition("=")
            raise Refusal(key, Shown(value), *ENDLESS) from error
    return [tuple(each.removeprefix("++") for each in point) for point in hydra_private.sweep_points(written)]


def chosen_fields(overrides: Sequence[str]) -> list[str]:
    """The dotted fields of `model` that overrides set, one by one or by choosing a preset."""
    import yaml

    chosen: list[str] = []
    for key, _, value in (override.lstrip("+").partition("=") for override in overrides):
        if key == "model":
            preset = yaml.safe_load((CONF_DIR / "model" / f"{_bare(value)}.yaml").read_text(encoding="utf-8"))
            chosen += _leaves(preset, "")
        elif key.startswith("model."):
            chosen.append(key.removeprefix("model."))
    return chosen


def _leaves(plain: Any, path: str) -> list[str]:
    if not isinstance(plain, typing.Mapping):
        return [path]
    return [leaf for key, value in plain.items() for leaf in _leaves(value, f"{path}.{key}" if path else key)]


def groups() -> list[str]:
    """Names of the configuration groups."""
    return sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir() and any(path.glob("*.yaml")))


def options(group: str) -> list[str]:
    """Names to choose from in one group."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def _bare(option: str) -> str:
    """The name of an option, without quotes around it."""
    option = option.strip()
    return option[1:-1] if _QUOTED.fullmatch(option) else option


def _check_option(group: str, option: str) -> None:
    known = options(group)
    if option not in known:
        near = difflib.get_close_matches(option, known, n=1)
        there_are = f"there are {', '.join(known)}"
        advice = f"did you mean {group}={near[0]}? T{there_are[1:]}" if near else there_are
        raise Refusal(group, Shown(option), f"no such {group}", advice)
