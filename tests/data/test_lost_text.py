"""What a tokenizer loses is charged: nothing for nothing, about what it takes to mend it, never more than the text."""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from data.tokenizers.lost_text import _edits, lost_bits

TEXT = Path(argparse.__file__).read_text()[:60_000]


def mended(script: bytes, decoded: str) -> str:
    """What another program makes of the edits."""
    at = place = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = script[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    text = ""
    while at < len(script):
        same, left, size = number(), number(), number()
        text += decoded[place : place + same] + script[at : at + size].decode("utf-8")
        place, at = place + same + left, at + size
    return text + decoded[place:]


@given(st.text(alphabet="abAB \n\u00e9", max_size=60), st.text(alphabet="abAB \n\u00e9", max_size=60))
def test_the_edits_give_the_text_back(text: str, decoded: str) -> None:
    assert mended(_edits(text, decoded), decoded) == text


def test_a_tokenizer_that_loses_nothing_is_charged_nothing() -> None:
    assert lost_bits(TEXT, TEXT) == 0


def test_capital_letters_line_breaks_and_unknown_characters_cost_what_mending_them_takes() -> None:
    capitals = sum(letter.isupper() for letter in TEXT)
    for decoded, places in (
        (TEXT.lower(), capitals),
        (TEXT.replace("\n", " "), TEXT.count("\n")),
        (TEXT.replace("e", ""), TEXT.count("e")),
    ):
        assert mended(_edits(TEXT, decoded), decoded) == TEXT
        assert 4 * places < lost_bits(TEXT, decoded) < 24 * places
    assert 8 < lost_bits(TEXT, TEXT.replace("A", "a", 1)) < 200
    raw = lzma.compress(TEXT.encode(), format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}])
    assert lost_bits(TEXT, "") <= 8 * len(raw) + 64
