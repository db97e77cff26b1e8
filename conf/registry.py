"""Parts that come in kinds: a literal table of ours, and what installed packages add to it.

    class MixerConfig:
        kinds: ClassVar[Registry] = Registry("mixers", {"attention": "model.mixers.attention:AttentionConfig", ...})

A field of settings is typed by the group's base, `mixer: MixerConfig`, and `conf.typed` asks the base's registry for the
class of a `kind`. Our table is read without importing anything, and entry points only where it has no answer, so the
chosen part alone is imported. A package of somebody else's adds a kind in its pyproject.toml:

    [project.entry-points."athanor.mixers"]
    retention = "acme_parts.retention:RetentionConfig"

The class is a frozen dataclass below the base with `kind: Literal["retention"] = "retention"` and `version: ClassVar[int]`,
which its author raises when the same settings come to mean something else. Its distribution's name and that number are
part of every digest that it decides. A kind of ours cannot be claimed by others, and no kind by two.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from conf.refusal import Refusal

FROM = "from"
"""Key of a foreign part's plain form: the distribution that it comes from."""


@dataclass(frozen=True)
class Origin:
    """Where a foreign part comes from: its distribution, and the version that its class gives itself."""

    distribution: str
    version: int


class Registry:
    """The kinds of one group: kind → "module:Class"."""

    def __init__(self, group: str, table: Mapping[str, str]) -> None:
        self.group = group
        self.table = dict(table)

    def names(self) -> list[str]:
        """Every kind there is, ours first. Raises Refusal where two claim the same."""
        return [*self.table, *self._foreign]

    def classes(self) -> list[type]:
        """The class of every kind of ours, and of those of other packages that can be imported."""
        return [self.load(kind) for kind in self.names()]

    def load(self, kind: Any, where: str = "kind", distribution: str | None = None) -> type:
        """The class of a kind, imported now.

        where: the dotted key that names it. distribution: whose it is, if that is known. Raises Refusal for a kind that
        nobody has, and for a class that cannot be imported or is not what its entry says.
        """
        if kind in self.table:
            return self._import(str(kind), self.table[kind])
        if kind not in self._foreign:
            names = self.names()
            if distribution is not None:
                raise Refusal(
                    where,
                    kind,
                    f"a kind of the package {distribution}, which is not installed here",
                    f"install {distribution} on every machine of the run, in the same version",
                )
            near = difflib.get_close_matches(str(kind), names, n=1, cutoff=0.6)
            raise Refusal(where, kind, f"must be one of {', '.join(names)}", f"did you mean {near[0]}?" if near else "")
        entry = self._foreign[kind]
        cls = self._import(kind, entry.value)
        if not isinstance(vars(cls).get("version"), int):
            raise Refusal(
                where,
                kind,
                f"{entry.value} of {_distribution(entry)} has no version, without which its results could not be told from "
                "those of a later one",
                "give the class `version: ClassVar[int] = 1`",
            )
        _ORIGINS[cls] = Origin(_distribution(entry), vars(cls)["version"])
        return cls

    def _import(self, kind: str, place: str) -> type:
        module, _, name = place.partition(":")
        try:
            found: type = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            if kind in self.table:
                raise
            raise Refusal(
                f"athanor.{self.group}",
                kind,
                f"{place} cannot be imported ({error})",
                f"mend or remove {_distribution(self._foreign[kind])}",
            ) from error
        return found

    @functools.cached_property
    def _foreign(self) -> dict[str, metadata.EntryPoint]:
        found: dict[str, metadata.EntryPoint] = {}
        for entry in metadata.entry_points(group=f"athanor.{self.group}"):
            if entry.name in self.table or entry.name in found:
                other = "Athanor itself" if entry.name in self.table else _distribution(found[entry.name])
                raise Refusal(
                    f"athanor.{self.group}",
                    entry.name,
                    f"{_distribution(entry)} claims a kind of {other}",
                    f"rename it in {_distribution(entry)}, or remove the package",
                )
            found[entry.name] = entry
        return found


def registry_of(base: Any) -> Registry | None:
    """The registry of a group's base; null for every other type, a part of the group among them."""
    found = vars(base).get("kinds") if isinstance(base, type) else None
    return found if isinstance(found, Registry) else None


def origin(part: type) -> Origin | None:
    """Where a part's class comes from; null for ours."""
    return _ORIGINS.get(part)


_ORIGINS: dict[type, Origin] = {}


def _distribution(entry: metadata.EntryPoint) -> str:
    return "a package without a name" if entry.dist is None else entry.dist.name
