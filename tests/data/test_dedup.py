"""Deduplication: signatures estimate Jaccard similarity, banding finds the pairs, something similar stays."""

from __future__ import annotations

import itertools
import random
import time
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.refusal import Refusal
from data.text.dedup import DedupSettings, MinHash, duplicates_to_drop, near_duplicate_pairs
from data.text.shingles import character_ngrams, word_ngrams

SETTINGS = DedupSettings()


def words(seed: int, count: int) -> list[str]:
    chooser = random.Random(seed)
    return [f"w{chooser.randrange(5000)}" for _ in range(count)]


def jaccard(a: str, b: str, n: int = 5) -> float:
    x, y = ({tuple(t.split()[i : i + n]) for i in range(len(t.split()) - n + 1)} for t in (a, b))
    return len(x & y) / len(x | y)


def variant(base: list[str], changed: float, seed: int) -> str:
    chooser = random.Random(seed)
    return " ".join(f"x{chooser.randrange(10**6)}" if chooser.random() < changed else word for word in base)


@given(
    st.lists(st.sampled_from(["the", "Cat", "_x1", "é", "漢", "หัว"[:2], "हिन्दी", "ß"]), min_size=1, max_size=30),
    st.integers(1, 6),
)
def test_word_ngrams_see_words_only_and_count_them_exactly(tokens: list[str], n: int) -> None:
    spaced, punctuated = " ".join(tokens), "\t(" + ";;\n".join(tokens).replace("Cat", "cAT") + ")!"
    hashes = word_ngrams(spaced, n)
    assert np.array_equal(hashes, word_ngrams(punctuated, n))
    runs = [tuple(t.lower() for t in tokens[i : i + min(n, len(tokens))]) for i in range(max(len(tokens) - n + 1, 1))]
    assert hashes.size == len(runs)
    assert len(set(hashes.tolist())) == len(set(runs))


def test_hashes_of_long_texts_do_not_depend_on_the_length_before_them() -> None:
    tail = " ".join(words(1, 50))
    long = " ".join(words(2, 30_000)) + " " + tail
    assert len(long) > 1 << 16
    assert np.array_equal(word_ngrams(long, 5)[-46:], word_ngrams(tail, 5))


def test_a_text_shorter_than_a_shingle_still_has_one_and_an_empty_one_none() -> None:
    assert word_ngrams("two words", 5).size == 1
    assert word_ngrams(" .,; ", 5).size == 0
    assert character_ngrams("漢 字", 5).size == 1
    assert character_ngrams(" \n", 5).size == 0


def typed_elsewhere(text: str) -> str:
    """The same text as another keyboard, another program and another century have it."""
    for plain, curly in (
        ("'", "\u2019"),
        (' "', " \u201c"),
        ('"', "\u201d"),
        (" - ", "\u2014"),
        (". ", ".\u00a0\u00a0"),
    ):
        text = text.replace(plain, curly)
    return (
        unicodedata.normalize("NFD", text).replace("fi", "\ufb01").replace("ing", "i\u00adng").replace("an", "a\u200bn")
    )


ENGLISH = "He said: \"It's a café - I'm dining. Élan, naïve façade.\" Finally, an ÉCLAIR for Zoë. "


@pytest.mark.parametrize("shingles", [word_ngrams, character_ngrams])
def test_quotes_dashes_spaces_accents_case_and_invisible_characters_make_no_other_words(
    shingles: Callable[[str, int], Any],
) -> None:
    plain, other = ENGLISH * 3, typed_elsewhere(ENGLISH * 3)
    assert plain != other
    assert np.array_equal(shingles(plain, 5), shingles(other, 5))
    assert np.array_equal(shingles(plain, 5), shingles(other.upper(), 5))
    assert np.array_equal(shingles("ＡＢＣ １２３ ｶﾞ", 1), shingles("abc 123 ガ", 1))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("漢字かな。カナ漢!", 7),  # each character is a word, marks are none
        ("ภาษาไทย", 7),
        ("ที่นี่", 2),  # a vowel sign and a tone mark stay on their consonant
        ("မြန်မာ", 3),
        ("한국어 띄어쓰기", 2),
        ("हिन्दी भाषा", 2),
        ("中文ABC中文", 5),
        ("ที่ABC", 2),
        ("👍👍 … — ", 0),
    ],
)
def test_words_are_told_in_scripts_without_spaces_and_with_marks(text: str, count: int) -> None:
    assert word_ngrams(text, 1).size == count


