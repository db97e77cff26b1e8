"""Instructions: conversations to fine-tune on, made from the corpus or read from the user's files, packed into rows.

The chat template of the tokenizer artifact turns messages into ids, the same one that generation and the export use; only
the assistant's tokens are targets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conf.refusal import NO_VALUE, Refusal
from data.rows.instructions import Conversation, InstructionSettings
from data.text.readers import ReaderSettings
from pipelines.engine.step import Artifact, Context, Inputs

if TYPE_CHECKING:
    from data.rows.packing import TokenDocument
    from data.tokenizers.sentencepiece import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ConversationRows:
    """Which conversations, and how they lie in rows."""

    data: InstructionSettings = field(default_factory=InstructionSettings)
    seq_len: int
    too_long: Literal["truncate", "drop"] = "drop"
    """What happens to a conversation longer than a row: cut at the end, or left out; counted either way."""


def run(settings: ConversationRows, inputs: Inputs, out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Inputs: tokenizer and every corpus. Writes train.jsonl, heldout.jsonl and rows/ (shards with a target mask)."""
    corpora = [corpus for _, corpus in sorted(inputs["corpus"].items())]
    metrics: dict[str, Any] = ctx.call(make, settings, corpora, inputs.one("tokenizer"), out_dir)
    if cut := metrics["counts"].get("conversation_truncated"):
        ctx.log(f"{cut:,} conversations cut to a row of {settings.seq_len} tokens (finetune.too_long=truncate)")
    return metrics


def make(settings: ConversationRows, corpora: list[Artifact], tokenizer: Artifact, out_dir: Path) -> dict[str, Any]:
    """Write everything, in one worker process."""
    from data.rows.instructions import build_instructions, load_conversations
    from data.rows.shard_tasks import make_conversation_shard
    from data.rows.shards import ShardSettings, write_manifest
    from data.text.left_out import conversations_left_out
    from data.text.readers import ReadLog
    from data.tokenizers.sentencepiece import Tokenizer

    counts = build_instructions(settings.data, [corpus.path for corpus in corpora], out_dir)
    loaded = Tokenizer.load(tokenizer.path)
    documents, refused = encode(loaded, load_conversations(out_dir / "train.jsonl"), settings.data.reader)
    rows = ShardSettings(seq_len=settings.seq_len)
    shard = make_conversation_shard(
        documents, out_dir / "rows", name="conversations", tokenizer=loaded, settings=rows, too_long=settings.too_long
    )
    if not shard["rows"]:
        raise no_row(documents, settings)
    totals = write_manifest(out_dir / "rows", [shard], settings=rows, vocab_size=loaded.vocab_size, masked=True)
    counts |= (
        {"conversations_refused": len(refused), "refused": refused[: ReadLog.MAX_MALFORMED_SHOWN]} if refused else {}
    )
    return {
        "pairs": len(documents),
        **counts,
        **totals,
        "left_out": conversations_left_out({**counts, **totals["counts"]}),
    }


def no_row(documents: Sequence[TokenDocument], settings: ConversationRows) -> Refusal:
    """What to say of conversations none of which has an answer within a row."""
    width, drops = settings.seq_len + 1, settings.too_long == "drop"
    shortest = min(len(document.tokens) for document in documents)
    each = "is longer than that and left out" if drops else "is cut before its answer begins"
    cut_would_do = drops and any(d.is_target is None or any(d.is_target[1:width]) for d in documents)
    return Refusal(
        "finetune.too_long",
        settings.too_long,
        f"fine-tuning needs a row with an answer, and each of the {len(documents):,} conversations {each} (a row has "
        f"{settings.seq_len} tokens, the shortest conversation {shortest:,})",
        ("set finetune.too_long=truncate, or " if cut_would_do else "")
        + f"give shorter conversations, or longer rows: shards.seq_len={shortest}",
    )


def encode(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], reader: ReaderSettings
) -> tuple[list[TokenDocument], list[str]]:
    """Tokens of each conversation, and file, line and reason of each one the chat template refuses.

    Those are skipped like malformed lines. Raises Refusal past that limit, and if no conversation is left.
    """
    from data.rows.packing import TokenDocument
    from data.tokenizers.chat import encode_chat

    documents: list[TokenDocument] = []
    refused: list[str] = []
    in_file: Counter[str] = Counter()
    limit = reader.max_malformed_lines_per_file
    for c in conversations:
        try:
            tokens, is_target = encode_chat(tokenizer, c.messages)
        except Refusal as refusal:
            refused.append(f"{c.source} line {c.position}: {refusal}")
            in_file[c.source] += 1
            if in_file[c.source] > limit:
                raise Refusal(
                    c.source,
                    NO_VALUE,
                    f"{in_file[c.source]} of its conversations are refused by the chat template, and {limit} a file are "
                    f"passed over; the first: {refused[0]}",
                    "repair the template, or raise finetune.data.reader.max_malformed_lines_per_file",
                ) from refusal
            continue
        document = TokenDocument(id=c.id, source=c.source, position=c.position, tokens=tokens, is_target=is_target)
        documents.append(document)
    if not documents:
        rule = f"no conversation is left to train on, as the chat template refuses all; the first: {refused[0]}"
        raise Refusal("finetune.data", NO_VALUE, rule, "repair the template, or give other conversations")
    return documents, refused
