"""Packing loses nothing, repeats nothing and predicts nothing across documents."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.rows.packing import (
    DOCUMENT,
    LENGTH,
    OFFSET,
    START,
    PackedRows,
    TokenDocument,
    pack_conversations,
    pack_stream,
)

BOS, EOS, PAD = 2, 3, 0
lengths_of_documents = st.lists(st.integers(0, 40), min_size=1, max_size=12)


def documents_of(lengths: list[int]) -> list[TokenDocument]:
    """Documents whose tokens are all different, so that any mix-up shows."""
    ids = iter(range(10, 10_000))
    return [
        TokenDocument(id=str(i), source="file", position=i, tokens=[next(ids) for _ in range(length)])
        for i, length in enumerate(lengths)
    ]


def packed(documents: list[TokenDocument], seq_len: int) -> PackedRows:
    return pack_stream(documents, seq_len=seq_len, bos_id=BOS, eos_id=EOS, pad_id=PAD, dtype=np.uint16)


def targets_of(rows: PackedRows) -> list[int]:
    valid = rows.valid_targets(rows.document_numbers())
    return rows.tokens_RW[:, 1:][valid].tolist()


@settings(derandomize=True, deadline=None)
@given(lengths=lengths_of_documents, seq_len=st.integers(1, 17))
def test_every_token_but_the_document_starts_is_a_target_exactly_once(lengths: list[int], seq_len: int) -> None:
    documents = documents_of(lengths)
    expected = [token for document in documents for token in [*document.tokens, EOS]]
    assert targets_of(packed(documents, seq_len)) == expected


@settings(derandomize=True, deadline=None)
@given(lengths=lengths_of_documents, seq_len=st.integers(1, 17))
def test_pieces_say_which_token_of_which_document_stands_in_each_column(lengths: list[int], seq_len: int) -> None:
    documents = documents_of(lengths)
    rows = packed(documents, seq_len)
    whole = [[BOS, *document.tokens, EOS] for document in documents]
    for row in range(len(rows)):
        rebuilt = np.full(seq_len + 1, PAD)
        for piece in rows.pieces_P4[rows.row_pieces[row] : rows.row_pieces[row + 1]].astype(int):
            tokens = whole[piece[DOCUMENT]][piece[OFFSET] : piece[OFFSET] + piece[LENGTH]]
            assert len(tokens) == piece[LENGTH] > 0
            rebuilt[piece[START] : piece[START] + piece[LENGTH]] = tokens
        assert rebuilt.tolist() == rows.tokens_RW[row].tolist()


@settings(derandomize=True, deadline=None)
@given(lengths=lengths_of_documents, seq_len=st.integers(1, 17))
def test_document_numbers_and_positions_agree_with_a_walk_over_the_columns(lengths: list[int], seq_len: int) -> None:
    rows = packed(documents_of(lengths), seq_len)
    numbers, positions = rows.document_numbers(), rows.positions()
    for row in range(len(rows)):
        number, position = 0, 0
        for column, token in enumerate(rows.tokens_RW[row]):
            if token == PAD:
                assert numbers[row, column] == 0
                continue
            if column == 0 or token == BOS:
                number, position = number + 1, 0
            assert numbers[row, column] == number
            assert column == seq_len or positions[row, column] == position
            position += 1


def test_only_the_last_row_is_padded() -> None:
    rows = packed(documents_of([30, 1, 0, 25]), 8)
    padded = (rows.document_numbers() == 0).any(axis=1)
    assert not padded[:-1].any()
    assert padded[-1]


def test_a_slice_of_rows_is_a_set_of_rows_of_its_own() -> None:
    rows = packed(documents_of([30, 1, 0, 25]), 8)
    part = rows.slice(2, 5)
    assert (part.document_numbers() == rows.document_numbers()[2:5]).all()
    assert (part.positions() == rows.positions()[2:5]).all()


def conversations_of(lengths: list[int]) -> list[TokenDocument]:
    ids = iter(range(10, 100_000))
    return [
        TokenDocument(
            id=str(i),
            source="chat",
            position=i,
            tokens=[next(ids) for _ in range(length)],
            is_target=[column >= length // 2 for column in range(length)],
        )
        for i, length in enumerate(lengths)
    ]


@settings(derandomize=True, deadline=None)
@given(lengths=st.lists(st.integers(2, 33), min_size=1, max_size=30))
def test_conversations_stay_whole_and_only_their_targets_are_targets(lengths: list[int]) -> None:
    conversations = conversations_of(lengths)
    counts: Counter[str] = Counter()
    rows = pack_conversations(conversations, seq_len=32, pad_id=PAD, dtype=np.uint16, counts=counts)
    assert not counts
    expected = [t for c in conversations for t, m in list(zip(c.tokens, c.is_target or [], strict=True))[1:] if m]
    assert sorted(targets_of(rows)) == sorted(expected)
    assert sorted(rows.pieces_P4[:, DOCUMENT].tolist()) == list(range(len(lengths)))
    assert (rows.pieces_P4[:, LENGTH] == [lengths[i] for i in rows.pieces_P4[:, DOCUMENT]]).all()
    # No two rows could have been one: what opened the later row did not fit into the earlier.
    filled = sorted((rows.document_numbers() > 0).sum(axis=1).tolist())
    assert len(filled) == 1 or filled[0] + filled[1] > 33


def test_best_fit_fills_rows_where_first_come_would_not() -> None:
    rows = pack_conversations(conversations_of([7, 4, 9, 6]), seq_len=12, pad_id=PAD, dtype=np.uint16, counts=Counter())
    assert len(rows) == 2
    assert not (rows.document_numbers() == 0).any()


def test_long_conversations_are_cut_or_left_out_and_counted() -> None:
    conversations = conversations_of([40, 10])
    counts: Counter[str] = Counter()
    rows = pack_conversations(conversations, seq_len=32, pad_id=PAD, dtype=np.uint16, counts=counts)
    assert counts == {"conversation_truncated": 1}
    assert rows.tokens_RW[0].tolist() == list(conversations[0].tokens)[:33]
    counts.clear()
    rows = pack_conversations(conversations, seq_len=32, pad_id=PAD, dtype=np.uint16, too_long="drop", counts=counts)
    assert counts == {"conversation_too_long": 1}
    assert rows.pieces_P4[:, DOCUMENT].tolist() == [1]


def test_a_conversation_without_a_target_is_left_out_and_counted() -> None:
    silent = TokenDocument(id="a", source="chat", position=0, tokens=[5, 6, 7], is_target=[True, False, False])
    cut_before_answer = TokenDocument(
        id="b", source="chat", position=1, tokens=list(range(10, 50)), is_target=[False] * 35 + [True] * 5
    )
    counts: Counter[str] = Counter()
    rows = pack_conversations([silent, cut_before_answer], seq_len=32, pad_id=PAD, dtype=np.uint16, counts=counts)
    assert len(rows) == 0
    assert counts == {"conversation_truncated": 1, "conversation_without_target": 2}
