"""Hashes of a text's word (or character) n-grams, whole texts at a time in numpy.

A polynomial hash over bytes has prefix sums, so the hash of every word, and then of every n-gram of words, is a
difference of two of them: no Python loop over words.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so it has an inverse modulo 2**64
BASE_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))
NGRAM_BASE = 0xBF58476D1CE4E5B9
POWERS_BLOCK = 1 << 16

# One table does lower-casing and the decision what is part of a word: 0 separates words. Bytes beyond ASCII belong to
# words.
WORD_BYTE = np.zeros(256, dtype=np.uint64)
for _code in range(256):
    if _code >= 0x80 or chr(_code).isalnum() or _code == ord("_"):
        WORD_BYTE[_code] = ord(chr(_code).lower()) if _code < 0x80 else _code


def mix(hashes: Hashes) -> Hashes:
    """Scramble 64-bit values so that every output bit depends on every input bit (splitmix64, Steele et al. 2014)."""
    x = hashes.copy()
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _powers(base: np.uint64, count: int) -> Hashes:
    return np.concatenate([np.ones(1, np.uint64), np.multiply.accumulate(np.full(max(count - 1, 0), base, np.uint64))])[
        :count
    ]


_FORWARD = _powers(BASE, POWERS_BLOCK + 1)
_BACKWARD = _powers(BASE_INVERSE, POWERS_BLOCK + 1)


def _power_table(table: Hashes, base: np.uint64, count: int) -> Hashes:
    """Powers 0..count-1 of `base`; the module's table where it is long enough."""
    return table[:count] if count <= table.size else _powers(base, count)


def word_ngrams(text: str, n: int) -> Hashes:
    """Return one hash per run of `n` consecutive words, lower-cased, punctuation ignored; in order, repeats kept.

    A text of fewer than `n` words, but at least one, gives a single hash of all of them.
    """
    raw = WORD_BYTE[np.frombuffer(text.encode("utf-8"), dtype=np.uint8)]
    inside = np.concatenate([[False], raw != 0, [False]])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[0::2], edges[1::2]
    if starts.size == 0:
        return np.zeros(0, np.uint64)
    prefix = np.zeros(raw.size + 1, np.uint64)
    np.cumsum(raw * _power_table(_FORWARD, BASE, raw.size), out=prefix[1:])
    words = (prefix[ends] - prefix[starts]) * _power_table(_BACKWARD, BASE_INVERSE, raw.size)[starts]
    return _combine(mix(words), min(n, words.size))


def character_ngrams(text: str, n: int) -> Hashes:
    """Return one hash per run of `n` consecutive characters, for scripts that do not separate words; spaces ignored."""
    points = np.frombuffer("".join(text.lower().split()).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    return _combine(mix(points + BASE), min(n, points.size)) if points.size else np.zeros(0, np.uint64)


def _combine(units: Hashes, n: int) -> Hashes:
    """Hash each run of `n` consecutive units."""
    count = units.size - n + 1
    total = np.zeros(count, np.uint64)
    factor = 1
    for offset in range(n):
        total += units[offset : offset + count] * np.uint64(factor)
        factor = (factor * NGRAM_BASE) % (1 << 64)
    return mix(total)
