"""Pretrain: packed rows → a trained model, by the loop in `training/loop.py` in several processes at once.

The stage says what to train on and where to write. `training` knows neither the engine nor where rows come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.typed import to_plain
from data.mixture import MixtureSettings
from data.order import OrderSettings
from data.tasks.settings import NextTokenSettings, ObjectiveChoice
from data.tokenizers.sentencepiece import Tokenizer
from model.config import ModelConfig
from pipelines.engine.step import Artifact, Context
from pipelines.stages.launch import ComputeSettings, train
from pipelines.training.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """A pretraining run: which model, on which rows in which order, how."""

    model: ModelConfig
    train: TrainSettings
    order: OrderSettings = field(default_factory=OrderSettings)
    mixture: MixtureSettings = field(default_factory=MixtureSettings)
    objective: ObjectiveChoice = field(default_factory=NextTokenSettings, metadata={"absent_at_default": True})
    compute: ComputeSettings = field(default_factory=ComputeSettings, metadata={"execution": True})


def run(settings: PretrainSettings, inputs: Mapping[str, Artifact], out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Inputs: tokenizer, shards (or shards-NAME for each source), perhaps start, whose weights it begins with. Writes
    model/, metrics.jsonl, the last checkpoint."""
    return train(job(settings, inputs, out_dir), settings.compute, out_dir, ctx)


def job(settings: PretrainSettings, inputs: Mapping[str, Artifact], out_dir: Path) -> dict[str, Any]:
    """What every rank is told: plain data, so that it can be written down and run without the engine."""
    asks = None
    if not isinstance(settings.objective, NextTokenSettings):
        asks = settings.objective.over(Tokenizer.load(inputs["tokenizer"].path), settings.order.seed)
    shards = {source_of(name): str(a.path) for name, a in inputs.items() if name.startswith("shards")}
    return {
        "label": "pretrain",
        "train": to_plain(settings.train),
        "model": to_plain(settings.model),
        "init": str(inputs["start"].path / "model") if "start" in inputs else None,
        "objective": to_plain(asks),
        "order": to_plain(settings.order),
        "mixture": to_plain(settings.mixture),
        "shards": shards,
        "digests": {name: artifact.digest for name, artifact in inputs.items()},
        "inputs": {name: artifact.url for name, artifact in inputs.items()},
        "out_dir": str(out_dir),
    }


def source_of(step: str) -> str:
    """The source whose rows a shards step makes, as `mixture` names it: `shards-books` → books, `shards` → corpus."""
    return step.removeprefix("shards-") if step != "shards" else "corpus"
