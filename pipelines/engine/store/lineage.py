"""Find the tokenizer of weights that one of our steps made, through their manifest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.files import read_file
from pipelines.engine.errors import EngineError
from pipelines.engine.fingerprint import SHORT
from pipelines.engine.store import manifest as manifests
from pipelines.engine.store.listed import listed
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

    def tokenizer(self, what: str) -> Path:
        """Folder of the tokenizer that the weights were trained with. Raises EngineError, beginning with ``what``, if it is
        missing or the manifest has none."""
        source = self.manifest["inputs"].get("tokenizer")
        if source is None:
            raise EngineError(
                f"{what}: it is what step {self.manifest['step']} took from elsewhere, without a tokenizer. Give the folder "
                "that the weights came from, or the export of what was trained from them."
            )
        folder = self.artifact.parents[1] / str(source.get("step")) / str(source.get("digest"))[:SHORT]
        data = read_file(folder / manifests.NAME)
        found = manifests.read(data, str(folder)) if data is not None else {}
        if any(found.get(name) != source.get(name) for name in ("digest", "content_digest")):
            raise EngineError(
                f"{what}: its tokenizer is {folder}, which is {'another one now' if found else 'not there'}; with another "
                "one its embeddings would stand for other pieces. Make or copy it there again, or give the export "
                "of this model, which has the tokenizer in it."
            )
        return listed(folder, found)


def origin(folder: Path) -> Origin | None:
    """The artifact that ``folder`` or its model/ belongs to; None if it is not one of ours. Raises EngineError for a damaged
    manifest."""
    for artifact in (folder, *([folder.parent] if folder.name == "model" else [])):
        data = read_file(artifact / manifests.NAME)
        if data is not None and (re.fullmatch(r"[0-9a-f]{16}", artifact.name) or _is_ours(data)):
            return Origin(artifact=artifact, manifest=manifests.read(data, str(artifact)))
    return None


def _is_ours(data: bytes) -> bool:
    """Whether a manifest.json is one of ours, or of the many other programs that have such a file."""
    try:
        return opened(data)[0].keys() >= OURS
    except ValueError:
        return False
