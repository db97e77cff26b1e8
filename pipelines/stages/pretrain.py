"""Pretrain: packed rows → a trained model, by the loop in `training/loop.py` in several processes at once.

The stage says what to train on and where to write. `training` knows neither the engine nor where rows come from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.typed import to_plain
from data.mixture import MixtureSettings
from data.order import OrderSettings
from data.tasks.settings import NextTokenSettings, ObjectiveChoice
from data.tokenizers.sentencepiece import Tokenizer
from model.config import ModelConfig
from pipelines.engine.step import Context, Inputs
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


def run(settings: PretrainSettings, inputs: Inputs, out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Inputs: tokenizer, rows of each source, perhaps begin: the weights it begins with. Writes model/, metrics.jsonl, the
    last checkpoint."""
    return train(job(settings, inputs, out_dir), settings.compute, out_dir, ctx)


def job(settings: PretrainSettings, inputs: Inputs, out_dir: Path) -> dict[str, Any]:
    """What every rank is told: plain data, so that it can be written down and run without the engine."""
    asks = None
    if not isinstance(settings.objective, NextTokenSettings):
        asks = settings.objective.over(Tokenizer.load(inputs.one("tokenizer").path), settings.order.seed)
    begin = inputs.first("begin")
    return {
        "label": "pretrain",
        "train": to_plain(settings.train),
        "model": to_plain(settings.model),
        "init": str(begin.path / "model") if begin is not None else None,
        "objective": to_plain(asks),
        "order": to_plain(settings.order),
        "mixture": to_plain(settings.mixture),
        "shards": {source: str(rows.path) for source, rows in inputs["rows"].items()},
        "digests": {key: artifact.digest for key, artifact in inputs.by_key.items()},
        "inputs": {key: artifact.url for key, artifact in inputs.by_key.items()},
        "out_dir": str(out_dir),
    }
