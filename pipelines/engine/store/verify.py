"""Verify every artifact and lease of a store: all bytes are read, no remembered hash is trusted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from conf.refusal import Refusal
from pipelines.engine.fingerprint import SHORT
from pipelines.engine.step import Artifact
from pipelines.engine.store import lease as leases
from pipelines.engine.store import manifest as manifests
from pipelines.engine.store.base import Store, damaged_file
from pipelines.engine.store.records import Seen


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Result for one artifact, lease or stray file."""

    place: str
    damage: list[str] = field(default_factory=list)
    """Sentences with the remedy; empty if intact."""
    notes: list[str] = field(default_factory=list)
    kind: Literal["artifact", "lease", "stray"] = "artifact"
    unsealed: bool = False
    """An artifact from before seals that was not sealed now."""
    files: int = 0
    bytes: int = 0


def findings(store: Store, *, seal: bool = False) -> Iterator[Finding]:
    """One finding per artifact, per stray, then per lease. ``seal``: seals intact, unsealed ones."""
    unsealed = set()
    for step, names in store.published().items():
        for name in names:
            finding = _artifact(store, step, name, seal)
            if finding.unsealed:
                unsealed.add(f"{step}-{name}")
            yield finding
    for line in store.strays():
        yield Finding(place=store.url, kind="stray", notes=[line])
    for name in store.records.names():
        yield _lease(store, name, seal and name not in unsealed)  # a sealed lease says that its manifest was sealed


def _artifact(store: Store, step: str, name: str, seal: bool) -> Finding:
    place = f"{store.url}/{step}/{name}"
    data = store.manifest_bytes(step, name)
    try:
        manifest = store.read_manifest(data or b"", place)
    except Refusal as refusal:
        return Finding(place=place, damage=[str(refusal)])
    if (manifest["step"], manifest["digest"][:SHORT]) != (step, name):
        return Finding(
            place=place, damage=[f"{place} is a copy of {manifest['step']}/{manifest['digest'][:SHORT]}: delete it."]
        )
    artifact = Artifact(step=step, digest=manifest["digest"], url=place, manifest=manifest)
    damage = []
    for path, sha256 in store.hashes_now(artifact).items():
        if sha256 != (published := manifest["files"][path]["sha256"]):
            state = (
                "is missing"
                if sha256 is None
                else f"is not what was published (its sha256 is {sha256} and was {published})"
            )
            damage.append(str(damaged_file(artifact, f"{place}/{path}", state)))
    notes = [f"{place}/{path}: no part of the artifact, never read" for path in store.unlisted(artifact)]
    unsealed = not manifests.is_sealed(manifest)
    if unsealed and seal and not damage:
        store.seal(artifact)
        unsealed = False
        notes.append(f"{place}: sealed")
    elif unsealed:
        notes.append(f"{place}: its manifest has no seal, so a change to its metrics would not be noticed")
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    return Finding(
        place=place, damage=damage, notes=notes, unsealed=unsealed, files=len(manifest["files"]), bytes=total
    )


def _lease(store: Store, name: str, seal: bool) -> Finding:
    place = f"{store.url}/.leases/{name}"
    try:
        seen = leases.read(store.records, name)
    except Refusal as refusal:
        return Finding(place=place, kind="lease", damage=[str(refusal)])
    if seal and seen is not None and not seen.sealed and seen.value["state"] == "free":
        return Finding(place=place, kind="lease", notes=_seal_lease(store, name, seen))
    return Finding(place=place, kind="lease")


def _seal_lease(store: Store, name: str, seen: Seen) -> list[str]:
    """Seal a lease; if another process takes it meanwhile, that one seals it."""
    written = store.records.write(name, seen.value, seen.version)
    return [f"{store.url}/.leases/{name}: sealed"] if written is not None else []
