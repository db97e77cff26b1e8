"""Why a step has to run: which of the things it is made from differ from the nearest artifact there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.engine.files import FileHashes
from pipelines.engine.fingerprint import SHORT
from pipelines.engine.resolve import Node, resolve
from pipelines.engine.step import Step
from pipelines.engine.store.open import Store, storage_errors

ABSENT = "(absent)"
TIES = 50
SHOWN = 5  # names of changed files


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing that differs. ``before`` or ``now`` is ABSENT where it did not exist."""

    field: str
    """Dotted: ``settings.optim.lr``, ``version``, ``files.corpus``, ``inputs.shards``."""
    before: Any
    now: Any
    because: Why | None = None
    """For an input: what changed in it."""


@dataclass(frozen=True, kw_only=True)
class Why:
    """The answer for one step; ``str()`` of it is what a person reads."""

    step: str
    digest: str
    path: str | None
    """Of the artifact, if it is there: nothing has to run."""
    against: str | None = None
    """Digest of the artifact that was compared with; None: there is none."""
    made: str | None = None
    """When that one was finished."""
    changes: list[Change] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def why(step: Step, *, store: Store) -> Why:
    """Compare a step with the earlier artifact that differs from it in the fewest fields (then the latest)."""
    with storage_errors(store):
        return _answer(resolve([step], FileHashes(store.file_hashes)).targets[0], store)


def _answer(node: Node, store: Store) -> Why:
    artifact = store.find(node.name, node.digest)
    if artifact is not None:
        return Why(step=node.name, digest=node.digest, path=artifact.url)
    earlier = sorted(store.all_manifests(node.name), key=lambda manifest: manifest["finished"], reverse=True)
    if not earlier:
        return Why(step=node.name, digest=node.digest, path=None)
    counts = [len(_differing(node.identity, manifest["identity"])) for manifest in earlier]
    nearest = [manifest for manifest, count in zip(earlier, counts, strict=True) if count == min(counts)]
    # An input that differs counts as one here and as all that changed in it there; only ties are worth the reading.
    return min((_compare(node, manifest, store) for manifest in nearest[:TIES]), key=_depth)


def _depth(answer: Why) -> int:
    """How many fields changed, in the step itself and in what its inputs are made from."""
    return sum(_depth(change.because) if change.because else 1 for change in answer.changes)


def _compare(node: Node, manifest: Mapping[str, Any], store: Store) -> Why:
    changes = []
    for name, before, now in _differing(node.identity, manifest["identity"]):
        because = None
        if name.startswith("inputs.") and ABSENT not in (before, now):
            because = _input(node.inputs[name.removeprefix("inputs.")], before, store)
        elif name.startswith("files."):
            file_set = name.removeprefix("files.")
            before, now = _files(manifest["sources"].get(file_set, []), node.sources.get(file_set, []))
        changes.append(Change(field=name, before=before, now=now, because=because))
    return Why(
        step=node.name,
        digest=node.digest,
        path=None,
        against=manifest["digest"],
        made=manifest["finished"],
        changes=changes,
    )


def _input(node: Node, before: str, store: Store) -> Why | None:
    """What changed in an input against the one that was used; None if that one was deleted."""
    artifact = store.find(node.name, before)
    return _compare(node, artifact.manifest, store) if artifact is not None else None


def _differing(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted field, value before, value now) where two identities differ."""
    flat_before, flat_now = _flat(before), _flat(now)
    fields = [*flat_now, *(name for name in flat_before if name not in flat_now)]
    pairs = ((name, flat_before.get(name, ABSENT), flat_now.get(name, ABSENT)) for name in fields)
    return [(name, old, new) for name, old, new in pairs if old != new]


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        flat: dict[str, Any] = {}
        for key, item in value.items():
            flat |= _flat(item, f"{where}.{key}" if where else key)
        return flat
    return {where: value}


def _files(before: list[list[str]], now: list[list[str]]) -> tuple[str, str]:
    """Names of the files that differ, on each side."""
    old, new = {tuple(entry) for entry in before}, {tuple(entry) for entry in now}
    return _names(old - new, len(old)), _names(new - old, len(new))


def _names(entries: set[tuple[str, ...]], total: int) -> str:
    names = sorted(entry[0] for entry in entries)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN]) or 'none of these'}{more} (of {total})"


def _lines(answer: Why, explained: set[tuple[str, str | None]] | None = None) -> list[str]:
    """What changed, each step explained where it is met first: inputs of several steps are met again."""
    explained = set() if explained is None else explained
    name = f"{answer.step} {answer.digest[:SHORT]}"
    if answer.path is not None:
        return [f"{name} is there: {answer.path}"]
    if answer.against is None:
        return [f"{name} was never made in this store"]
    if (answer.digest, answer.against) in explained:
        return [f"{name} differs from {answer.against[:SHORT]} as explained above"]
    explained.add((answer.digest, answer.against))
    lines = [f"{name} differs from {answer.against[:SHORT]} ({answer.made}) in:"]
    for change in answer.changes:
        if change.field.startswith("inputs."):
            lines.append(f"  {change.field}")
            inner = (
                _lines(change.because, explained)
                if change.because
                else [f"another one; {change.before} is no longer there"]
            )
            lines += [f"    {line}" for line in inner]
        else:
            lines.append(f"  {change.field}: {change.before} → {change.now}")
    return lines
