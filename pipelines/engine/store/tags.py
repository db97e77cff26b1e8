"""Names that people give artifacts: `<store>/.tags/NAME.json`, sealed. A tag never enters a digest.

write(store, "best", artifact)
find(store, "best").url        # runs/pretrain/0123456789abcdef
listed(store)                  # every tag with what it names
remove(store, "best")
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from conf.refusal import NO_VALUE, Refusal
from pipelines.engine.step import Artifact
from pipelines.engine.store.base import Store
from pipelines.engine.store.manifest import now

PREFIX = "tag:"
"""What stands before a tag's name wherever a model is named: `--from tag:best`."""


@dataclass(frozen=True, kw_only=True)
class Tag:
    """What a name stands for, and since when (ISO 8601, UTC)."""

    name: str
    step: str
    digest: str
    tagged: str


def write(store: Store, name: str, artifact: Artifact) -> None:
    """Give an artifact a name; a name that is taken moves here. Raises Refusal for a name that cannot be a file's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise Refusal(
            "tag", name, "a name has letters, digits, dots, dashes and underscores, 100 at most", "choose such a name"
        )
    _put(store, name, {"step": artifact.step, "digest": artifact.digest})


def remove(store: Store, name: str) -> None:
    """Forget a name; what it stood for stays. Raises Refusal where there is no such tag."""
    _read(store, name)
    _put(store, name, {})


def find(store: Store, name: str) -> Artifact:
    """The artifact of a name. Raises Refusal where there is no such tag, or what it stood for is gone."""
    tag = _read(store, name)
    artifact = store.find(tag.step, tag.digest)
    if artifact is None:
        raise Refusal(
            f"{PREFIX}{name}",
            NO_VALUE,
            f"it stands for {store.address(tag.step, tag.digest)}, which is not there any more",
            "make that artifact again, or give the tag to another",
        )
    return artifact


def listed(store: Store) -> list[Tag]:
    """Every tag, by name."""
    found = (_seen(store, name) for name in store.tags.names())
    return [tag for tag in found if tag is not None]


def _read(store: Store, name: str) -> Tag:
    tag = _seen(store, name)
    if tag is None:
        there = ", ".join(tag.name for tag in listed(store)) or "none"
        raise Refusal(
            f"{PREFIX}{name}",
            NO_VALUE,
            f"no such tag in the store {store.url}; there are {there}",
            f"write athanor tag {name} STEP experiment=…, with the experiment that made the step",
        )
    return tag


def _seen(store: Store, name: str) -> Tag | None:
    seen = store.tags.read(name)
    if seen is None or "digest" not in seen.value:
        return None
    value = seen.value
    return Tag(name=name, step=value["step"], digest=value["digest"], tagged=value["tagged"])


def _put(store: Store, name: str, value: dict[str, str]) -> None:
    """Write over whatever stands there, also if somebody else wrote it meanwhile: the last one holds."""
    while True:
        seen = store.tags.read(name)
        revision = 1 if seen is None else int(seen.value["revision"]) + 1
        record = {"format": 1, "revision": revision, "tagged": now(), **value}
        if store.tags.write(name, record, None if seen is None else seen.version) is not None:
            return
