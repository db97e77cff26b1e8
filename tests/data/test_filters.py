"""Filters: each rule drops what it names and nothing else, under its own reason."""

from __future__ import annotations

import pytest

from conf.refusal import Refusal
from data.text.document import Document
from data.text.filters import FilterSettings, filter_document, measure, rejection

PROSE = "It was the best of times, it was the worst of times.\nIt was the age of wisdom.\n" * 3
ALL_ON = FilterSettings(max_characters=1000, max_mean_line_characters=200)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("short", "too_short"),
        ("\n".join(f"{PROSE[:40]} {n}" for n in range(50)), "too_long"),
        (PROSE[:60] + "\0\1\2", "control_characters"),
        (PROSE[:60] + "\ufffd" * 10, "undecodable"),
        (PROSE[:40] + "\n" + "the same line\n" * 10, "repeated_lines"),
        ("a line of words without an end " * 10, "long_lines"),
        ("\n".join(f"{n * 7919} {n * 104729}" for n in range(20)), "few_letters"),
        (PROSE[:120], None),
        ("def f():\n\treturn '\x1b[0m'\n\f\nclass A:\r\n\tpass\n", None),
        ("Это было лучшее из времён, это было худшее из времён", None),
        ("這是最好的時代，這是最壞的時代，這是智慧的時代，這是愚蠢的時代。這是最好的時代", None),
    ],
)
def test_a_text_is_dropped_for_the_rule_it_breaks(text: str, reason: str | None) -> None:
    document = Document(text=text, source="a", position=0)
    kept, why = filter_document(document, ALL_ON)
    assert why == reason
    assert (kept is None) == (reason is not None)


def test_each_rule_can_be_switched_off() -> None:
    off = FilterSettings(
        min_characters=1,
        min_letter_fraction=None,
        max_control_fraction=None,
        max_replaced_fraction=None,
        max_repeated_line_fraction=None,
    )
    for text in ("x", "\0" * 50, "\ufffd" * 50, "1\n" * 50):
        assert rejection(measure(text), off) is None


def test_signals_are_what_they_say() -> None:
    signals = measure("ab1 \n\nab1 \ncd\0\ufffd")
    assert signals["characters"] == 15
    assert signals["letter_fraction"] == pytest.approx((2 + 2 + 2 + 3) / 17, abs=1e-6)
    assert signals["control_fraction"] == pytest.approx(1 / 17, abs=1e-6)
    assert signals["replaced_fraction"] == pytest.approx(3 / 17, abs=1e-6)
    assert signals["repeated_line_fraction"] == pytest.approx(1 / 3, abs=1e-6)
    assert signals["mean_line_characters"] == 5.0


def test_a_kept_document_carries_its_signals_and_keeps_its_place() -> None:
    document = Document(text=PROSE, source="a", position=7)
    kept, _ = filter_document(document, FilterSettings())
    assert kept is not None
    assert kept.signals == measure(PROSE)
    assert (kept.id, kept.source, kept.position) == (document.id, "a", 7)


@pytest.mark.parametrize(
    "wrong",
    [{"min_characters": 0}, {"max_characters": 5}, {"max_control_fraction": 1.5}, {"min_letter_fraction": -0.1}],
)
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(Refusal, match=next(iter(wrong))):
        FilterSettings(**wrong)  # type: ignore[arg-type]
