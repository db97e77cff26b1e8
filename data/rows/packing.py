"""Documents' tokens in, rows of `seq_len + 1` tokens out.

Pretraining: `<s> document </s>` are laid end to end and cut with stride `seq_len`, so neighbouring rows share one token
and every token is predicted exactly once. Fine-tuning: whole conversations share rows, best fit first, padded.

Shape suffixes: R rows, W = seq_len + 1 columns, P pieces (a piece is the part of one document that lies in one row).
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

TooLong = Literal["truncate", "drop"]

# The columns of `pieces_P4`: index of the document, offset of the piece's first token in that document,
# first column of the piece in its row, number of columns.
DOCUMENT, OFFSET, START, LENGTH = range(4)


@dataclass(frozen=True, kw_only=True)
class TokenDocument:
    """One document as token ids, and where its text is to be found again.

    `tokens` are the text's ids without `<s>` and `</s>` when packed by `pack_stream`; complete conversations, control
    tokens included, when packed by `pack_conversations`, and then `is_target` says which of them are trained on.
    """

    id: str
    source: str
    position: int
    tokens: Sequence[int] | npt.NDArray[np.integer]
    is_target: Sequence[bool] | npt.NDArray[np.bool_] | None = None
    corpus_file: str = ""
    corpus_row: int = -1


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Rows with their document boundaries.

    tokens_RW     integer, padded with the pad id after the last piece of a row
    pieces_P4     uint32: document, offset, start, length; in row order, then by start
    row_pieces    int64 [R + 1]: the pieces of row r are pieces_P4[row_pieces[r]:row_pieces[r + 1]]
    is_target_RW  bool, or None where every token that follows another of its document is a target
    """

    tokens_RW: npt.NDArray[np.integer]
    pieces_P4: npt.NDArray[np.uint32]
    row_pieces: npt.NDArray[np.int64]
    is_target_RW: npt.NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.tokens_RW)

    def slice(self, start: int, stop: int) -> PackedRows:
        """Rows start..stop as a set of their own."""
        first, last = self.row_pieces[start], self.row_pieces[stop]
        return PackedRows(
            tokens_RW=self.tokens_RW[start:stop],
            pieces_P4=self.pieces_P4[first:last],
            row_pieces=self.row_pieces[start : stop + 1] - first,
            is_target_RW=None if self.is_target_RW is None else self.is_target_RW[start:stop],
        )

    def document_numbers(self) -> npt.NDArray[np.int32]:
        """1, 2, … for the documents of each row in their order, 0 where padded."""
        numbers, lengths = self._runs()
        return np.repeat(numbers, lengths).reshape(self.tokens_RW.shape)

    def positions(self) -> npt.NDArray[np.int64]:
        """Of the input columns (all but the last): counted from 0 in every piece, and in the padding."""
        _, lengths = self._runs()
        width = self.tokens_RW.shape[1]
        begins = (np.cumsum(lengths) - lengths) % width
        begins_RW = np.repeat(begins, lengths).reshape(self.tokens_RW.shape)
        return np.arange(width - 1) - begins_RW[:, :-1]

    def valid_targets(self, numbers_RW: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Whether column c is to predict column c + 1: same document, not padding, not masked out."""
        valid_RT = numbers_RW[:, 1:] == numbers_RW[:, :-1]
        valid_RT &= numbers_RW[:, 1:] != 0
        if self.is_target_RW is not None:
            valid_RT &= self.is_target_RW[:, 1:]
        return valid_RT

    def _runs(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Number and length of every run of columns, each row closed by a (possibly empty) run of padding."""
        width = self.tokens_RW.shape[1]
        pieces_per_row = np.diff(self.row_pieces)
        total = len(self.pieces_P4)
        numbers = np.arange(1, total + 1, dtype=np.int32)
        numbers -= np.repeat(self.row_pieces[:-1], pieces_per_row).astype(np.int32)
        lengths = self.pieces_P4[:, LENGTH].astype(np.int64)
        ends = np.zeros(total + 1, dtype=np.int64)
        np.cumsum(lengths, out=ends[1:])
        padding = width - np.diff(ends[self.row_pieces])
        if not padding.any():
            return numbers, lengths
        where = self.row_pieces[1:]
        return np.insert(numbers, where, 0), np.insert(lengths, where, padding)


def token_dtype(vocab_size: int) -> npt.DTypeLike:
    """The narrowest unsigned type that holds every token id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def pack_stream(
    documents: Iterable[TokenDocument], *, seq_len: int, bos_id: int, eos_id: int, pad_id: int, dtype: npt.DTypeLike
) -> PackedRows:
    """Lay `<s> document </s>` end to end and cut rows of seq_len + 1 tokens with stride seq_len.

    Every token but each document's `<s>` is a target of exactly one row; the last row is padded. One shard's tokens
    are held in memory. Offsets in `pieces_P4` count `<s>` as the document's token 0.
    """
    parts: list[npt.NDArray[np.integer]] = []
    bos, eos = np.array([bos_id], dtype=dtype), np.array([eos_id], dtype=dtype)
    for document in documents:
        parts += [bos, np.asarray(document.tokens, dtype=dtype), eos]
    if not parts:
        return _no_rows(seq_len, dtype)
    document_ends = np.cumsum([len(part) for part in parts], dtype=np.int64)[2::3]
    document_starts = np.concatenate([[0], document_ends[:-1]])
    stream_tokens = int(document_ends[-1])
    rows = -(-(stream_tokens - 1) // seq_len)
    stream = np.full(rows * seq_len + 1, pad_id, dtype=dtype)
    np.concatenate(parts, out=stream[:stream_tokens])
    tokens_RW = np.lib.stride_tricks.as_strided(
        stream, (rows, seq_len + 1), (seq_len * stream.itemsize, stream.itemsize), writeable=False
    )
    pieces_P4, row_pieces = _cut(document_starts, document_ends, rows, seq_len)
    return PackedRows(tokens_RW=tokens_RW, pieces_P4=pieces_P4, row_pieces=row_pieces)


def _cut(
    starts_D: npt.NDArray[np.int64], ends_D: npt.NDArray[np.int64], rows: int, seq_len: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """The pieces of documents [start, end) of the stream in rows that cover [r * seq_len, r * seq_len + seq_len]."""
    # A token at a multiple of seq_len lies in two rows: last (a target only) in one, first (an input only) in the next.
    first_row_D = np.maximum(-(-(starts_D - seq_len) // seq_len), 0)
    last_row_D = np.minimum((ends_D - 1) // seq_len, rows - 1)
    pieces_D = last_row_D - first_row_D + 1
    document_P = np.repeat(np.arange(len(starts_D)), pieces_D)
    row_P = np.arange(len(document_P)) - np.repeat(np.cumsum(pieces_D) - pieces_D - first_row_D, pieces_D)
    begin_P = np.maximum(starts_D[document_P], row_P * seq_len)
    end_P = np.minimum(ends_D[document_P], row_P * seq_len + seq_len + 1)
    # Already sorted by row: a document's last row, (end - 1) // seq_len, is exactly the first row of the next one.
    columns = (document_P, begin_P - starts_D[document_P], begin_P - row_P * seq_len, end_P - begin_P)
    pieces_P4 = np.stack(columns, axis=1).astype(np.uint32)
    row_pieces = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_P, minlength=rows), out=row_pieces[1:])
    return pieces_P4, row_pieces


def pack_conversations(
    conversations: Sequence[TokenDocument],
    *,
    seq_len: int,
    pad_id: int,
    dtype: npt.DTypeLike,
    too_long: TooLong = "truncate",
    counts: Counter[str],
) -> PackedRows:
    """Whole conversations per row, longest first into the fullest row that still has room; padded.

    A conversation longer than seq_len + 1 tokens keeps its beginning (`truncate`) or is left out (`drop`). Whatever
    ends without a target token is left out. Each of these adds to `counts`, so that nothing vanishes unseen. The
    offsets in `pieces_P4` count a conversation's own tokens from 0.
    """
    width = seq_len + 1
    lengths: dict[int, int] = {}
    for index, conversation in enumerate(conversations):
        length = len(conversation.tokens)
        if length > width:
            counts["conversation_truncated" if too_long == "truncate" else "conversation_too_long"] += 1
            length = width if too_long == "truncate" else 0
        if length == 0:
            continue
        # The first token of a row's piece has nothing before it to be predicted from.
        if np.any(_mask(conversation)[1:length]):
            lengths[index] = length
        else:
            counts["conversation_without_target"] += 1

    rows = _best_fit(lengths, width)
    if not rows:
        return _no_rows(seq_len, dtype, masked=True)
    tokens_RW = np.full((len(rows), width), pad_id, dtype=dtype)
    is_target_RW = np.zeros((len(rows), width), dtype=np.bool_)
    pieces: list[tuple[int, int, int, int]] = []
    row_pieces = np.zeros(len(rows) + 1, dtype=np.int64)
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            stop = start + lengths[index]
            tokens_RW[row, start:stop] = conversations[index].tokens[: lengths[index]]
            is_target_RW[row, start:stop] = _mask(conversations[index])[: lengths[index]]
            is_target_RW[row, start] = False
            pieces.append((index, 0, start, lengths[index]))
            start = stop
        row_pieces[row + 1] = len(pieces)
    return PackedRows(
        tokens_RW=tokens_RW,
        pieces_P4=np.array(pieces, dtype=np.uint32),
        row_pieces=row_pieces,
        is_target_RW=is_target_RW,
    )


def _best_fit(lengths: dict[int, int], width: int) -> list[list[int]]:
    """Best-fit decreasing: never more than 11/9 of the fewest rows possible, plus one (Johnson 1973)."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free columns, row), sorted
    for index in sorted(lengths, key=lambda i: (-lengths[i], i)):
        fit = bisect.bisect_left(open_rows, (lengths[index], -1))
        if fit < len(open_rows):
            free, row = open_rows.pop(fit)
        else:
            free, row = width, len(rows)
            rows.append([])
        rows[row].append(index)
        if free > lengths[index]:
            bisect.insort(open_rows, (free - lengths[index], row))
    return rows


def _mask(conversation: TokenDocument) -> npt.NDArray[np.bool_]:
    if conversation.is_target is None:
        return np.ones(len(conversation.tokens), dtype=np.bool_)
    return np.asarray(conversation.is_target, dtype=np.bool_)


def _no_rows(seq_len: int, dtype: npt.DTypeLike, masked: bool = False) -> PackedRows:
    return PackedRows(
        tokens_RW=np.zeros((0, seq_len + 1), dtype=dtype),
        pieces_P4=np.zeros((0, 4), dtype=np.uint32),
        row_pieces=np.zeros(1, dtype=np.int64),
        is_target_RW=np.zeros((0, seq_len + 1), dtype=np.bool_) if masked else None,
    )
