"""Find the tokenizer of weights that one of our steps made, through their manifest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.files import read_file
from conf.refusal import Refusal
from pipelines.engine.fingerprint import SHORT
from pipelines.engine.store import manifest as manifests
from pipelines.engine.store.lease import read_manifest
from pipelines.engine.store.listed import listed
from pipelines.engine.store.records import FileRecords
from pipelines.engine.store.sealed import opened

OURS = {"identity", "content_digest", "files", "inputs"}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """An artifact of weights: its folder and its manifest, which lists its inputs."""

    artifact: Path
    manifest: dict[str, Any]

    @property
    def model(self) -> Path:
        """The folder with config.json."""
        return listed(self.artifact, self.manifest) / "model"

    @property
    def checksums(self) -> dict[str, str]:
        """{name below `model`: sha256} as published."""
        files = self.manifest["files"].items()
        return {name.removeprefix("model/"): entry["sha256"] for name, entry in files if name.startswith("model/")}

    def tokenizer(self, setting: str) -> Path:
        """Folder of the tokenizer that the weights were trained with. Raises Refusal, about the setting that names this
        artifact, if it is missing or the manifest has none."""
        source = self.manifest["inputs"].get("tokenizer")
        if source is None:
            raise Refusal(
                setting,
                self.artifact,
                f"it is what step {self.manifest['step']} took from elsewhere, without a tokenizer",
                "give the folder that the weights came from, or the export of what was trained from them",
            )
        folder = self.artifact.parent.parent / str(source.get("step")) / str(source.get("digest"))[:SHORT]
        manifest = _manifest(folder) or {}
        if any(manifest.get(name) != source.get(name) for name in ("digest", "content_digest")):
            raise Refusal(
                setting,
                self.artifact,
                f"its tokenizer is {folder}, which is {'another one now' if manifest else 'not there'}; with another one "
                "its embeddings would stand for other pieces",
                "make or copy it there again, or give the export of this model, which has the tokenizer in it",
            )
        return listed(folder, manifest)


def origin(folder: Path) -> Origin | None:
    """The artifact that ``folder`` or its model/ belongs to; None if it is not one of ours. Raises Refusal for a damaged
    manifest."""
    for artifact in (folder, *([folder.parent] if folder.name == "model" else [])):
        data = read_file(artifact / manifests.NAME)
        if data is not None and (re.fullmatch(r"[0-9a-f]{16}", artifact.name) or _is_ours(data)):
            return Origin(artifact=artifact, manifest=_read(data, artifact))
    return None


def _manifest(artifact: Path) -> dict[str, Any] | None:
    data = read_file(artifact / manifests.NAME)
    return _read(data, artifact) if data is not None else None


def _read(data: bytes, artifact: Path) -> dict[str, Any]:
    """An artifact's manifest, read as the store in whose folders it lies reads it; a copy of it has no store around it."""
    return read_manifest(data, str(artifact), FileRecords(artifact.absolute().parent.parent / ".leases"))


def _is_ours(data: bytes) -> bool:
    """Whether a manifest.json is one of ours, or of the many other programs that have such a file."""
    try:
        return opened(data)[0].keys() >= OURS
    except ValueError:
        return False
