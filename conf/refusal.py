"""The one error that a person can act on, and its one grammar.

    raise Refusal("optim.lr", 0, "a learning rate is above 0", "set optim.lr=3e-4")

    athanor: optim.lr = 0: a learning rate is above 0. Set optim.lr=3e-4.

Whatever ends a command because of a setting, a file, a machine or a service is a Refusal: the command prints its one
paragraph, without a traceback, and leaves with its exit code. Any other exception is a bug.

Settings check themselves without knowing where they stand. They name their own fields by `field`, and whoever holds
them says where that is with `under`:

    raise Refusal("head.kind", "none", "a decoder has a head", f"set {field('head.kind')}=language")
    refusal.under("model.encoder")      # model.encoder.head.kind = 'none': … Set model.encoder.head.kind=language.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any, Self

NO_VALUE: Any = ...
"""In place of a value: what is wrong has a place but no value, as a file that is missing."""

_OPEN, _CLOSE = "\ue000", "\ue001"  # around the name of a field; private use, so no text has them
_LONGEST_VALUE = 200  # characters shown


class Refusal(Exception):  # noqa: N818  (it is what a person reads)
    """A problem a person can act on: where it stands, the value there, the rule it breaks, what to do about it.

    where: a setting's dotted key, a path, a step or a command. rule, remedy: sentences without their last full stop; the
    remedy says what to type or do, and works when it is done. above: where the settings that refuse stand, if they are
    held by others. Survives pickling through worker processes.
    """

    exit_code = 2

    def __init__(self, where: str | PurePath, value: object, rule: str, remedy: str = "", above: str = "") -> None:
        self.where, self.rule, self.remedy, self.above = str(where), rule, remedy, above
        self.value = value if value is NO_VALUE else shown(value)
        super().__init__(self.where, self.value, rule, remedy, above)

    def under(self, above: str) -> Self:
        """The same refusal where the settings that raised it stand at `above`, a dotted key."""
        moved = type(self)(_joined(above, self.where), self.value, self.rule, self.remedy, _joined(above, self.above))
        moved.__cause__ = self.__cause__
        return moved

    def __str__(self) -> str:
        place = self.where if self.value is NO_VALUE else f"{self.where} = {self.value}"
        sentences = [f"{place}: {self.rule}" if place else self.rule, self.remedy[:1].upper() + self.remedy[1:]]
        return _with_full_keys(" ".join(_ended(text) for text in sentences if text), self.above)


class Shown(str):
    """A value as a message shows it."""


def field(name: str) -> str:
    """A field of the settings that refuse, for rules and remedies; the message has its full key."""
    return f"{_OPEN}{name}{_CLOSE}"


def shown(value: object) -> Shown:
    """A value as a person types or reads it: YAML's null, true and false, text in quotes, at most 200 characters."""
    if isinstance(value, Shown):
        return value
    if value is None or isinstance(value, bool):
        return Shown("null" if value is None else str(value).lower())
    text = str(value) if isinstance(value, PurePath) else repr(value)
    return Shown(text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…")


def refuse_below(settings: object, least: float, *names: str) -> None:
    """Raise Refusal where one of these fields of `settings` is below `least`; null passes. The remedy is its default."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:
            usual = getattr(type(settings), name, least)  # a dataclass keeps defaults as attributes of the class
            raise Refusal(name, value, f"must be at least {least}", f"set {field(name)}={shown(usual)}")


def _with_full_keys(text: str, above: str) -> str:
    plain, *marked = text.split(_OPEN)
    parts = [part.partition(_CLOSE) for part in marked]
    return plain + "".join(_joined(above, name) + rest for name, _, rest in parts)


def _joined(above: str, name: str) -> str:
    return f"{above}.{name}" if above and name else above or name


def _ended(text: str) -> str:
    return text if text.endswith((".", "?", "!", "…")) else f"{text}."
