"""From a step of training back to files, documents, character spans and text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from conf.refusal import NO_VALUE, Refusal
from data.order import Order
from data.rows.packing import DOCUMENT, LENGTH, OFFSET, START
from data.rows.shard_set import ShardSet

if TYPE_CHECKING:
    from data.tokenizers.sentencepiece import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TracedPiece:
    """Columns start … stop - 1 of a row, which are tokens first_token … of a document.

    `characters` is the half-open span of the document's text, None where the text is not at hand; `text` is that span,
    or else the decoded tokens. `position` finds the document in `file` (see `Document.position`).
    """

    start: int
    stop: int
    document: str
    file: str
    position: int
    first_token: int
    characters: tuple[int, int] | None
    text: str


@dataclass(frozen=True, kw_only=True)
class TracedRow:
    """One global row: which source, in which epoch, in which block of which shard, and the documents in it."""

    global_row: int
    source: str
    epoch: int
    shard: str
    block: int
    row: int
    pieces: list[TracedPiece]


def trace_step(
    shard_sets: Mapping[str, ShardSet],
    order: Order,
    *,
    step: int,
    rows_per_step: int,
    tokenizer: Tokenizer,
    corpora: Mapping[str, Path],
    column: int | None = None,
) -> Iterator[TracedRow]:
    """Yield the rows of one step, counted from 1 as in metrics.jsonl, in their order.

    `corpora` gives the document folder of each source; sources without one are shown by their decoded tokens. With
    `column`, each row shows the one token there. Raises Refusal where the corpus is not the one of the shards.
    """
    if step < 1:
        raise Refusal("step", step, "steps count from 1")
    first = (step - 1) * rows_per_step
    located = order.locate(np.arange(first, first + rows_per_step))
    reader = _Reader(tokenizer)
    for i, name in enumerate(order.names[s] for s in located.source.tolist()):
        shards, row = shard_sets[name], int(located.row[i])
        shard, block, in_block = shards.where(row)
        yield TracedRow(
            global_row=first + i,
            source=name,
            epoch=int(located.epoch[i]),
            shard=shards.manifest["shards"][shard]["name"],
            block=block,
            row=in_block,
            pieces=reader.pieces(shards, row, corpora.get(name), column),
        )


class _Reader:
    """Looks documents up, keeping what neighbouring rows are likely to ask for again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.table = lru_cache(maxsize=16)(lambda shards, shard: shards.documents(shard))
        self.row_group = lru_cache(maxsize=8)(_row_group)
        self.characters = lru_cache(maxsize=256)(tokenizer.characters)

    def pieces(self, shards: ShardSet, row: int, corpus: Path | None, column: int | None) -> list[TracedPiece]:
        """Where every piece of a row (or what covers one column of it) comes from."""
        packed = shards.gather([row])
        table = self.table(shards, shards.where(row)[0])
        traced = []
        for piece in packed.pieces_P4.tolist():
            start, stop, first_token = piece[START], piece[START] + piece[LENGTH], piece[OFFSET]
            if column is not None:
                if not start <= column < stop:
                    continue
                start, stop, first_token = column, column + 1, first_token + column - start
            record = table.slice(piece[DOCUMENT], 1).to_pylist()[0]
            ids = packed.tokens_RW[0, start:stop].tolist()
            characters, text = None, self.tokenizer.decode(ids)
            if corpus is not None and record["corpus_file"]:
                document = self._document(corpus, record)
                # Token 0 of a packed document is <s>, and its last one </s>: neither has characters.
                characters = _span(self.characters(document), first_token - 1, first_token - 1 + stop - start)
                text = document[slice(*characters)]
            traced.append(
                TracedPiece(
                    start=start,
                    stop=stop,
                    document=record["id"],
                    file=record["source"],
                    position=record["position"],
                    first_token=first_token,
                    characters=characters,
                    text=text,
                )
            )
        return traced

    def _document(self, corpus: Path, record: dict[str, Any]) -> str:
        path, row = corpus / record["corpus_file"], record["corpus_row"]
        table, first = self.row_group(path, row)
        found = table.slice(row - first, 1).to_pylist()[0]
        if found["id"] != record["id"]:
            rule = f"has document {found['id']} where the shards were made of {record['id']}"
            raise Refusal(path, NO_VALUE, rule, "trace with the corpus the shards were made of")
        return str(found["text"])


def _span(characters_N2: npt.NDArray[np.int64], first: int, stop: int) -> tuple[int, int]:
    """Characters of text tokens first … stop - 1, of which those that are no text tokens have none."""
    tokens = len(characters_N2)
    end_of_text = int(characters_N2[-1, 1]) if tokens else 0
    begin = int(characters_N2[max(first, 0), 0]) if first < tokens else end_of_text
    return begin, int(characters_N2[min(stop, tokens) - 1, 1]) if min(stop, tokens) > max(first, 0) else begin


def _row_group(path: Path, row: int) -> tuple[pa.Table, int]:
    """Ids and texts of the row group that holds record `row` of a corpus file, and the number of its first record."""
    with pq.ParquetFile(path) as parquet:
        first = 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if row < first + rows:
                return parquet.read_row_group(group, columns=["id", "text"]), first
            first += rows
    rule = f"has {first} documents and the shards name its document {row}"
    raise Refusal(path, NO_VALUE, rule, "trace with the corpus the shards were made of")
