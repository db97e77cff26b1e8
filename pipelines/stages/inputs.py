"""Picking a stage's inputs by kind."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.engine.step import Artifact


def named(inputs: Mapping[str, Artifact], kind: str) -> dict[str, Artifact]:
    """The inputs of one kind: `corpus` alone, or one for each source of a mixture (`corpus-NAME`)."""
    return {name: artifact for name, artifact in sorted(inputs.items()) if name == kind or name.startswith(f"{kind}-")}
