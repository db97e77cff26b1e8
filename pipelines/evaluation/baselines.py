"""What a model must beat, on the same documents: token frequencies, gzip and xz.

Compressors see each document by itself, as the model does (it starts every document knowing nothing of the others), so
"bits per byte" is the same question to all of them.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable, Mapping, Sequence

import numpy as np

SMALLEST_LZMA_WINDOW, XZ_9_WINDOW = 1 << 12, 1 << 26


def gzip_bytes(text: bytes) -> int:
    """Size of `text` under zlib's level 9 in a gzip wrapper (18 bytes of it header and checksum)."""
    return len(gzip.compress(text, 9, mtime=0))


def xz_bytes(text: bytes) -> int:
    """Size of `text` under `xz -9`.

    The window is cut to the text's size. The result is as long, and there nine times sooner: preset 9 clears tables for
    64 MiB before every document.
    """
    window = max(SMALLEST_LZMA_WINDOW, 1 << (max(len(text), 1) - 1).bit_length())
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": min(window, XZ_9_WINDOW)}]
    return len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=filters))


COMPRESSORS: Mapping[str, Callable[[bytes], int]] = {"gzip": gzip_bytes, "xz": xz_bytes}


def token_counts(documents: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """How often each token occurs: int64 [vocab_size]."""
    counts_V = np.zeros(vocab_size, np.int64)
    for ids in documents:
        counts_V += np.bincount(np.asarray(ids, np.int64), minlength=vocab_size)
    return counts_V


def unigram_nats(counts_V: np.ndarray, documents: Sequence[Sequence[int]], *, added: int) -> list[float]:
    """-ln p of each document when every token is drawn from `counts_V + added`, whatever came before.

    `added=1` with training counts is the baseline; `added=0` with the documents' own counts is the best any unigram
    model over these tokens could do.
    """
    counts_V = counts_V + added
    with np.errstate(divide="ignore"):  # a token that never occurs is never looked up either
        losses_V = np.log(counts_V.sum()) - np.log(counts_V)
    return [float(losses_V[np.asarray(ids, np.int64)].sum()) for ids in documents]
