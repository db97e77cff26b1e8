"""Which row of which source stands at a global position: arithmetic, with no state and no tables over the data.

Every epoch of a source shuffles its blocks with a keyed permutation, then the rows inside each window of consecutive
blocks with another. Any position is found by itself, so a run may start anywhere, at any world size.

The permutation is a Feistel network over Z_a x Z_b with cycle walking (Black & Rogaway, "Ciphers with Arbitrary Finite
Domains", 2002).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from conf.refusal import NO_VALUE, Refusal, field, refuse_below
from data.mixture import Mixture, MixtureSettings

ROUNDS = 6
ORDER_VERSION = 1  # raised when the same settings come to mean another order

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class OrderSettings:
    """The shuffle: rows are drawn from `window_blocks` blocks at a time. More mix better, fewer read more locally."""

    seed: int = 0
    """Seed of the shuffle."""
    window_blocks: int = 256
    """Blocks whose rows are shuffled together; more mix better, fewer read more locally."""

    def __post_init__(self) -> None:
        refuse_below(self, 1, "window_blocks")
        if not 0 <= self.seed < 2**63:
            raise Refusal("seed", self.seed, "must lie between 0 and 2**63 - 1", f"set {field('seed')}=0")


@dataclass(frozen=True, kw_only=True)
class SourceShape:
    """How many rows a source has, and in blocks of how many they are shuffled."""

    rows: int
    rows_per_block: int


@dataclass(frozen=True, kw_only=True)
class Located:
    """Where global rows are: number of the source, how often it was used up before, and the row in it."""

    source: npt.NDArray[np.int64]
    epoch: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]


class Order:
    """The function from global rows to rows of sources, the same in every process that builds it."""

    def __init__(
        self,
        sources: Mapping[str, SourceShape],
        *,
        seq_len: int,
        settings: OrderSettings | None = None,
        mixture: MixtureSettings | None = None,
    ) -> None:
        """Raises Refusal for a source without rows or a weight for a source that does not exist."""
        for name, shape in sources.items():
            if shape.rows < 1:
                raise Refusal(f"source {name}", NO_VALUE, "has no rows", "leave it out, or give it text")
        self.names = list(sources)
        self.settings = settings or OrderSettings()
        mixture = mixture or MixtureSettings()
        self.mixture = Mixture(mixture, {name: shape.rows for name, shape in sources.items()}, seq_len=seq_len)
        self._shapes = list(sources.values())
        # The key hangs on the source's name, so that adding a source does not reshuffle the others.
        self._keys = [_key(self.settings.seed, name) for name in self.names]
        identity = {
            "version": ORDER_VERSION,
            "settings": asdict(self.settings),
            "mixture": asdict(mixture),
            "sources": [[name, asdict(shape)] for name, shape in sources.items()],
            "seq_len": seq_len,
        }
        self.digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def locate(self, global_rows: npt.NDArray[np.int64]) -> Located:
        """Where these rows of the run lie. Any rows in any order; half a millisecond, then 0.4 µs a row."""
        source, nth = self.mixture.locate(np.asarray(global_rows, dtype=np.int64))
        epoch, row = np.empty_like(nth), np.empty_like(nth)
        for s in np.unique(source):
            here = source == s
            shape = self._shapes[s]
            epoch[here], position = np.divmod(nth[here], shape.rows)
            row[here] = _shuffled(
                position.astype(np.uint64),
                mixed(np.uint64(self._keys[s]) ^ mixed(epoch[here].astype(np.uint64))),
                shape,
                self.settings.window_blocks,
            )
        return Located(source=source, epoch=epoch, row=row)


def _shuffled(position: Words, key: Words, shape: SourceShape, window_blocks: int) -> Words:
    """The row at each position of an epoch with this key. All blocks but the last are full."""
    per_block, window = np.uint64(shape.rows_per_block), np.uint64(window_blocks)
    blocks = np.uint64(-(-shape.rows // shape.rows_per_block))
    lacking = blocks * per_block - np.uint64(shape.rows)  # rows the last block is short of a full one
    # Shuffled blocks lie in slots; the short block shifts every slot behind its own.
    short_slot = permute(np.full_like(position, blocks - np.uint64(1)), blocks, key, inverse=True)

    def rows_before(slot: Words) -> Words:
        return slot * per_block - np.where(slot > short_slot, lacking, np.uint64(0))

    def slot_of(row: Words) -> Words:
        return np.where(row >= rows_before(short_slot + np.uint64(1)), row + lacking, row) // per_block

    number = slot_of(position) // window
    first = rows_before(number * window)
    size = rows_before(np.minimum((number + np.uint64(1)) * window, blocks)) - first
    within = first + permute(position - first, size, mixed(key + number + np.uint64(1)))
    slot = slot_of(within)
    return permute(slot, blocks, key) * per_block + within - rows_before(slot)


def permute(index: Words, size: Words | np.uint64, key: Words, *, inverse: bool = False) -> Words:
    """A keyed bijection of 0 … size - 1, elementwise; `size` may differ from element to element."""
    size = np.broadcast_to(np.asarray(size, dtype=np.uint64), index.shape)
    a = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    b = -(-size.astype(np.int64) // a.astype(np.int64))
    out = _feistel(index, a, b.astype(np.uint64), key, inverse)
    # a * b exceeds size by less than a: few walk, and the walk comes back because the network is a bijection.
    while (outside := out >= size).any():
        out[outside] = _feistel(out[outside], a[outside], b.astype(np.uint64)[outside], key[outside], inverse)
    return out


def _feistel(index: Words, a: Words, b: Words, key: Words, inverse: bool) -> Words:
    left, right = index // b, index % b
    for i in reversed(range(ROUNDS)) if inverse else range(ROUNDS):
        round_key = mixed(key + np.uint64(i + 1))
        if i % 2 == 0:
            shift = mixed(right ^ round_key) % a
            left = (left + (a - shift if inverse else shift)) % a
        else:
            shift = mixed(left ^ round_key) % b
            right = (right + (b - shift if inverse else shift)) % b
    return left * b + right


def mixed(word: Words) -> Words:
    """splitmix64's finalizer (Steele, Lea & Flood, 2014): every input bit reaches every output bit."""
    word = word + np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
