"""The tokenizer: no text is lost or changed, control pieces come only by id, and training is a function of the text."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.refusal import Refusal
from data.tokenizers.sentencepiece import CONTROL_PIECES, MODEL_FILE, Tokenizer
from data.tokenizers.training import MAX_LINE_BYTES, TokenizerSettings, _training_lines, train_tokenizer

AWKWARD = [
    "\0",
    "\u2581",
    "\u2585",
    " ",
    "   ",
    "\t\t\t\t\t",
    "\r\n",
    "\n\n\n",
    "\ufeff",
    "\ufffd",
    "\u2028",
    "\U0010ffff",
]
CONTROL_LIKE = [*CONTROL_PIECES, "<0x41>", "<0x0A>", "<", "|>", "s>", "</"]
CODE = ["def ", "return", "self.", "):\n", "    ", '"""', "__init__", "'", "\\n", "12", "é", "漢字", "👩‍👩‍👧"]
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",))),
    st.lists(st.sampled_from([*AWKWARD, *CONTROL_LIKE, *CODE])).map("".join),
)


@given(text=TEXTS)
def test_decoding_gives_back_every_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(len(CONTROL_PIECES) <= number < tokenizer.vocab_size for number in ids)
    assert tokenizer.encode_batch([text, "x", text]) == [ids, tokenizer.encode("x"), ids]


def test_real_sources_come_back_and_newlines_and_indents_are_pieces(
    tokenizer: Tokenizer, library_texts: list[str]
) -> None:
    assert all(
        tokenizer.decode(ids) == text
        for ids, text in zip(tokenizer.encode_batch(library_texts), library_texts, strict=True)
    )
    pieces = {tokenizer.piece(number) for number in range(tokenizer.vocab_size)}
    assert {":\n", "\n\n", "▁▁▁▁", "▁▁▁▁▁▁▁▁"} <= pieces
    assert not any(len(piece) > 1 and piece.isdigit() for piece in pieces)


def test_control_pieces_have_the_first_ids_and_are_hidden_or_shown(tokenizer: Tokenizer) -> None:
    assert [tokenizer.piece(n) for n in range(8)] == list(CONTROL_PIECES)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_id) == (0, 1, 2, 3, 7)
    ids = [2, 5, *tokenizer.encode("hi "), 7, 3]
    assert tokenizer.decode(ids) == "hi "
    assert tokenizer.decode(ids, show_control=True) == "<s><|user|>hi <|end|></s>"


def test_ids_that_stop_within_a_character_give_a_replacement_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("👍")
    assert len(ids) == 4
    assert "\ufffd" in tokenizer.decode(ids[:2])


def test_half_a_surrogate_pair_is_refused_with_a_reason(tokenizer: Tokenizer) -> None:
    for text in ("a\ud800b", "\u2581\ud800"):
        with pytest.raises(Refusal, match="surrogate"):
            tokenizer.encode(text)


def test_a_tokenizer_travels_to_workers(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("def f():\n") == tokenizer.encode("def f():\n")
    assert copy.chat_template == tokenizer.chat_template


def test_equal_texts_train_equal_bytes(library_texts: list[str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        settings = TokenizerSettings(vocab_size=512, training_bytes=100_000)
        statistics = train_tokenizer(iter(library_texts), settings, tmp_path / name)
        assert 90_000 < statistics["training_bytes"] <= 100_000
        assert statistics["text_bytes"] == sum(len(text.encode()) for text in library_texts)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_the_sample_does_not_depend_on_how_often_it_was_cut_back(library_texts: list[str], tmp_path: Path) -> None:
    settings = TokenizerSettings(vocab_size=512, training_bytes=60_000)
    train_tokenizer(library_texts, settings, tmp_path / "all")
    train_tokenizer(
        [*library_texts, *library_texts[:1]],
        TokenizerSettings(vocab_size=512, training_bytes=60_000, seed=1),
        tmp_path / "seed",
    )
    assert (tmp_path / "all" / MODEL_FILE).read_bytes() != (tmp_path / "seed" / MODEL_FILE).read_bytes()


def test_long_lines_and_reserved_characters_are_learned_from_not_skipped(
    tmp_path: Path, library_texts: list[str]
) -> None:
    line = "wordone wordtwo é " * (MAX_LINE_BYTES // 8)
    text = line + "\n" + "\0wordthree\u2585wordthree\u2581" * 300
    statistics = train_tokenizer([text, library_texts[0]], TokenizerSettings(vocab_size=1024), tmp_path)
    assert statistics["lines_split"] == 1
    tokenizer = Tokenizer.load(tmp_path)
    pieces = [tokenizer.piece(number) for number in tokenizer.encode(" wordone wordtwo wordthree")]
    assert pieces == ["▁wordone", "▁wordtwo", "▁", "wordthree"]


@pytest.mark.parametrize("size", [0, 100, 1000, 4095])
def test_a_vocabulary_that_is_no_multiple_of_128_is_refused_with_the_nearest(size: int) -> None:
    with pytest.raises(Refusal, match=f"Set vocab_size={max(384, round(size / 128) * 128)}"):
        TokenizerSettings(vocab_size=size)


def test_a_corpus_too_small_for_the_vocabulary_names_one_that_fits(library_texts: list[str], tmp_path: Path) -> None:
    text = library_texts[0][:6000]
    with pytest.raises(
        Refusal, match=r"vocab_size = 8192: the corpus is too small.*Set tokenizer.vocab_size=(\d+)"
    ) as caught:
        train_tokenizer([text], TokenizerSettings(vocab_size=8192), tmp_path)
    fitting = int(str(caught.value).split("tokenizer.vocab_size=")[1].split(",")[0])
    assert train_tokenizer([text], TokenizerSettings(vocab_size=fitting), tmp_path)["vocab_size"] == fitting


def test_a_hopelessly_small_or_empty_corpus_asks_for_text(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="give more text"):
        train_tokenizer(["hello"], TokenizerSettings(vocab_size=512), tmp_path)
    for texts in ([], ["", "\0"]):
        with pytest.raises(Refusal, match="no text to train"):
            train_tokenizer(texts, TokenizerSettings(), tmp_path)


def test_more_characters_than_vocabulary_is_refused_with_both_remedies(tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + n) for n in range(400)) * 5
    with pytest.raises(Refusal, match=r"vocab_size=768 or more, or lower tokenizer.character_coverage"):
        train_tokenizer([text], TokenizerSettings(vocab_size=384), tmp_path)


def test_a_folder_without_a_tokenizer_or_with_another_kind_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(Refusal, match="holds no tokenizer"):
        Tokenizer.load(tmp_path)
    for file in tokenizer_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / MODEL_FILE).write_bytes(b"not a model")
    with pytest.raises(Refusal, match="holds no tokenizer"):
        Tokenizer.load(tmp_path)


@given(st.lists(st.sampled_from(["a", "é", "漢", "😀", "\n", " "]), max_size=60).map("".join))
def test_training_lines_lose_no_character_and_stay_within_the_limit(text: str) -> None:
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.tokenizers.training.MAX_LINE_BYTES", 9)
        lines = list(_training_lines([text], counts))
    assert "".join(lines) == text
    assert all(0 < len(line.encode()) <= 9 for line in lines)
    assert counts["lines_split"] == sum(len(line.encode()) > 9 for line in text.splitlines(keepends=True))
