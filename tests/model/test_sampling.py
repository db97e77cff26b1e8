"""Sampling options keep and forbid what transformers' processors do."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from conf.refusal import Refusal
from model.decoding.sampling import Sampling, allowed, kept

QUICK = settings(max_examples=40, deadline=None)
VOCABULARY = 23


def some_logits(seed: int, rows: int = 3) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def texts_of(seed: int, length: int, rows: int = 3) -> torch.Tensor:
    return torch.randint(0, 5, (rows, length), generator=torch.Generator().manual_seed(seed))  # few words: repetitions


@QUICK
@given(
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_k=st.sampled_from([None, 1, 4, 50]),
    top_p=st.sampled_from([None, 0.2, 0.9]),
    min_p=st.sampled_from([None, 0.05, 0.5]),
    typical_p=st.sampled_from([None, 0.3, 0.95]),
    seed=st.integers(0, 1000),
)
def test_what_is_kept_is_what_transformers_keeps(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    typical_p: float | None,
    seed: int,
) -> None:
    logits = some_logits(seed)
    expected = theirs.TemperatureLogitsWarper(temperature)(None, logits)
    warpers: list[tuple[Any, Any]] = [
        (top_k, theirs.TopKLogitsWarper),
        (top_p, theirs.TopPLogitsWarper),
        (min_p, theirs.MinPLogitsWarper),
        (typical_p, theirs.TypicalLogitsWarper),
    ]
    for value, warper in warpers:
        if value is not None:
            expected = warper(value)(None, expected)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
    found, candidates = kept(logits, sampling)
    if candidates is not None:
        found = torch.full_like(logits, -torch.inf).scatter(1, candidates, found)
    assert torch.allclose(found, expected)


@QUICK
@given(
    penalty=st.sampled_from([1.0, 1.3, 0.8]),
    ngram=st.sampled_from([None, 1, 2, 3]),
    min_new_tokens=st.sampled_from([0, 4]),
    length=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_what_the_text_forbids_is_what_transformers_forbids(
    penalty: float, ngram: int | None, min_new_tokens: int, length: int, seed: int
) -> None:
    logits, texts, prompt_tokens = some_logits(seed), texts_of(seed, length), max(0, length - 3)
    biased = {(3,): 1.5, (1, 2): -4.0, (0, 1, 4): 2.5}
    bad = [[7], [2, 3]]
    expected = theirs.SequenceBiasLogitsProcessor(biased)(texts, logits)
    expected = theirs.NoBadWordsLogitsProcessor(bad)(texts, expected)
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(texts, expected)
    if ngram is not None:
        expected = theirs.NoRepeatNGramLogitsProcessor(ngram)(texts, expected)
    if min_new_tokens:
        expected = theirs.MinNewTokensLengthLogitsProcessor(prompt_tokens, min_new_tokens, [5, 6])(texts, expected)
    sampling = Sampling(
        min_new_tokens=min_new_tokens,
        repetition_penalty=penalty,
        no_repeat_ngram_size=ngram,
        bias=(*biased.items(), *((tuple(tokens), float("-inf")) for tokens in bad)),
    )
    before = logits.clone()
    found = allowed(logits, texts.tolist(), [length - prompt_tokens] * 3, sampling, stop_ids={5, 6})
    assert torch.allclose(found, expected)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"min_p": 0.0}, "min_p = 0.0"),
        ({"typical_p": 1.5}, "typical_p = 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"no_repeat_ngram_size": 0}, "no_repeat_ngram_size = 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens = 9"),
        ({"bias": (((), 1.0),)}, "without tokens"),
    ],
)
def test_an_impossible_option_is_refused_naming_its_value(values: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        Sampling(**values)