@given(st.text(max_size=40), st.text(max_size=40))
def test_words_do_not_depend_on_the_text_before_them(before: str, after: str) -> None:
    both = word_ngrams(f"{before} \n {after}", 1).tolist()
    assert both == [*word_ngrams(before, 1).tolist(), *word_ngrams(after, 1).tolist()]


def test_a_pile_of_marks_takes_no_longer_than_letters_do() -> None:
    started = time.process_time()
    assert word_ngrams("a" + "\u0301\u0316" * 300_000, 5).size == 1  # Python's normalization alone would take minutes
    assert time.process_time() - started < 10


def test_signatures_estimate_jaccard_similarity_without_bias() -> None:
    min_hash = MinHash(SETTINGS)
    errors = []
    for seed in range(60):
        base = words(seed, 400)
        a, b = " ".join(base), variant(base, 0.002 * (seed % 30), seed)
        errors.append(np.mean(min_hash.signature(a) == min_hash.signature(b)) - jaccard(a, b))
    # 128 independent minima: standard error at most sqrt(0.25 / 128) = 0.044; that of the mean of 60, over sqrt(60).
    assert abs(np.mean(errors)) < 0.023
    assert np.std(errors) < 0.055


def test_similar_documents_are_found_and_dissimilar_ones_left_alone() -> None:
    texts = []
    for group in range(40):
        base = words(group, 300)
        texts += [" ".join(base), variant(base, 0.01, group), variant(base, 0.4, group)]
    min_hash = MinHash(SETTINGS)
    table = np.stack([min_hash.signature(text) for text in texts])
    pairs = {tuple(pair) for pair in near_duplicate_pairs([table[:50], table[50:50], table[50:]], SETTINGS).tolist()}
    for i, j in itertools.combinations(range(len(texts)), 2):
        similarity = jaccard(texts[i], texts[j]) if i // 3 == j // 3 else 0.0
        if similarity > 0.95:
            assert (i, j) in pairs
        if similarity < 0.65:
            assert (i, j) not in pairs
    assert len(pairs) >= 35


def test_a_crowd_of_copies_is_thinned_to_one_in_any_order_of_shards() -> None:
    min_hash = MinHash(SETTINGS)
    base = words(1, 400)
    table = np.stack([min_hash.signature(variant(base, 0.0 if n % 3 else 0.001, n)) for n in range(500)])
    for cut in (0, 123, 500):
        pairs = near_duplicate_pairs([table[:cut], table[cut:]], SETTINGS)
        kept = set(range(500)) - set(duplicates_to_drop(pairs, np.arange(500)))
        assert 0 in kept
        assert len(kept) <= 3


def test_documents_without_words_are_nobodys_duplicates() -> None:
    table = np.stack([MinHash(SETTINGS).signature(text) for text in ("...", "--- !", "", "some words to keep here")])
    assert near_duplicate_pairs([table], SETTINGS).shape == (0, 2)
    assert near_duplicate_pairs([], SETTINGS).shape == (0, 2)


@given(st.integers(2, 12), st.data())
def test_a_document_goes_only_if_something_similar_of_lower_rank_stays(count: int, data: st.DataObject) -> None:
    all_pairs = list(itertools.combinations(range(count), 2))
    chosen = data.draw(st.lists(st.sampled_from(all_pairs), unique=True))
    rank = np.array(data.draw(st.permutations(range(count))))
    dropped = duplicates_to_drop(np.array(chosen, dtype=np.int64).reshape(-1, 2), rank)
    edges = {frozenset(pair) for pair in chosen}
    for copy, original in dropped.items():
        assert original not in dropped
        assert frozenset((copy, original)) in edges
        assert rank[original] < rank[copy]
    kept = set(range(count)) - set(dropped)
    assert not any(edge <= kept for edge in edges)


def test_words_and_characters_serve_scripts_without_spaces() -> None:
    chooser = random.Random(0)
    base = "".join(chr(0x4E00 + chooser.randrange(3000)) for _ in range(500))
    edited = base[:200] + "變" + base[201:]
    for shingle in ("characters", "words"):
        settings = DedupSettings(shingle=shingle)  # type: ignore[arg-type]
        table = np.stack([MinHash(settings).signature(text) for text in (base, edited)])
        assert near_duplicate_pairs([table], settings).shape[0] == 1


@pytest.mark.parametrize("wrong", [{"threshold": 0.0}, {"bands": 33}, {"shingle_size": 0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(Refusal, match=next(iter(wrong))):
        DedupSettings(**wrong)  # type: ignore[arg-type]
