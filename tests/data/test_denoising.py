"""What is hidden can be found again, in the amounts the papers say, the same for a row whoever reads it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.refusal import Refusal
from data.batch import collate, row_hashes
from data.rows.packing import PackedRows, TokenDocument, pack_stream
from data.tasks.denoising import MaskedToken, SpanDenoising, TextInfilling
from data.tasks.objectives import IGNORED, Objective
from model.build import build_model
from tests.model.configurations import BERT, VASWANI

BOS, EOS, PAD, MASK, SENTINEL = 2, 3, 0, 1, 9_999
FIRST, END = 10, 9_000
MASKED = MaskedToken(mask_id=MASK, random_ids=(FIRST, END), kept_ids=(BOS, EOS))
DENOISING = SpanDenoising(sentinel_id=SENTINEL, start_id=PAD, end_id=EOS)
INFILLING = TextInfilling(mask_id=MASK, start_id=EOS)
OBJECTIVES = pytest.mark.parametrize("objective", [MASKED, DENOISING, INFILLING], ids=lambda objective: objective.kind)


def rows_of(lengths: list[int], seq_len: int) -> PackedRows:
    """Documents whose tokens are all different; the last row is padded."""
    ids = iter(range(FIRST, END))
    documents = [
        TokenDocument(id=str(i), source="file", position=i, tokens=[next(ids) for _ in range(length)])
        for i, length in enumerate(lengths)
    ]
    return pack_stream(documents, seq_len=seq_len, bos_id=BOS, eos_id=EOS, pad_id=PAD, dtype=np.uint16)


def numbers(rows: PackedRows, first: int = 0) -> Any:
    return first + np.arange(len(rows))


def real(documents_RT: Any, tokens_RT: Any, row: int) -> list[int]:
    return tokens_RT[row][documents_RT[row] != 0].tolist()


lengths_of_documents = st.lists(st.integers(0, 60), min_size=1, max_size=6)
QUICK = settings(derandomize=True, deadline=None, max_examples=50)


@OBJECTIVES
def test_a_row_asks_the_same_whoever_reads_it_and_something_else_the_next_time(objective: Objective) -> None:
    rows = rows_of([300, 200, 100], 64)
    whole = objective(rows, numbers(rows))
    for start, stop in ((0, 1), (3, 7)):
        part = objective(rows.slice(start, stop), np.arange(start, stop))
        assert (part.tokens_RT == whole.tokens_RT[start:stop]).all()
        assert (part.targets_RT == whole.targets_RT[start:stop]).all()
        assert (row_hashes(part, np.arange(start, stop)) == row_hashes(whole, numbers(rows))[start:stop]).all()
    again, other_seed = objective(rows, numbers(rows, 100)), replace(objective, seed=1)(rows, numbers(rows))  # type: ignore[type-var]
    for other in (again, other_seed):
        inputs = (whole.tokens_RT, other.tokens_RT)
        if whole.encoder is not None:
            inputs = (whole.encoder.tokens_RS, other.encoder.tokens_RS)
        assert (inputs[0] != inputs[1]).any(axis=1)[:-1].all()  # the last row is a few tokens long


@QUICK
@given(lengths=lengths_of_documents, seq_len=st.integers(2, 50), rate=st.sampled_from([0.15, 0.5]))
def test_masked_tokens_are_asked_for_and_nothing_else_is_touched(lengths: list[int], seq_len: int, rate: float) -> None:
    rows = rows_of(lengths, seq_len)
    found = replace(MASKED, rate=rate)(rows, numbers(rows))
    original = rows.tokens_RW[:, :-1].astype(np.int64)
    asked = found.targets_RT != IGNORED
    assert (found.targets_RT[asked] == original[asked]).all()
    assert (found.tokens_RT[~asked] == original[~asked]).all()
    may = (found.documents_RT != 0) & (original != BOS) & (original != EOS)
    assert not (asked & ~may).any()
    for row in range(len(rows)):
        candidates = int(may[row].sum())
        assert asked[row].sum() == min(candidates, max(1, round(rate * candidates)))


def test_of_ten_masked_tokens_eight_are_masked_one_is_random_and_one_stays() -> None:
    rows = rows_of([8000], 500)
    found, original = MASKED(rows, numbers(rows)), rows.tokens_RW[:, :-1]
    asked = found.targets_RT != IGNORED
    count = int(asked.sum())
    masked, kept = (found.tokens_RT[asked] == MASK).sum(), (found.tokens_RT[asked] == original[asked]).sum()
    assert count == pytest.approx(0.15 * 8000, rel=0.01)
    deviation = 4 * (count * 0.8 * 0.2) ** 0.5
    assert abs(masked - 0.8 * count) < deviation
    assert abs(kept - 0.1 * count) < deviation
    random = found.tokens_RT[asked & (found.tokens_RT != MASK) & (found.tokens_RT != original)]
    assert random.min() >= FIRST and random.max() < END


def test_without_dynamic_masking_a_row_is_masked_alike_every_time() -> None:
    rows, static = rows_of([300], 64), replace(MASKED, dynamic=False)
    one, other = static(rows, numbers(rows)), static(rows, numbers(rows, 1000))
    assert (one.tokens_RT == other.tokens_RT).all()
    assert (one.targets_RT != static(rows_of([299], 64), numbers(rows)).targets_RT).any()


@QUICK
@given(lengths=lengths_of_documents, seq_len=st.integers(2, 60), mean=st.sampled_from([1.0, 3.0]))
def test_denoised_spans_put_back_give_the_row(lengths: list[int], seq_len: int, mean: float) -> None:
    rows = rows_of(lengths, seq_len)
    objective = replace(DENOISING, mean_span=mean)
    found = objective(rows, numbers(rows))
    assert found.encoder is not None
    for row in range(len(rows)):
        text = [t for t in rows.tokens_RW[row, :-1].tolist() if t != PAD]
        source = real(found.encoder.documents_RS, found.encoder.tokens_RS, row)
        target = [t for t in found.targets_RT[row].tolist() if t != IGNORED]
        assert source[-1] == EOS
        if len(text) < 2:
            assert source[:-1] == text and not target
            continue
        assert target[-1] == EOS
        assert real(found.documents_RT, found.tokens_RT, row) == [PAD, *target[:-1]]
        hidden, spans, _ = objective.lengths(len(text))
        assert len(target) == hidden + spans + 1
        sentinels = [t for t in target if t > END]
        assert sentinels == [SENTINEL - span for span in range(spans)] == [t for t in source if t > END]
        starts = [target.index(s) for s in sentinels] + [len(target) - 1]
        hides = {s: target[a + 1 : b] for s, a, b in zip(sentinels, starts, starts[1:], strict=False)}
        assert all(hides.values())
        assert [t for token in source[:-1] for t in hides.get(token, [token])] == text


def test_a_row_of_512_tokens_has_the_spans_that_t5_has() -> None:
    assert DENOISING.lengths(512) == (77, 26, 435)


@QUICK
@given(lengths=lengths_of_documents, seq_len=st.integers(2, 60))
def test_infilled_text_keeps_seven_tokens_of_ten_in_order(lengths: list[int], seq_len: int) -> None:
    rows = rows_of(lengths, seq_len)
    found = INFILLING(rows, numbers(rows))
    assert found.encoder is not None
    for row in range(len(rows)):
        text = [t for t in rows.tokens_RW[row, :-1].tolist() if t != PAD]
        source = real(found.encoder.documents_RS, found.encoder.tokens_RS, row)
        assert [t for t in found.targets_RT[row].tolist() if t != IGNORED] == text
        assert real(found.documents_RT, found.tokens_RT, row) == [EOS, *text[:-1]]
        kept = [t for t in source if t != MASK]
        if len(text) >= 2:
            assert len(text) - len(kept) == min(max(round(0.3 * len(text)), 1), len(text) - 1)
        left = iter(text)
        assert all(token in left for token in kept)


def test_infilled_spans_have_the_lengths_of_a_poisson_distribution() -> None:
    rows = rows_of([8000], 400)
    found = INFILLING(rows, numbers(rows))
    assert found.encoder is not None
    masks, doubled = 0, 0
    for row in range(len(rows) - 1):
        source = np.array(real(found.encoder.documents_RS, found.encoder.tokens_RS, row))
        masks += int((source == MASK).sum())
        doubled += int(((source[1:] == MASK) & (source[:-1] == MASK)).sum())
    hidden = 0.3 * 400 * (len(rows) - 1)
    assert hidden / masks == pytest.approx(3.0, rel=0.1)
    assert doubled > 0


@OBJECTIVES
def test_the_batch_is_what_the_model_takes(objective: Objective) -> None:
    rows = rows_of([20, 9], 16)
    rows = replace(rows, tokens_RW=rows.tokens_RW % 80)
    small: Any = {"sentinel_id": 96} if objective.kind == "span_denoising" else {}
    small |= {"random_ids": (10, 80)} if objective.kind == "masked_token" else {}
    batch = collate(replace(objective, **small)(rows, numbers(rows)))  # type: ignore[type-var]
    sums = build_model(BERT if objective.kind == "masked_token" else VASWANI)(**batch)
    assert int(sums["target_count"]) == int((batch["targets_BT"] >= 0).sum()) > 0
    assert torch.isfinite(sums["loss_sum"])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: replace(MASKED, rate=0.0), r"^rate = 0\.0: "),
        (lambda: replace(MASKED, random_ids=(5, 5)), r"^random_ids = \(5, 5\): "),
        (lambda: replace(DENOISING, mean_span=0.5), r"^mean_span = 0\.5: "),
        (lambda: replace(INFILLING, mean_span=0.0), r"^mean_span = 0\.0: "),
    ],
)
def test_an_impossible_objective_is_refused(make: Any, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        make()
