"""What a person types as KEY=VALUE, made into what Hydra's grammar can read.

    hydra_overrides(["experiment=text", "corpus.paths=[Bücher/a (1).txt]"], Settings)
    # ["experiment='text'", "++corpus.paths=['Bücher/a (1).txt']"]

Hydra's grammar knows no `=`, `(`, `#`, `~`, `!` and no letter beyond ASCII outside quotes, and a shell takes one pair of
quotes away. So where a setting is text, all that stands there is text and is quoted here: `store=2024`,
`tracking.name=a(b)`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import conf
from pipelines.engine.typed import field_types

CONF_DIR = Path(conf.__file__).parent
_OVERRIDE = re.compile(r"^(?P<prefix>\+\+|\+|~)?(?P<key>[\w./@-]+?)(?:=(?P<value>.*))?$", re.DOTALL)
_QUOTED = re.compile(r"""\s*(?P<quote>['"])(?:\\.|(?!(?P=quote)).)*(?P=quote)\s*""", re.DOTALL)
_SWEEP = re.compile(r"\s*(choice|range|interval|glob|shuffle|sort|tag)\(.*\)\s*", re.DOTALL)
_ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")
_PAIRS = {"(": ")", "[": "]", "{": "}"}
ENDLESS = (
    "this names no values that a sweep could try one after the other. Write them out and add -m, as in athanor run -m … "
    "optim.lr=1e-3,3e-4 or 'model.n_layers=range(2,6,2)'."
)


class SettingsError(Exception):
    """A setting that cannot be: offending value, rule, remedy."""

    exit_code = 2


def hydra_overrides(overrides: Sequence[str], root: type, *, sweep: bool = False) -> list[str]:
    """Overrides as Hydra shall see them; `root`: the dataclass whose fields the keys are. Raises SettingsError.

    A group choice is checked here, where the options are known. A value is forced (`++`): whether the key exists is for
    the dataclasses to say, which know defaults that no YAML file spells out. Commas are points of a sweep, or text.
    """
    words = []
    for word in overrides:
        match = _OVERRIDE.match(word)
        if match is None or (match["value"] is None and match["prefix"] != "~"):
            raise SettingsError(
                f"{word!r} is no override; write KEY=VALUE, for example experiment=demo or optim.lr=3e-4."
            )
        key, value = match["key"], match["value"] or ""
        if not key.isascii():
            raise SettingsError(
                f"{word!r}: names of settings and of sources are ASCII letters, digits and _; rename {key}."
            )
        if key.startswith("hydra") or match["prefix"] == "~":
            words.append(word)
        elif (CONF_DIR / key).is_dir() and _SWEEP.fullmatch(value):
            if not sweep:
                raise _several(key, value)
            words.append(f"{key}={value}")
        elif (CONF_DIR / key).is_dir():
            chosen = [_bare(option) for option in value.split(",")]
            for option in chosen:
                _check_option(key, option)
            if len(chosen) > 1 and not sweep:
                raise _several(key, value)
            # Quoted, since Hydra would take zero=2 for the number and refuse it as the name of an option.
            words.append(f"{key}=" + ",".join(f"'{option}'" for option in chosen))
        else:
            words.append(f"++{key}={_value(key, value, root, sweep=sweep)}")
    if not any(word.startswith("experiment=") for word in words):
        known = ", ".join(options("experiment"))
        raise SettingsError(f"no experiment chosen; add experiment=NAME, one of {known}.")
    return words


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
    """A list of texts; one alone may stand without brackets."""
    inner = value.strip()
    if not inner.startswith("["):
        if len(_split(inner)) > 1:
            raise SettingsError(
                f"{key}={value}: several stand in brackets, and a name that has a comma in quotes of its own. Write "
                f"{shlex.quote(f'{key}=[{inner}]')} or {shlex.quote(f'{key}=[{_quoted(inner)}]')}."
            )
        return f"[{_text(inner)}]" if inner else "[]"
    if not inner.endswith("]"):
        raise SettingsError(f"{key}={value}: the bracket is not closed; write {shlex.quote(f'{key}={inner}]')}.")
    items = _split(inner[1:-1]) if inner[1:-1].strip() else []
    if not all(item.strip() for item in items):
        told = ",".join(item.strip() for item in items if item.strip())
        raise SettingsError(f"{key}={value}: an entry of the list is empty; write {shlex.quote(f'{key}=[{told}]')}.")
    return "[" + ",".join(map(_text, items)) + "]"


def _text(item: str, *, optional: bool = False) -> str:
    """One text: as it stands where it is quoted or null, else quoted. A backslash takes a comma or bracket as it is."""
    item = item.strip()
    if _QUOTED.fullmatch(item) or (optional and item.lower() == "null"):
        return item
    return _quoted(_ESCAPED.sub(r"\1", item))


def _quoted(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return str(QuotedString(text=text, quote=Quote.single).with_quotes())


def _literal(key: str, value: str, *, sweep: bool) -> str:
    """A value that is no text: as it stands where Hydra reads it, else quoted, for the dataclass to say what it wants."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(f"++{key}={value}")
    except HydraException as error:
        if value.lstrip()[:1] in ("[", "{") or sweep:
            raise SettingsError(
                f"{key}={value}: {reason(error)} Lists are written [a,b], mappings {{name: value}}, and text with other "
                "signs in quotes of its own; the whole in quotes for the shell."
            ) from error
        return _quoted(value)
    if parsed.is_sweep_override() and not sweep:
        raise _several(key, value)
    return value


def _several(key: str, value: str) -> SettingsError:
    if value.lstrip().startswith("interval("):
        return SettingsError(f"{key}={value}: {ENDLESS}")
    return SettingsError(
        f"{key}={value}: several values are a sweep, and this command takes one. Choose one, or let every one run: athanor "
        f"run -m … {shlex.quote(f'{key}={value}')}"
    )


def reason(error: Exception) -> str:
    """What Hydra's parser met, without its pointers."""
    said = str(error).split("\n")[0].strip()
    return f"{said}." if said.startswith(("no viable", "mismatched", "extraneous")) else "that cannot be read."


def _split(text: str) -> list[str]:
    """Parts between commas that stand in no quotes and, where these are balanced, in no brackets."""
    parts, start, at = [], 0, 0
    closing: list[str] = []
    balanced = _is_balanced(text)
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
        elif balanced and sign in _PAIRS:
            closing.append(_PAIRS[sign])
        elif balanced and closing and sign == closing[-1]:
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
    """The types that a value at a dotted path may have; none where no settings class knows the path."""
    hints: list[Any] = [root]
    for name in path:
        hints = [inner for hint in hints for inner in _inside(hint, name)]
    return [arm for hint in hints for arm in _arms(hint)]


def fields_by_kind(root: type, path: Sequence[str], kind: str) -> tuple[set[str], set[str]]:
    """Of the kinds there are at a dotted path: the fields of one, and the fields of all others; of one, no others."""
    classes = [arm for arm in types_at(root, path) if dataclasses.is_dataclass(arm) and isinstance(arm, type)]
    kinds = {cls: typing.get_args(field_types(cls).get("kind")) for cls in classes}
    own = {name for cls in classes if kind in kinds[cls] for name in field_types(cls)}
    return own, {name for cls in classes if own and kind not in kinds[cls] for name in field_types(cls)}


def _inside(hint: Any, name: str) -> Iterator[Any]:
    """Types of what stands under `name` in values of a type."""
    for arm in _arms(hint):
        if typing.get_origin(arm) is dict:
            yield typing.get_args(arm)[1]
        elif dataclasses.is_dataclass(arm) and isinstance(arm, type) and name in field_types(arm):
            yield field_types(arm)[name]


def _arms(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [inner for arm in typing.get_args(hint) for inner in _arms(arm)]
    return [hint]


def points_of(overrides: Sequence[str], root: type) -> list[tuple[str, ...]]:
    """The overrides of each point of a sweep, in Hydra's own order. Raises SettingsError for one without an end."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    words = [word for word in hydra_overrides(overrides, root, sweep=True) if not word.startswith("hydra")]
    for word in words:
        try:
            BasicSweeper.split_arguments(OverridesParser.create().parse_overrides([word]), max_batch_size=None)
        except HydraException as error:
            key, _, value = word.removeprefix("++").partition("=")
            raise SettingsError(f"{key}={value}: {ENDLESS}") from error
    [points] = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), max_batch_size=None)
    return [tuple(word.removeprefix("++") for word in point) for point in points]


def chosen_fields(overrides: Sequence[str]) -> list[str]:
    """The dotted fields of `model` that overrides set, one by one or by choosing a preset."""
    import yaml

    chosen: list[str] = []
    for key, _, value in (word.lstrip("+").partition("=") for word in overrides):
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
        hint = f" Did you mean {group}={near[0]}?" if near else ""
        raise SettingsError(f"{group}={option}: no such {group}.{hint} There are {', '.join(known)}.")
