"""Held-out text: chosen by content, and training text that contains it or lies inside it is found."""

from __future__ import annotations

import random
import unicodedata
from typing import Any

import numpy as np
import pytest

from conf.refusal import Refusal
from data.text.decontaminate import HeldOutIndex, HeldOutSettings, is_held_out
from data.text.document import Document, document_id

SETTINGS = HeldOutSettings()


def text(seed: int, words: int) -> str:
    chooser = random.Random(seed)
    return " ".join(f"w{chooser.randrange(5000)}" for _ in range(words))


def index_of(*texts: str, settings: HeldOutSettings = SETTINGS) -> HeldOutIndex:
    return HeldOutIndex.build([Document(text=t, source="h", position=0) for t in texts], settings)


def test_the_split_holds_out_about_the_fraction_and_grows_with_it() -> None:
    ids = [document_id(str(n)) for n in range(20_000)]
    small, large = ({i for i in ids if is_held_out(i, fraction)} for fraction in (0.05, 0.1))
    assert small < large
    # Binomial(20000, 0.05): standard deviation 31.
    assert abs(len(small) - 1000) < 4 * 31


def test_training_text_that_contains_a_held_out_document_is_found() -> None:
    held = text(1, 400)
    index = index_of(text(2, 1000), held)
    assert index.contaminates(text(3, 3000) + "\n" + held.upper() + ", " + text(4, 3000)) == "contains_held_out"
    assert index.contaminates(text(3, 6000)) is None


def test_training_text_that_is_a_piece_of_a_held_out_document_is_found() -> None:
    held = text(1, 4000)
    piece = " ".join(held.split()[1000:1400])
    assert index_of(held).contaminates(piece) == "inside_held_out"
    assert index_of(held).contaminates(piece + " " + text(5, 1000)) is None


def drawn(seed: int, alphabet: str, characters: int) -> str:
    """Text of a script without spaces, a full stop every 20 characters."""
    chooser = random.Random(seed)
    return "".join(chooser.choice(alphabet) + ("" if at % 20 else "。") for at in range(1, characters + 1))


SCRIPTS = {
    "Chinese": "".join(map(chr, range(0x4E00, 0x5200))),
    "Japanese": "".join(map(chr, [*range(0x3042, 0x3090), *range(0x4E00, 0x4F00)])),
    "Thai": "กขคงจชซญดตถทธนบปผพฟภมยรลวศษสหอ" * 2 + "ะาเแโใไ",
    "Khmer": "".join(map(chr, range(0x1780, 0x17A3))),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_held_out_paragraph_without_spaces_is_found_inside_a_training_page(script: str) -> None:
    held, page = drawn(1, SCRIPTS[script], 300), drawn(2, SCRIPTS[script], 3000)
    index = index_of(held)
    # The sentence before it and the one behind it touch the canary: it is no word, line or paragraph by itself.
    assert index.contaminates(page[:1487] + held + page[1487:]) == "contains_held_out"
    assert index.contaminates(page) is None
    assert index_of(page).contaminates(page[700:1300]) == "inside_held_out"


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKD"])
def test_held_out_english_in_other_typography_is_found(form: Any) -> None:
    chooser = random.Random(1)
    words = ["Élan", "naïve", "it's", "the", "finance", "'quoted'", "end.", "so - then", "Ångström", "ﬁne", "2nd"]
    held = " ".join(f"{chooser.choice(words)} w{chooser.randrange(50)}" for _ in range(200))
    canary = unicodedata.normalize(form, held.upper() if form == "NFC" else held)
    for plain, other in (("'", "\u2019"), (" - ", "\u2014"), (" ", "\u00a0")):
        canary = canary.replace(plain, other)
    page = text(2, 1500)
    assert index_of(held).contaminates(f"{page}\u201c{canary}\u201d{text(3, 1500)}") == "contains_held_out"


def test_the_overlap_limit_decides() -> None:
    held = text(1, 1000)
    half = " ".join(held.split()[:600]) + " " + text(2, 4000)
    assert index_of(held).contaminates(half) == "contains_held_out"
    assert index_of(held, settings=HeldOutSettings(max_overlap=0.8)).contaminates(half) is None
    assert index_of(held, settings=HeldOutSettings(max_overlap=None)).contaminates(held) is None


def test_a_licence_header_that_is_held_out_does_not_empty_the_corpus() -> None:
    header = text(1, 40)
    assert index_of(header).contaminates(header + " " + text(2, 500)) is None


def test_a_run_shared_by_several_held_out_documents_counts_for_each() -> None:
    shared = text(1, 300)
    index = index_of(shared + " " + text(2, 100), shared + " " + text(3, 100), text(4, 50))
    assert index.contaminates(text(5, 2000) + " " + shared) == "contains_held_out"


def test_an_index_survives_being_saved() -> None:
    held = text(1, 400)
    index = HeldOutIndex.from_array(index_of(held).to_array(), SETTINGS)
    assert index.contaminates(text(2, 1000) + " " + held) == "contains_held_out"
    empty = HeldOutIndex.from_array(np.zeros((2, 0), np.uint64), SETTINGS)
    assert empty.contaminates(held) is None
    assert index.contaminates("") is None


@pytest.mark.parametrize("wrong", [{"fraction": 0.0}, {"fraction": 1.0}, {"max_overlap": 0.0}, {"min_documents": 0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(Refusal, match=next(iter(wrong))):
        HeldOutSettings(**wrong)  # type: ignore[arg-type]
