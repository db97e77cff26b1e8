"""Instructions: conversations to fine-tune on, made from the corpus or read from the user's files, packed into rows.

The chat template of the tokenizer artifact turns messages into ids, the same one that generation and the export use; only
the assistant's tokens are targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.instructions import InstructionSettings
from pipelines.engine.step import Artifact, Context


@dataclass(frozen=True, kw_only=True)
class ConversationRows:
    """Which conversations, and how they lie in rows."""

    data: InstructionSettings = field(default_factory=InstructionSettings)
    seq_len: int
    too_long: Literal["truncate", "drop"] = "drop"
    """What happens to a conversation longer than a row: cut at the end, or left out; counted either way."""


def run(settings: ConversationRows, inputs: Mapping[str, Artifact], out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Inputs: tokenizer and every corpus. Writes train.jsonl, heldout.jsonl and rows/ (shards with a target mask)."""
    corpora = [inputs[name] for name in sorted(inputs) if name.startswith("corpus")]
    metrics: dict[str, Any] = ctx.call(make, settings, corpora, inputs["tokenizer"], out_dir)
    if cut := metrics["counts"].get("conversation_truncated"):
        ctx.say(f"{cut:,} conversations cut to a row of {settings.seq_len} tokens (finetune.too_long=truncate)")
    return metrics


def make(settings: ConversationRows, corpora: list[Artifact], tokenizer: Artifact, out_dir: Path) -> dict[str, Any]:
    """Write everything, in one worker process."""
    from data.chat import encode_chat
    from data.instructions import build_instructions, load_conversations
    from data.left_out import conversations_left_out
    from data.packing import TokenDocument
    from data.shard_tasks import make_conversation_shard
    from data.shards import ShardSettings, write_manifest
    from data.tokenizer import Tokenizer

    counts = build_instructions(settings.data, [corpus.path for corpus in corpora], out_dir)
    words = Tokenizer.load(tokenizer.path)
    documents = []
    for conversation in load_conversations(out_dir / "train.jsonl"):
        tokens, is_target = encode_chat(words, conversation.messages)
        documents.append(
            TokenDocument(
                id=conversation.id,
                source=conversation.source,
                position=conversation.position,
                tokens=tokens,
                is_target=is_target,
            )
        )
    rows = ShardSettings(seq_len=settings.seq_len)
    shard = make_conversation_shard(
        documents, out_dir / "rows", name="conversations", tokenizer=words, settings=rows, too_long=settings.too_long
    )
    totals = write_manifest(out_dir / "rows", [shard], settings=rows, vocab_size=words.vocab_size, masked=True)
    return {
        "pairs": counts["train_conversations"],
        **counts,
        **totals,
        "left_out": conversations_left_out({**counts, **totals["counts"]}),
    }
