"""What fine-tuning on conversations can be configured to do, and what is refused before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from conf.refusal import Refusal
from conf.refusal import field as key
from data.rows.instructions import InstructionSettings, count_train_conversations
from model.adapt import LoraConfig
from pipelines.stages.instructions import ConversationRows
from pipelines.stages.train import smaller_batch
from pipelines.training.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Supervised fine-tuning on conversations, loss on the assistant's tokens only."""

    init_from: str | None = field(default=None, metadata={"execution": True, "path": True})
    """A Hugging Face folder of weights to tune instead of a pretrained model; its content enters digests."""
    data: InstructionSettings = field(default_factory=InstructionSettings)
    """The conversations."""
    too_long: Literal["truncate", "drop"] = "drop"
    """A conversation longer than a row: cut at its end, or left out; counted either way."""
    epochs: float = 1.0
    """Times through the conversations, unless `train.total_tokens` ends it earlier."""
    train: TrainSettings
    """The training run."""
    lora: LoraConfig | None = None
    """null trains every weight."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that stay as they are, such as `frontend.*`; not together with `lora`, which freezes all."""

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise Refusal(
                "epochs", self.epochs, "go through the conversations at least in part", f"set {key('epochs')}=1"
            )
        if self.lora is not None and self.freeze:
            raise Refusal("freeze", list(self.freeze), "lora freezes every weight already", "drop one of the two")

    def rows(self, seq_len: int) -> ConversationRows:
        """What the instructions step is told."""
        return ConversationRows(data=self.data, too_long=self.too_long, seq_len=seq_len)


def check_conversations(settings: FinetuneSettings, seq_len: int, ranks: int) -> None:
    """Raise Refusal if the conversations cannot fill a batch, as far as is known before there is a tokenizer (a row holds
    at least one; `train.check_rows` knows the rest once they are in rows), or for files without conversations."""
    data, batch = settings.data, settings.train.global_batch_tokens
    rows = batch // seq_len
    most = data.max_conversations or rows
    there = count_train_conversations(data, rows) if data.kind == "files" else min(rows, most)
    if there < rows:
        more = "raise finetune.data.max_conversations" if there == most else "give more conversations"
        raise Refusal(
            "finetune.train.global_batch_tokens",
            batch,
            f"the {there:,} conversations to train on fill at most as many rows of {seq_len} tokens, and a batch may not be "
            "larger than all of them",
            smaller_batch("finetune", settings.train, there, seq_len, ranks, more),
        )
