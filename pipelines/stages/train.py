"""Train: rows → a model, by the loop in `training/loop.py` in several processes at once, whichever training it is.

The stage says what to train on and where to write; `training` knows neither the engine nor where rows come from. Either
way model/ holds one ordinary model, with adapters merged into it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conf.refusal import Refusal
from conf.typed import to_plain
from data.mixture import MixtureSettings
from data.order import OrderSettings
from data.tasks.settings import NextTokenSettings, ObjectiveChoice
from data.tokenizers.sentencepiece import Tokenizer
from model.adapt import LoraConfig
from model.config import ModelConfig
from pipelines.engine.step import Artifact, Context, Inputs
from pipelines.stages.launch import ComputeSettings, train_in_ranks
from pipelines.training.settings import TrainSettings, largest_batch


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a training has that goes through all its rows so many times, beginning with a trained model."""

    epochs: float
    """Times through the rows, unless `train.total_tokens` ends it earlier."""
    lora: LoraConfig | None = None
    """Adapters to train instead of the weights; null: every weight is trained."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that stay as they are, such as `frontend.*`."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """One training: which model, on which rows in which order, how."""

    label: str = field(metadata={"execution": True})
    """Name of the step."""
    model: ModelConfig | None = field(default=None, metadata={"absent_at_default": True})
    """Null: the model it begins with."""
    train: TrainSettings
    """Batches, optimizer, schedule and the rest."""
    order: OrderSettings = field(default_factory=OrderSettings)
    """In which order rows come."""
    mixture: MixtureSettings | None = field(default=None, metadata={"absent_at_default": True})
    """How much of each source; null where there is one."""
    objective: ObjectiveChoice = field(default_factory=NextTokenSettings, metadata={"absent_at_default": True})
    """What a row asks of the model."""
    tuning: Tuning | None = field(default=None, metadata={"absent_at_default": True, "flat": True})
    """Null: every weight is trained, for `train.total_tokens`."""
    compute: ComputeSettings = field(default_factory=ComputeSettings, metadata={"execution": True})
    """Where it runs."""


def run(settings: TrainingSettings, inputs: Inputs, out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Inputs: tokenizer, rows of each source or conversations, perhaps begin: the model whose weights it begins with. Writes
    model/, adapter/ with LoRA, metrics.jsonl, the last checkpoint."""
    if settings.tuning is not None:
        check_rows(settings, inputs)
        shorter = shortened(settings.train, settings.tuning, inputs.one("conversations"))
        if shorter.total_tokens < settings.train.total_tokens:
            ctx.log(f"{shorter.total_tokens:,} tokens, which is {settings.label}.epochs = {settings.tuning.epochs:g}")
        settings = replace(settings, train=shorter)
    return train_in_ranks(job(settings, inputs, out_dir), settings.compute, out_dir, ctx)


def check_rows(settings: TrainingSettings, inputs: Inputs) -> None:
    """Raise Refusal where the conversations, once they lie in rows, do not fill one batch."""
    conversations = inputs.first("conversations")
    if settings.tuning is None or conversations is None:
        return
    train, (rows, seq_len) = settings.train, _shape(conversations)
    if rows * seq_len < train.global_batch_tokens:
        left_out = "; ".join(f"{times:,} {reason}" for reason, times in conversations.metrics["left_out"].items())
        raise Refusal(
            f"{settings.label}.train.global_batch_tokens",
            train.global_batch_tokens,
            f"the conversations fill only {rows:,} rows of {seq_len} tokens, and a batch may not be larger than all of "
            f"them{f' (left out: {left_out})' if left_out else ''}",
            smaller_batch(settings.label, train, rows, seq_len, settings.compute.ranks, "give more conversations"),
        )


def smaller_batch(step: str, train: TrainSettings, rows: int, seq_len: int, ranks: int, more: str) -> str:
    """Remedy for a batch larger than so many rows: the largest one that they fill, if there is one, or `more`."""
    fits = largest_batch(train, rows, seq_len=seq_len, world_size=ranks)
    return f"set {step}.train.global_batch_tokens={fits} or less, or {more}" if fits else more


def job(settings: TrainingSettings, inputs: Inputs, out_dir: Path) -> dict[str, Any]:
    """The plain form of the TrainJob that every rank is given, so that it can be written down and run without the engine."""
    task, begin = None, inputs.first("begin")
    if settings.objective.kind != "next_token":
        task = settings.objective.over(Tokenizer.load(inputs.one("tokenizer").path), settings.order.seed)
    tuning = settings.tuning
    shards = {source: artifact.path for source, artifact in inputs["rows"].items()}
    shards |= {source: artifact.path / "rows" for source, artifact in inputs["conversations"].items()}
    return {
        "label": settings.label,
        "train": to_plain(settings.train),
        "model": to_plain(settings.model),
        "init": str(begin.path / "model") if begin is not None else None,
        "objective": to_plain(task),
        "order": to_plain(settings.order),
        "mixture": to_plain(settings.mixture),
        "shards": {source: str(folder) for source, folder in shards.items()},
        "lora": to_plain(tuning.lora) if tuning is not None else None,
        "freeze": list(tuning.freeze) if tuning is not None else [],
        "digests": {key: artifact.digest for key, artifact in inputs.by_key.items()},
        "inputs": {key: artifact.url for key, artifact in inputs.by_key.items()},
        "out_dir": str(out_dir),
    }


def shortened(train: TrainSettings, tuning: Tuning, conversations: Artifact) -> TrainSettings:
    """The train settings with `total_tokens` cut to the configured epochs, in whole batches."""
    rows, seq_len = _shape(conversations)
    return replace(train, total_tokens=tuning_tokens(train, tuning.epochs, rows * seq_len))


def _shape(conversations: Artifact) -> tuple[int, int]:
    """Rows, and tokens of each."""
    metrics = conversations.metrics
    return metrics["rows"], (metrics["tokens"] + metrics["padding"]) // metrics["rows"]


def tuning_tokens(train: TrainSettings, epochs: float, tokens: float) -> int:
    """Tokens of so many epochs over rows of `tokens`, in whole batches and at most what is configured."""
    batch = train.global_batch_tokens
    return max(batch, min(train.total_tokens, int(tokens * epochs) // batch * batch))
