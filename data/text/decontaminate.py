"""Keeping the held-out documents out of training: the split itself, and training text that contains held-out text.

Near-duplicates of whole documents are dedup's work. Here: a training document that holds most of a (perhaps short)
held-out document, or is itself mostly a piece of one. Overlap is of 13-word runs, the length GPT-3's authors used
(Brown et al. 2020, appendix C), at a fixed sample of hashes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from conf.refusal import Refusal, field, refuse_below
from data.text.document import Document
from data.text.shingles import Hashes, word_ngrams

# A held-out document of fewer sampled runs (about 75 words) is a licence header or a stub: half the corpus may
# "contain" it.
MIN_RUNS_TO_CONTAIN = 16


@dataclass(frozen=True, kw_only=True)
class HeldOutSettings:
    """Which documents are kept for evaluation, and what of the rest is too close to them."""

    fraction: float = 0.05
    """Share of the documents, chosen by a hash of their content."""
    min_documents: int = 4
    """When chance holds out fewer, those with the lowest hashes are: this many, but at most a fifth (or one) of all."""
    ngram_words: int = 13
    """Words of the runs that training text is compared by."""
    max_overlap: float | None = 0.5
    """A training document is dropped when it covers this share of a held-out document's word runs, or they cover this
    share of its own; null switches the check off."""
    sample_one_in: int = 4
    """Share of word runs compared, chosen by hash."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise Refusal(
                "fraction",
                self.fraction,
                "must lie between 0 and 1, or there is nothing to evaluate on or to train on",
                f"set {field('fraction')}=0.01",
            )
        refuse_below(self, 1, "min_documents", "ngram_words", "sample_one_in")
        if self.max_overlap is not None and not 0 < self.max_overlap <= 1:
            raise Refusal(
                "max_overlap",
                self.max_overlap,
                "a share lies above 0 and up to 1",
                f"choose one, or set {field('max_overlap')}=null to switch the check off",
            )


def is_held_out(document_id: str, fraction: float) -> bool:
    """Decide by the document's content alone, so that it never moves between the splits as a corpus grows."""
    return int(document_id[:16], 16) < int(fraction * 2**64)


class HeldOutIndex:
    """Sampled word runs of the held-out documents, to ask how much a training document shares with any of them."""

    def __init__(self, hashes: Hashes, owners: NDArray[np.int64], settings: HeldOutSettings) -> None:
        order = np.lexsort((owners, hashes))
        self._hashes, self._owners, self.settings = hashes[order], owners[order], settings
        self._owner_sizes = np.bincount(owners) if owners.size else np.zeros(0, np.int64)

    @classmethod
    def build(cls, documents: Iterable[Document], settings: HeldOutSettings) -> HeldOutIndex:
        """Index the held-out documents, numbered in the order given."""
        hashes, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for owner, document in enumerate(documents):
            sampled = _sampled_ngrams(document.text, settings)
            hashes.append(sampled)
            owners.append(np.full(sampled.size, owner, np.int64))
        return cls(np.concatenate(hashes), np.concatenate(owners), settings)

    def to_array(self) -> NDArray[np.uint64]:
        """Return [2, entries] for np.save."""
        return np.stack([self._hashes, self._owners.astype(np.uint64)])

    @classmethod
    def from_array(cls, table: NDArray[np.uint64], settings: HeldOutSettings) -> HeldOutIndex:
        """Rebuild an index from `to_array`."""
        return cls(table[0], table[1].astype(np.int64), settings)

    def contaminates(self, text: str) -> str | None:
        """Return why training on `text` would leak held-out text (`contains_held_out`, `inside_held_out`), or None."""
        limit = self.settings.max_overlap
        if limit is None:
            return None
        sampled = _sampled_ngrams(text, self.settings)
        if sampled.size == 0 or self._hashes.size == 0:
            return None
        first = np.searchsorted(self._hashes, sampled, side="left")
        last = np.searchsorted(self._hashes, sampled, side="right")
        counts = last - first
        if np.count_nonzero(counts) >= limit * sampled.size:
            return "inside_held_out"
        matched = self._owners[
            np.repeat(first - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts) + np.arange(counts.sum())
        ]
        shared = np.bincount(matched, minlength=self._owner_sizes.size)
        covered = (shared >= limit * self._owner_sizes) & (self._owner_sizes >= MIN_RUNS_TO_CONTAIN)
        return "contains_held_out" if covered.any() else None


def _sampled_ngrams(text: str, settings: HeldOutSettings) -> Hashes:
    """The distinct word-run hashes of a text that fall into the sample."""
    hashes = np.unique(word_ngrams(text, settings.ngram_words))
    sampled: Hashes = hashes[hashes % np.uint64(settings.sample_one_in) == 0]
    return sampled
