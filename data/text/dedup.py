"""Exact and near duplicates: MinHash signatures, candidates by bands, every candidate checked on its whole signature.

Broder 1997 (MinHash); Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3 (banding). Memory is one
band of hashes and a few pairs at a time; signatures may be memory-mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from conf.refusal import Refusal, field, refuse_below
from data.text.shingles import Hashes, character_ngrams, mix, word_ngrams

Signatures = NDArray[np.uint32]
Pairs = NDArray[np.int64]

SHINGLES_PER_PASS = 4096  # 128 permutations x 4096 shingles x 4 bytes stay in a core's cache
NO_TEXT = np.uint32(0xFFFFFFFF)
NEIGHBOURS = 8
COMPARED_PER_PASS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class DedupSettings:
    """When two documents count as the same. Exact copies always do."""

    near_duplicates: bool = True
    """Drop near copies too; false drops exact ones only."""
    threshold: float = 0.8
    """Estimated Jaccard similarity of shingle sets from which a document is dropped (standard error about 0.035)."""
    shingle: Literal["words", "characters"] = "words"
    """What a run is counted in. In a script without spaces between words each character is a word, too."""
    shingle_size: int = 5
    """Words or characters of a run."""
    permutations: int = 128
    """Hash functions of a signature; more estimate similarity closer and cost more time."""
    bands: int = 32
    """More bands find less similar candidates and cost more time; permutations / bands rows must agree in one band."""
    seed: int = 1
    """Seed of the hash functions."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise Refusal(
                "threshold", self.threshold, "a similarity lies above 0 and up to 1", f"set {field('threshold')}=0.8"
            )
        refuse_below(self, 1, "shingle_size", "permutations", "bands")
        if self.permutations % self.bands:
            raise Refusal(
                "permutations",
                self.permutations,
                f"must be a multiple of {field('bands')} = {self.bands}",
                f"set {field('permutations')}={-(-self.permutations // self.bands) * self.bands}",
            )


class MinHash:
    """Turns texts into signatures of `permutations` 32-bit minima."""

    def __init__(self, settings: DedupSettings) -> None:
        self.settings = settings
        # 32-bit xor and multiply are no perfect permutations; against 64-bit ones the estimate moved by 0.003 of its
        # 0.038 spread, at two to four times the speed.
        draws = mix(
            np.arange(1, 2 * settings.permutations + 1, dtype=np.uint64) + (np.uint64(settings.seed) << np.uint64(32))
        )
        self._masks, self._factors = (draws >> np.uint64(32)).astype(np.uint32).reshape(2, settings.permutations, 1)
        self._factors |= np.uint32(1)

    def signature(self, text: str) -> Signatures:
        """Return uint32 [permutations]. A text without a single word gets all ones, which matches nothing."""
        ngrams = word_ngrams if self.settings.shingle == "words" else character_ngrams
        shingles = (ngrams(text, self.settings.shingle_size) >> np.uint64(32)).astype(np.uint32)
        minima = np.full(self.settings.permutations, NO_TEXT, np.uint32)
        hashed = np.empty((minima.size, min(SHINGLES_PER_PASS, shingles.size)), np.uint32)
        for start in range(0, shingles.size, SHINGLES_PER_PASS):
            part = shingles[start : start + SHINGLES_PER_PASS]
            block = hashed[:, : part.size]
            np.bitwise_xor(part, self._masks, out=block)
            np.multiply(block, self._factors, out=block)
            np.minimum(minima, block.min(axis=1), out=minima)
        return minima


def near_duplicate_pairs(signatures: Sequence[Signatures], settings: DedupSettings) -> Pairs:
    """Return int64 [pairs, 2]: document numbers (earlier, later) at least `threshold` similar, by (later, earlier).

    `signatures` are the shards' arrays [documents, permutations] in order; documents are numbered through them.
    Candidates share a band; within a crowd of equal bands each document meets its nearest `NEIGHBOURS` on either side
    and the crowd's first.
    """
    table = _SignatureTable(signatures)
    rows = settings.permutations // settings.bands
    seen: Hashes = np.zeros(0, np.uint64)
    accepted = []
    for band in range(settings.bands):
        hashes = table.band(band * rows, rows)
        candidates = _equal_neighbours(hashes, table.has_text)
        keys = candidates[:, 0].astype(np.uint64) << np.uint64(32) | candidates[:, 1].astype(np.uint64)
        keys = np.setdiff1d(keys, seen)
        similar = table.similarity(keys) >= settings.threshold
        accepted.append(keys[similar])
        # Remembering the refused ones as well would save little: they seldom meet in a second band.
        seen = np.union1d(seen, keys[similar])
    keys = np.unique(np.concatenate([np.zeros(0, np.uint64), *accepted]))
    pairs = np.stack([keys >> np.uint64(32), keys & np.uint64(0xFFFFFFFF)], axis=1).astype(np.int64)
    return pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]


