"""Finetune: a pretrained model and conversations → an assistant, by the same loop as pretraining.

All weights, or LoRA adapters on the weights that `lora.targets` names; either way model/ holds one ordinary model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from conf.typed import to_plain
from data.order import OrderSettings
from data.rows.instructions import InstructionSettings, count_train_conversations
from model.adapt import LoraConfig
from pipelines.engine.step import Artifact, Context, EngineError, Inputs
from pipelines.stages.instructions import ConversationRows
from pipelines.stages.launch import ComputeSettings, train
from pipelines.training.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Supervised fine-tuning on conversations, loss on the assistant's tokens only."""

    init_from: str | None = field(default=None, metadata={"execution": True, "path": True})
    """A Hugging Face folder of weights to tune instead of a pretrained model; its content enters digests."""
    data: InstructionSettings = field(default_factory=InstructionSettings)
    too_long: Literal["truncate", "drop"] = "drop"
    epochs: float = 1.0
    """Times through the conversations, unless `train.total_tokens` ends it earlier."""
    train: TrainSettings
    lora: LoraConfig | None = None
    """null trains every weight."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that stay as they are, such as `frontend.*`; not together with `lora`, which freezes all."""

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise ValueError(f"finetune.epochs = {self.epochs}: go through the conversations at least in part, e.g. 1.")
        if self.lora is not None and self.freeze:
            raise ValueError(
                f"finetune.freeze = {self.freeze}: lora freezes every weight already; drop one of the two."
            )

    def rows(self, seq_len: int) -> ConversationRows:
        """What the instructions step is told."""
        return ConversationRows(data=self.data, too_long=self.too_long, seq_len=seq_len)


@dataclass(frozen=True, kw_only=True)
class FinetuneRun:
    """What the finetune step is told; which conversations came in is said by its input."""

    train: TrainSettings
    epochs: float
    lora: LoraConfig | None
    freeze: tuple[str, ...]
    order: OrderSettings
    compute: ComputeSettings = field(metadata={"execution": True})


def run(settings: FinetuneRun, inputs: Inputs, out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Inputs: begin (the model that is tuned), rows of conversations, tokenizer. Writes model/ (adapters merged), adapter/
    with LoRA, metrics.jsonl."""
    rows = inputs.one("rows")
    job = {
        "label": "finetune",
        "train": to_plain(shortened(settings, rows)),
        "model": None,
        "init": str(inputs.one("begin").path / "model"),
        "lora": to_plain(settings.lora) if settings.lora else None,
        "freeze": list(settings.freeze),
        "order": to_plain(settings.order),
        "shards": {"conversations": str(rows.path / "rows")},
        "digests": {key: artifact.digest for key, artifact in inputs.by_key.items()},
        "inputs": {key: artifact.url for key, artifact in inputs.by_key.items()},
        "out_dir": str(out_dir),
    }
    tokens = job["train"]["total_tokens"]
    if tokens < settings.train.total_tokens:
        ctx.say(f"{tokens:,} tokens, which is finetune.epochs = {settings.epochs:g}")
    return train(job, settings.compute, out_dir, ctx)


def check_conversations(settings: FinetuneSettings, seq_len: int) -> None:
    """Raise EngineError if the conversations cannot fill a batch, as far as is known before there is a tokenizer (a row
    holds at least one), or DataError for files without conversations."""
    data, batch = settings.data, settings.train.global_batch_tokens
    rows = batch // seq_len
    most = data.max_conversations or rows
    there = count_train_conversations(data, rows) if data.kind == "files" else min(rows, most)
    if there < rows:
        more = "raise finetune.data.max_conversations" if there == most else "give more conversations"
        raise EngineError(
            f"finetune.train.global_batch_tokens = {batch:,}: the {there:,} conversations to train on fill at most as many "
            f"rows of {seq_len} tokens, and a batch may not be larger than all of them. Use "
            f"finetune.train.global_batch_tokens={there * seq_len} or less, or {more}."
        )


def shortened(settings: FinetuneRun, rows: Artifact) -> TrainSettings:
    """The train settings with `total_tokens` cut to the epochs asked for, in whole batches.

    Raises EngineError where the conversations do not fill one batch.
    """
    metrics, batch = rows.metrics, settings.train.global_batch_tokens
    seq_len = (metrics["tokens"] + metrics["padding"]) // metrics["rows"]
    if metrics["rows"] * seq_len < batch:
        raise EngineError(
            f"finetune.train.global_batch_tokens = {batch:,}: the conversations fill only {metrics['rows']} rows of "
            f"{seq_len} tokens, and a batch may not be larger than all of them. Use at most "
            f"{metrics['rows'] * seq_len:,}, or give more conversations."
        )
    return replace(settings.train, total_tokens=tuning_tokens(settings, metrics["rows"] * seq_len))


def tuning_tokens(settings: FinetuneRun, there: float) -> int:
    """Tokens of the configured epochs, in whole batches; `there`: those of all rows of conversations."""
    batch = settings.train.global_batch_tokens
    return max(batch, min(settings.train.total_tokens, int(there * settings.epochs) // batch * batch))
