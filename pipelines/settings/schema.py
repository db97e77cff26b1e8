"""What can be set: one experiment's settings, whole. Every field of `Schema` is a top-level key of the configuration.

Values and their rules alone; what follows from them stands in derive.py, and how they are read in compose.py. Fields marked
`{"execution": True}` say where or how fast and never what is made, and enter no digest.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from data.mixture import MixtureSettings
from data.order import OrderSettings
from data.rows.shards import ShardSettings
from data.tasks.settings import NextTokenSettings, ObjectiveChoice
from data.text.corpus import CorpusSettings
from data.tokenizers.training import TokenizerSettings
from model.config import ModelConfig
from pipelines.stages.evaluate import EvaluateSettings
from pipelines.stages.export import ExportSettings
from pipelines.stages.finetune import FinetuneSettings
from pipelines.stages.launch import ComputeSettings
from pipelines.stages.report import ReportSettings
from pipelines.training.settings import (
    AdamWSettings,
    MuonSettings,
    ScheduleSettings,
    TrackingSettings,
    TrainSettings,
    ZeroSettings,
)

SENTINELS = 100  # as many as T5 has
T = TypeVar("T")
_EXECUTION: Any = {"execution": True}


@dataclass(frozen=True, kw_only=True)
class PretrainGroup(TrainSettings):
    """What stands under `pretrain`: a training run, and what it begins with."""

    init_from: str | None = field(default=None, metadata={"execution": True, "path": True})
    """A Hugging Face folder of weights, or `tag:NAME`; null starts anew. Its content enters digests, not where it lies."""

    def run(self, **elsewhere: Any) -> TrainSettings:
        """The training run alone, with what other groups say of it."""
        own = {f.name: getattr(self, f.name) for f in fields(TrainSettings)}
        return TrainSettings(**{**own, **elsewhere})


@dataclass(frozen=True, kw_only=True)
class Schema:
    """One experiment, whole. Every field is one top-level key of the composed configuration."""

    experiment: str = field(metadata=_EXECUTION)
    """Name of the experiment, for people."""
    store: str = field(default="runs", metadata={"execution": True, "path": True})
    """Folder or s3:// prefix of the artifacts."""
    seed: int = 0
    """What `pretrain.seed` and `order.seed` are unless they are set themselves."""
    compute: ComputeSettings = field(default_factory=ComputeSettings, metadata=_EXECUTION)
    """Where the work runs."""
    corpus: CorpusSettings
    """The text, where there is one source."""
    sources: dict[str, CorpusSettings] = field(default_factory=dict)
    """Several named corpora instead of `corpus`; `mixture.phases` says how much of each, and when."""
    tokenizer: TokenizerSettings
    """The vocabulary and how it is learned."""
    shards: ShardSettings
    """How rows are cut."""
    mixture: MixtureSettings = field(default_factory=MixtureSettings)
    """How much of each source, and when."""
    order: OrderSettings = field(default_factory=OrderSettings)
    """The shuffle."""
    model: ModelConfig
    """The architecture."""
    objective: ObjectiveChoice = field(default_factory=NextTokenSettings)
    """What pretraining asks of a row; the tokenizer gets the pieces it hides with."""
    pretrain: PretrainGroup
    """The pretraining run."""
    optim: AdamWSettings | MuonSettings
    """The optimizer of pretraining."""
    schedule: ScheduleSettings
    """The learning rate's course in pretraining."""
    zero: ZeroSettings = field(metadata=_EXECUTION)
    """What training ranks share out."""
    finetune: FinetuneSettings | None
    """Fine-tuning on conversations; null: none."""
    evaluate: EvaluateSettings
    """What is scored, and how."""
    export: ExportSettings = field(default_factory=ExportSettings)
    """What is exported."""
    report: ReportSettings = field(default_factory=ReportSettings)
    """What stands above the report."""
    tracking: TrackingSettings = field(metadata=_EXECUTION)
    """Weights & Biases."""


_EVERYWHERE = {
    "zero": "zero=0|1|2|3",
    "tracking": "tracking.KEY",
    "device": "compute.device",
    "threads": "compute.cpus_per_rank",
}
"""Of a training run: what `Settings._everywhere` sets."""

SET_ELSEWHERE = {
    "pretrain.objective": "objective.KEY or objective=NAME",
    "pretrain.optim": "optim.KEY or optim=NAME",
    "pretrain.schedule": "schedule.KEY or schedule=NAME",
    "evaluate.tracking": _EVERYWHERE["tracking"],
    **{f"{train}.{key}": instead for train in ("pretrain", "finetune.train") for key, instead in _EVERYWHERE.items()},
}
"""Keys that a dataclass has and a person may not set there, and what to set instead."""