def duplicates_to_drop(pairs: Pairs, rank: NDArray[np.int64]) -> dict[int, int]:
    """Return {dropped document: the kept document it resembles}; the lower `rank` of two stays.

    Greedy in order of rank, so a document goes only if something similar to it stays: chains do not swallow their ends.
    """
    earlier = np.where(rank[pairs[:, 0]] < rank[pairs[:, 1]], pairs[:, 0], pairs[:, 1])
    later = pairs.sum(axis=1) - earlier
    dropped: dict[int, int] = {}
    for index in np.lexsort((rank[earlier], rank[later])):
        kept, copy = int(earlier[index]), int(later[index])
        if kept not in dropped and copy not in dropped:
            dropped[copy] = kept
    return dropped


def _equal_neighbours(hashes: Hashes, has_text: NDArray[np.bool_]) -> Pairs:
    """Return [candidates, 2] of document numbers (smaller, larger) whose band hashes are equal."""
    documents = np.flatnonzero(has_text)
    order = documents[np.argsort(hashes[documents], kind="stable")]
    ordered = hashes[order]
    found = []
    for distance in range(1, NEIGHBOURS + 1):
        equal = np.flatnonzero(ordered[distance:] == ordered[:-distance])
        if equal.size == 0:
            break
        found.append(np.stack([order[equal], order[equal + distance]], axis=1))
    if found:
        group_starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        first = order[np.repeat(group_starts, np.diff(np.append(group_starts, order.size)))]
        found.append(np.stack([first, order], axis=1)[first != order])
    return np.sort(np.concatenate([np.zeros((0, 2), np.int64), *found]), axis=1)


class _SignatureTable:
    """The shards' signature arrays seen as one table, without copying them together."""

    def __init__(self, shards: Sequence[Signatures]) -> None:
        self._shards = [shard for shard in shards if shard.shape[0]]
        self._starts = np.cumsum([0, *(shard.shape[0] for shard in self._shards)])
        self.has_text = np.concatenate(
            [np.zeros(0, bool), *(np.any(shard != NO_TEXT, axis=1) for shard in self._shards)]
        )

    def band(self, first: int, rows: int) -> Hashes:
        """Return one uint64 per document: a hash of columns first .. first + rows."""
        parts = []
        for shard in self._shards:
            combined = np.zeros(shard.shape[0], np.uint64)
            for column in range(first, first + rows):
                combined = mix(combined + shard[:, column].astype(np.uint64) + np.uint64(column + 1))
            parts.append(combined)
        return np.concatenate([np.zeros(0, np.uint64), *parts])

    def similarity(self, keys: Hashes) -> NDArray[np.float64]:
        """Return the share of equal signature entries for each key = smaller << 32 | larger."""
        result = np.zeros(keys.size)
        for start in range(0, keys.size, COMPARED_PER_PASS):
            part = keys[start : start + COMPARED_PER_PASS]
            left = self._rows((part >> np.uint64(32)).astype(np.int64))
            right = self._rows((part & np.uint64(0xFFFFFFFF)).astype(np.int64))
            result[start : start + part.size] = (left == right).mean(axis=1)
        return result

    def _rows(self, documents: NDArray[np.int64]) -> Signatures:
        shard_of = np.searchsorted(self._starts, documents, side="right") - 1
        gathered = np.empty((documents.size, self._shards[0].shape[1]), np.uint32)
        for shard in np.unique(shard_of):
            here = shard_of == shard
            gathered[here] = self._shards[shard][documents[here] - self._starts[shard]]
        return gathered
