"""Which documents are worth learning from. Each rule has a name, and each dropped document is counted under one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from conf.refusal import Refusal, field
from data.text.document import Document

# Bytes that count as letters: a-z, A-Z, and every byte of a character beyond ASCII.
IS_LETTER = np.zeros(256, dtype=bool)
IS_LETTER[[*range(ord("a"), ord("z") + 1), *range(ord("A"), ord("Z") + 1), *range(0x80, 0x100)]] = True
IS_CONTROL = np.zeros(256, dtype=bool)
IS_CONTROL[[code for code in range(0x20) if code not in b"\t\n\r\f\x1b"]] = True


@dataclass(frozen=True, kw_only=True)
class FilterSettings:
    """Limits on a document; null switches a rule off. Fractions are of the text's UTF-8 bytes, or of its lines."""

    min_characters: int = 32
    """Characters that a document has at least."""
    max_characters: int | None = None
    """Characters that a document has at most."""
    min_letter_fraction: float | None = 0.2
    """Drops tables of numbers and encoded binaries."""
    max_control_fraction: float | None = 0.001
    """Control characters other than tab, newlines, form feed and escape: the mark of a binary file."""
    max_replaced_fraction: float | None = 0.02
    """U+FFFD, mostly put there for invalid bytes: the mark of another encoding."""
    max_repeated_line_fraction: float | None = 0.7
    """Lines equal to an earlier line of the document, blank lines left out."""
    max_mean_line_characters: float | None = None
    """Minified code and data have very long lines; so has prose kept one paragraph to a line. Off by default."""

    def __post_init__(self) -> None:
        for name in (
            "min_letter_fraction",
            "max_control_fraction",
            "max_replaced_fraction",
            "max_repeated_line_fraction",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise Refusal(
                    name, value, "a fraction lies between 0 and 1", f"set {field(name)}=null to switch the rule off"
                )
        if self.min_characters < 1:
            raise Refusal(
                "min_characters",
                self.min_characters,
                "must be at least 1, since empty text teaches nothing",
                f"set {field('min_characters')}=1 to keep every other text",
            )
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise Refusal(
                "max_characters",
                self.max_characters,
                f"below {field('min_characters')} = {self.min_characters}, so nothing would pass",
                f"set {field('max_characters')}=null to keep long texts",
            )


def measure(text: str) -> dict[str, float]:
    """Return the signals of a text: its length, its fractions and its mean line length."""
    raw = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    lines = [line for line in text.split("\n") if line.strip()]
    size = max(raw.size, 1)
    return {
        "characters": float(len(text)),
        "letter_fraction": round(float(np.count_nonzero(IS_LETTER[raw])) / size, 6),
        "control_fraction": round(float(np.count_nonzero(IS_CONTROL[raw])) / size, 6),
        "replaced_fraction": round(3 * text.count("\ufffd") / size, 6),
        "repeated_line_fraction": round(1 - len(set(lines)) / max(len(lines), 1), 6) if lines else 0.0,
        "mean_line_characters": round(len(text) / max(len(lines), 1), 3),
    }


def rejection(signals: dict[str, float], settings: FilterSettings) -> str | None:
    """Return the name of the first rule a text with these signals breaks, or None when it may stay."""
    if signals["characters"] == 0:
        return "empty"
    if signals["characters"] < settings.min_characters:
        return "too_short"
    limits = (
        ("too_long", "characters", settings.max_characters),
        ("control_characters", "control_fraction", settings.max_control_fraction),
        ("undecodable", "replaced_fraction", settings.max_replaced_fraction),
        ("repeated_lines", "repeated_line_fraction", settings.max_repeated_line_fraction),
        ("long_lines", "mean_line_characters", settings.max_mean_line_characters),
    )
    for reason, signal, limit in limits:
        if limit is not None and signals[signal] > limit:
            return reason
    if settings.min_letter_fraction is not None and signals["letter_fraction"] < settings.min_letter_fraction:
        return "few_letters"
    return None


def filter_document(document: Document, settings: FilterSettings) -> tuple[Document | None, str | None]:
    """Return (the document with its signals, None) or (None, the reason it was dropped)."""
    signals = measure(document.text)
    reason = rejection(signals, settings)
    return (replace(document, signals=signals), None) if reason is None else (None, reason)
