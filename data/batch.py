"""The batch: a dict whose keys are the model's `forward` keywords."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data.order import mixed
from data.tasks.objectives import Examples

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Dtype, and the axes by their letters: B rows, T tokens."""

    dtype: torch.dtype
    axes: str


BATCH_SPEC = {
    "tokens_BT": TensorSpec(dtype=torch.int64, axes="BT"),
    "targets_BT": TensorSpec(dtype=torch.int64, axes="BT"),  # -100: ignored
    "documents_BT": TensorSpec(dtype=torch.int32, axes="BT"),  # 0: padding; 1, 2, …: the row's documents
    "positions_BT": TensorSpec(dtype=torch.int64, axes="BT"),  # from 0 within each document
}
ENCODER_SPEC = {
    "encoder_tokens_BT": TensorSpec(dtype=torch.int64, axes="BT"),
    "encoder_documents_BT": TensorSpec(dtype=torch.int32, axes="BT"),
}
"""What a batch for an encoder-decoder holds besides; their T is the encoder's own."""


def collate(examples: Examples, start: int = 0, stop: int | None = None) -> Batch:
    """Rows start..stop as tensors that share the arrays' memory."""
    arrays: tuple[npt.NDArray[Any], ...] = (
        examples.tokens_RT,
        examples.targets_RT,
        examples.documents_RT,
        examples.positions_RT,
    )
    batch = {name: torch.from_numpy(array[start:stop]) for name, array in zip(BATCH_SPEC, arrays, strict=True)}
    if examples.encoder is not None:
        encoder: tuple[npt.NDArray[Any], ...] = (examples.encoder.tokens_RS, examples.encoder.documents_RS)
        batch |= {name: torch.from_numpy(array[start:stop]) for name, array in zip(ENCODER_SPEC, encoder, strict=True)}
    return batch


def row_hashes(examples: Examples, global_rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """One 64-bit hash per row over its tokens, targets, positions (hence documents), encoder's tokens and global row.

    Multilinear hashing (Carter & Wegman, 1979; 64-bit arithmetic as in Lemire & Kaser, 2014): a dot product with fixed
    pseudo-random keys, about a nanosecond per token.
    """
    keys_3T = _hash_keys(examples.tokens_RT.shape[1])
    # einsum has a vectorized loop for integers, matmul has none.
    sums = np.einsum("RT,T->R", examples.tokens_RT, keys_3T[0])
    sums += np.einsum("RT,T->R", examples.targets_RT, keys_3T[1])
    sums += np.einsum("RT,T->R", examples.positions_RT, keys_3T[2])
    if examples.encoder is not None:
        sums += np.einsum("RS,S->R", examples.encoder.tokens_RS, _hash_keys(examples.encoder.tokens_RS.shape[1])[0])
    return mixed(sums.view(np.uint64) ^ mixed(global_rows.astype(np.uint64)))


@lru_cache(maxsize=4)
def _hash_keys(seq_len: int) -> npt.NDArray[np.int64]:
    return mixed(np.arange(3 * seq_len, dtype=np.uint64)).view(np.int64).reshape(3, seq_len)


def hash_sum(hashes: npt.NDArray[np.uint64]) -> int:
    """The sum modulo 2**64 as a signed 64-bit number, which ranks can add up as an int64 tensor (it wraps)."""
    return int(hashes.sum(dtype=np.uint64).astype(np.int64))


def combine_digest(hashes: npt.NDArray[np.uint64] | list[int]) -> str:
    """16 hex digits for a set of row hashes; the same however ranks share the rows.

    A sum modulo 2**64: each hash already holds its row's global position, so their order does not matter. Ranks may
    hand in all their hashes, or an all-reduced sum of `hash_sum`.
    """
    return f"{sum(int(h) for h in hashes) % 2**64:016x}"
