"""Artifacts by step name in the groups that the graph puts them in."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.engine.step import Artifact, Inputs

SCORED_AS = {"pretrain": "base", "start": "base", "finetune": "finetuned"}


def scored(run: Mapping[str, Artifact]) -> Inputs:
    """As the evaluate and denoise stages receive them: models by the names they are scored under."""
    groups: dict[str, dict[str, Artifact]] = {}
    for name, artifact in run.items():
        if name in SCORED_AS:
            groups.setdefault("model", {})[SCORED_AS[name]] = artifact
        elif name.startswith("shards"):
            groups.setdefault("rows", {})[name.removeprefix("shards-")] = artifact
        else:
            group = "conversations" if name == "instructions" else name.split("-")[0]
            groups.setdefault(group, {})[name] = artifact
    return Inputs(groups)


def by_kind(run: Mapping[str, Artifact]) -> Inputs:
    """As export and report receive them: everything by the step's name."""
    kinds = {"pretrain": "model", "finetune": "model", "shards": "rows", "instructions": "conversations"}
    kinds |= {"evaluate": "evaluation"}
    groups: dict[str, dict[str, Artifact]] = {}
    for name, artifact in run.items():
        groups.setdefault(kinds.get(name, name.split("-")[0]), {})[name] = artifact
    return Inputs(groups)
