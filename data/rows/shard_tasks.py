"""From a corpus of Parquet documents to shards: which documents make which shard, and making one.

The division looks at the corpus files' metadata only, never at workers, and tasks share nothing, so they may run
anywhere in any order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.rows.packing import TokenDocument, TooLong, pack_conversations, pack_stream, token_dtype
from data.rows.shards import ShardSettings, write_shard

if TYPE_CHECKING:
    from data.tokenizers.sentencepiece import Tokenizer

CHANGED = "documents_changed_by_tokenizer"
"""The count of documents that do not come back from their tokens as they were."""
TEXTS_AT_ONCE = 512  # tokenized together; bounds the memory for token lists


@dataclass(frozen=True, kw_only=True)
class CorpusSlice:
    """Records first_row … last_row - 1 of one row group of one corpus file; `group_row` is the group's first record."""

    file: str
    group: int
    group_row: int
    first_row: int
    last_row: int


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to make: its name and its documents."""

    name: str
    slices: tuple[CorpusSlice, ...]


def plan_shards(corpus_dir: Path, settings: ShardSettings, *, prefix: str = "train") -> list[ShardTask]:
    """Divide a corpus folder into shards of about `shard_text_bytes` of text each, in the order of its files.

    Row groups are joined where small and cut into equal numbers of documents where large. Raises Refusal where the
    folder holds no corpus files.
    """
    groups: list[list[CorpusSlice]] = [[]]
    room = settings.shard_text_bytes
    for piece, text_bytes in _slices(corpus_dir, settings.shard_text_bytes):
        if groups[-1] and text_bytes > room:
            groups.append([])
            room = settings.shard_text_bytes
        groups[-1].append(piece)
        room -= text_bytes
    return [ShardTask(name=f"{prefix}-{i:05d}", slices=tuple(slices)) for i, slices in enumerate(groups) if slices]


def make_shard(
    task: ShardTask, out_dir: Path, *, corpus_dir: Path, tokenizer: Tokenizer, settings: ShardSettings
) -> dict[str, Any]:
    """Tokenize, pack and write one shard of a corpus; returns its record for `write_manifest`."""
    counts: Counter[str] = Counter()
    documents = list(_tokenized(task, corpus_dir, tokenizer, counts))
    rows = pack_stream(
        documents,
        seq_len=settings.seq_len,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        dtype=token_dtype(tokenizer.vocab_size),
    )
    return write_shard(
        rows,
        documents,
        out_dir,
        name=task.name,
        rows_per_block=settings.rows_per_block,
        vocab_size=tokenizer.vocab_size,
        counts=counts,
    )


def make_conversation_shard(
    conversations: Sequence[TokenDocument],
    out_dir: Path,
    *,
    name: str,
    tokenizer: Tokenizer,
    settings: ShardSettings,
    too_long: TooLong = "truncate",
) -> dict[str, Any]:
    """Pack and write one shard of fine-tuning conversations; its record counts what was cut or left out, and why."""
    counts: Counter[str] = Counter()
    rows = pack_conversations(
        conversations,
        seq_len=settings.seq_len,
        pad_id=tokenizer.pad_id,
        dtype=token_dtype(tokenizer.vocab_size),
        too_long=too_long,
        counts=counts,
    )
    return write_shard(
        rows,
        conversations,
        out_dir,
        name=name,
        rows_per_block=settings.rows_per_block,
        vocab_size=tokenizer.vocab_size,
        counts=counts,
    )


def _tokenized(
    task: ShardTask, corpus_dir: Path, tokenizer: Tokenizer, counts: Counter[str]
) -> Iterator[TokenDocument]:
    dtype = token_dtype(tokenizer.vocab_size)
    for part in task.slices:
        records = _read(corpus_dir, part)
        for start in range(0, len(records), TEXTS_AT_ONCE):
            chunk = records[start : start + TEXTS_AT_ONCE]
            encoded = tokenizer.encode_batch([record["text"] for record in chunk])
            if not tokenizer.keeps_text:
                changed = sum(
                    tokenizer.decode(ids) != record["text"] for record, ids in zip(chunk, encoded, strict=True)
                )
                counts.update({CHANGED: changed} if changed else {})
            for i, (record, ids) in enumerate(zip(chunk, encoded, strict=True), start=start):
                yield TokenDocument(
                    id=record["id"],
                    source=record["source"],
                    position=record["position"],
                    tokens=np.array(ids, dtype=dtype),
                    corpus_file=part.file,
                    corpus_row=part.group_row + part.first_row + i,
                )


def _read(corpus_dir: Path, part: CorpusSlice) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(corpus_dir / part.file) as parquet:
        table = parquet.read_row_group(part.group, columns=["id", "text", "source", "position"])
    records: list[dict[str, Any]] = table.slice(part.first_row, part.last_row - part.first_row).to_pylist()
    return records


def _slices(corpus_dir: Path, most_bytes: int) -> Iterator[tuple[CorpusSlice, int]]:
    """Row groups, cut where larger than `most_bytes` of text, with the bytes of text in each by the file's metadata."""
    import pyarrow.parquet as pq

    from data.text.document import document_files

    for path in document_files(corpus_dir):
        with pq.ParquetFile(path) as parquet:
            metadata = parquet.metadata
            text_column = parquet.schema_arrow.names.index("text")
        group_row = 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            text_bytes = metadata.row_group(group).column(text_column).total_uncompressed_size
            parts = min(-(-text_bytes // most_bytes), rows)
            for i in range(parts):
                first, last = rows * i // parts, rows * (i + 1) // parts
                piece = CorpusSlice(file=path.name, group=group, group_row=group_row, first_row=first, last_row=last)
                yield piece, text_bytes // parts
            group_row += rows
