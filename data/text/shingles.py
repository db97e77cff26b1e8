"""Hashes of a text's word (or character) n-grams, whole texts at a time in numpy.

A polynomial hash over code points has prefix sums, so the hash of every word, and then of every n-gram of words, is a
difference of two of them: no Python loop over words.

Texts are compared as a reader sees them: compatibility forms, case, quotes, dashes, kinds of space and invisible
characters make no difference (NFKC and case folding, Unicode Standard Annex 15; what is no letter separates words). A
character of a script that puts no spaces between words is a word of its own, with the marks on it.
"""

from __future__ import annotations

import functools
import re
import unicodedata

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so it has an inverse modulo 2**64
BASE_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))
NGRAM_BASE = 0xBF58476D1CE4E5B9
POWERS_BLOCK = 1 << 16

# Classes of code points. A mark of an unspaced script stays with the character before it.
SEPARATOR, LETTER, UNSPACED, UNSPACED_MARK, INVISIBLE = range(5)
LAST_ASSIGNED = 0x323B0  # Han extension H; private use and tags beyond it are no letters
UNSPACED_SCRIPTS = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai, Lao; Myanmar; Khmer
    *((0x1950, 0x19DF), (0x1A20, 0x1AAF), (0x1B00, 0x1B7F)),  # Tai Le, New Tai Lue; Tai Tham; Balinese
    *((0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x312F), (0x31A0, 0x31FF)),  # radicals; kana, bopomofo
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA000, 0xA48F), (0xF900, 0xFAFF)),  # Han; Yi
    *((0xA980, 0xA9FF), (0xAA60, 0xAADF), (0x17000, 0x18CFF), (0x1B000, 0x1B2FF), (0x20000, LAST_ASSIGNED - 1)),
)
APOSTROPHE_LETTER = 0x02BC  # `don\u02bct` is `don't`
VARIATION_SELECTORS = (0xFE00, 0xFE0F)
BEYOND_ASCII = re.compile("[^\0-\x7f]+")
MOSTLY_LATIN = 0.1
MARKS_IN_A_ROW = 30  # as in Unicode's stream-safe text; Python's normalization takes time quadratic in them


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
    """Return one hash per run of `n` consecutive words, case folded, punctuation ignored; in order, repeats kept.

    A text of fewer than `n` words, but at least one, gives a single hash of all of them.
    """
    points, kinds = _folded(text)
    inside = np.concatenate([[False], kinds != SEPARATOR, [False]])
    before = np.concatenate([[np.uint8(SEPARATOR)], kinds[:-1]])
    alone = (kinds == UNSPACED) | ((kinds == LETTER) & (before >= UNSPACED))
    begins = inside[1:-1] & (~inside[:-2] | alone)
    starts = np.flatnonzero(begins)
    if starts.size == 0:
        return np.zeros(0, np.uint64)
    ends = np.flatnonzero(inside[:-1] & (~inside[1:] | np.append(begins, True)))
    prefix = np.zeros(points.size + 1, np.uint64)
    np.cumsum(points * _power_table(_FORWARD, BASE, points.size), out=prefix[1:])
    words = (prefix[ends] - prefix[starts]) * _power_table(_BACKWARD, BASE_INVERSE, points.size)[starts]
    return _combine(mix(words), min(n, words.size))


def character_ngrams(text: str, n: int) -> Hashes:
    """Return one hash per run of `n` consecutive characters of words, case folded; spaces and punctuation ignored."""
    points, kinds = _folded(text)
    letters = points[kinds != SEPARATOR]
    return _combine(mix(letters + BASE), min(n, letters.size)) if letters.size else np.zeros(0, np.uint64)


def _folded(text: str) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """The code points of a text as it is compared, and the class of each; invisible ones are left out."""
    if text.isascii():
        raw = np.frombuffer(text.lower().encode("ascii"), dtype=np.uint8)
        return raw.astype(np.uint64), _kinds()[raw]
    points = _code_points(_normalized(_limit_marks(text).casefold()))
    kinds = _kinds()[np.minimum(points, LAST_ASSIGNED)]
    visible = kinds != INVISIBLE
    return points[visible].astype(np.uint64), kinds[visible]


def _normalized(text: str) -> str:
    """NFKC and case folding, of a case-folded text.

    Normalization treats each stretch beyond ASCII, with the character before it, by itself. In the Latin script those are
    few and repeat: normalizing them alone, cached, takes a third of the time.
    """
    if len(text.encode("utf-8", "surrogatepass")) - len(text) > MOSTLY_LATIN * len(text):
        return _normal_word.__wrapped__(text)
    parts, done = [], 0
    for found in BEYOND_ASCII.finditer(text):
        start = max(found.start() - 1, 0)
        parts += [text[done:start], _normal_word(text[start : found.end()])]
        done = found.end()
    return "".join([*parts, text[done:]])


@functools.lru_cache(maxsize=1 << 12)
def _normal_word(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _limit_marks(text: str) -> str:
    """The text with at most MARKS_IN_A_ROW combining marks on a character."""
    points = _code_points(text)
    is_mark = _is_mark()[np.minimum(points, LAST_ASSIGNED)]
    if np.count_nonzero(is_mark) <= MARKS_IN_A_ROW:
        return text
    place = np.arange(points.size)
    kept = place - np.maximum.accumulate(np.where(is_mark, -1, place)) <= MARKS_IN_A_ROW
    return text if kept.all() else points[kept].tobytes().decode("utf-32-le", "surrogatepass")


@functools.lru_cache(maxsize=1)
def _kinds() -> NDArray[np.uint8]:
    """The class of each code point up to LAST_ASSIGNED, and of any beyond it."""
    categories = [unicodedata.category(chr(point)) for point in range(LAST_ASSIGNED)]
    is_mark = np.array([category[0] == "M" for category in categories])
    table = np.where(np.array([category[0] in "LNM" for category in categories]), LETTER, SEPARATOR).astype(np.uint8)
    for first, last in UNSPACED_SCRIPTS:
        part = slice(first, last + 1)
        table[part] = np.where(is_mark[part], UNSPACED_MARK, np.where(table[part] == LETTER, UNSPACED, SEPARATOR))
    table[np.array([category == "Cf" for category in categories])] = INVISIBLE
    table[VARIATION_SELECTORS[0] : VARIATION_SELECTORS[1] + 1] = INVISIBLE
    table[APOSTROPHE_LETTER] = SEPARATOR
    table[ord("_")] = LETTER
    return np.append(table, np.uint8(SEPARATOR))


@functools.lru_cache(maxsize=1)
def _is_mark() -> NDArray[np.bool_]:
    """Which code points normalization reorders: those with a combining class."""
    return np.array([unicodedata.combining(chr(point)) != 0 for point in range(LAST_ASSIGNED)] + [False])


def _combine(units: Hashes, n: int) -> Hashes:
    """Hash each run of `n` consecutive units."""
    count = units.size - n + 1
    total = np.zeros(count, np.uint64)
    factor = 1
    for offset in range(n):
        total += units[offset : offset + count] * np.uint64(factor)
        factor = (factor * NGRAM_BASE) % (1 << 64)
    return mix(total)
