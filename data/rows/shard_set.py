"""Read access to a finished set of shards: any rows, in any order, checked before their first use.

A block's sha256 is compared once per process, when its first row is asked for: a resumed run starts at once instead of
reading whole shards, and no row is trained on before its block was checked.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from conf.refusal import NO_VALUE, Refusal
from data.rows.packing import PackedRows
from data.rows.shards import FORMAT_VERSION, MANIFEST, file_sha256

OPEN_SHARDS = 256  # memory maps held at once: each costs a file descriptor
READY_BLOCKS = 4096  # blocks whose arrays are kept as views; a window of the default order has 256


@dataclass(eq=False)
class ShardSet:
    """Read access to all rows under one `shards.json`. Threads may share it."""

    directory: Path
    manifest: dict[str, Any]
    digest: str
    _row_ends: npt.NDArray[np.int64]
    _open: OrderedDict[int, _OpenShard] = field(default_factory=OrderedDict)
    _blocks: OrderedDict[tuple[int, int], Block] = field(default_factory=OrderedDict)
    _verified: set[tuple[int, int]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, directory: Path | str, *, verify: bool = False) -> ShardSet:
        """Open the shards of a folder. `verify` reads every byte now; otherwise each block is checked on first touch.

        Raises Refusal where the manifest is absent or of another version, or a file is missing, cut or corrupted.
        """
        directory = Path(directory)
        path = directory / MANIFEST
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise Refusal(
                directory,
                NO_VALUE,
                f"holds no {MANIFEST}, so it is not a finished set of shards",
                "point to the folder that the shards step wrote, or run that step",
            ) from None
        try:
            manifest = json.loads(content)
        except ValueError as error:
            rule = f"is not readable ({error}): it was cut or changed"
            raise Refusal(path, NO_VALUE, rule, "write the shards again") from None
        if manifest.get("version") != FORMAT_VERSION:
            rule = f"has format version {manifest.get('version')}, and this program reads version {FORMAT_VERSION}"
            raise Refusal(path, NO_VALUE, rule, "write the shards again")
        ends = np.cumsum([shard["rows"] for shard in manifest["shards"]], dtype=np.int64)
        shards = cls(directory, manifest, hashlib.sha256(content).hexdigest(), ends)
        for record in manifest["shards"]:
            for kind, expected in record["files"].items():
                _check_file(shards.path_of(record, kind), expected, read=verify)
        return shards

    @property
    def rows(self) -> int:
        """Packed rows in all shards."""
        return int(self.manifest["totals"]["rows"])

    @property
    def seq_len(self) -> int:
        """Tokens of a row."""
        return int(self.manifest["seq_len"])

    @property
    def rows_per_block(self) -> int:
        """Rows of one tar member."""
        return int(self.manifest["rows_per_block"])

    @property
    def vocab_size(self) -> int:
        """Pieces of the tokenizer that made the tokens."""
        return int(self.manifest["vocab_size"])

    @property
    def masked(self) -> bool:
        """Whether rows say which of their tokens are learned from (fine-tuning)."""
        return bool(self.manifest["masked"])

    def path_of(self, record: dict[str, Any], kind: str) -> Path:
        """Path of a shard's `tar`, `idx` or `docs.parquet`."""
        return self.directory / record["folder"] / f"{record['name']}.{kind}"

    def where(self, row: int) -> tuple[int, int, int]:
        """Shard number, block in the shard, and row in the block, of a row numbered through all shards."""
        shard, block, in_block = self.places(np.array([row]))
        return int(shard[0]), int(block[0]), int(in_block[0])

    def places(self, rows: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.integer], ...]:
        """`where` for many rows: their shards, blocks and rows in the blocks."""
        shard = np.searchsorted(self._row_ends, rows, side="right")
        in_shard = rows - np.concatenate([[0], self._row_ends])[shard]
        return shard, in_shard // self.rows_per_block, in_shard % self.rows_per_block

    def gather(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> PackedRows:
        """Copy out the given rows, in the given order. Raises Refusal where a block does not match its checksum."""
        return gather([self], np.zeros(len(rows), dtype=np.int64), np.asarray(rows))

    def target_counts(self) -> npt.NDArray[np.int64]:
        """How often each token id is a target, over all rows: the unigram model of what is trained on."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for start in range(0, self.rows, self.rows_per_block):
            rows = self.gather(np.arange(start, min(start + self.rows_per_block, self.rows)))
            valid_RT = rows.valid_targets(rows.document_numbers())
            counts += np.bincount(rows.tokens_RW[:, 1:][valid_RT], minlength=self.vocab_size)
        return counts

    def documents(self, shard: int) -> pa.Table:
        """The table of one shard's documents; `pieces_P4` numbers its records."""
        return pq.read_table(self.path_of(self.manifest["shards"][shard], "docs.parquet"))

    def block(self, shard: int, number: int) -> Block:
        """Views of one block's arrays, checked against its checksum the first time."""
        return self._blocks.get((shard, number)) or self._ready_block(shard, number)

    def _ready_block(self, shard: int, number: int) -> Block:
        with self._lock:
            block = self._shard(shard).block(number, verify=(shard, number) not in self._verified)
            self._verified.add((shard, number))
            self._blocks[shard, number] = block
            if len(self._blocks) > READY_BLOCKS:
                self._blocks.popitem(last=False)
            return block

    def _shard(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        record = self.manifest["shards"][number]
        # The index is small and everything else rests on it, so it is always read and checked whole.
        _check_file(self.path_of(record, "idx"), record["files"]["idx"], read=True)
        opened = _OpenShard(self.path_of(record, "tar"), self.path_of(record, "idx"), self.manifest)
        self._open[number] = opened
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return opened


def gather(
    shard_sets: Sequence[ShardSet], source: npt.NDArray[np.integer], rows: npt.NDArray[np.integer]
) -> PackedRows:
    """Copy rows out of several sets of one `seq_len`, in the given order; `source` says which set each row is of.

    Where one set carries a loss mask, the rows of sets without one are all target.
    """
    width = shard_sets[0].seq_len + 1
    tokens_RW = np.empty((len(rows), width), dtype=np.result_type(*(s.manifest["dtype"] for s in shard_sets)))
    masked = any(shards.masked for shards in shard_sets)
    is_target_RW = np.ones((len(rows), width), dtype=np.bool_) if masked else None
    pieces: list[npt.NDArray[np.uint32]] = [np.zeros((0, 4), dtype=np.uint32)] * len(rows)
    row_pieces = np.zeros(len(rows) + 1, dtype=np.int64)
    for number, shards in enumerate(shard_sets):
        here = np.flatnonzero(source == number)
        shard_N, block_N, row_N = shards.places(rows[here])
        # A plain loop: copying one row costs about a microsecond of Python, a fancy index over the map costs more.
        for i, shard, block_number, row in zip(
            here.tolist(), shard_N.tolist(), block_N.tolist(), row_N.tolist(), strict=True
        ):
            block = shards.block(shard, block_number)
            tokens_RW[i] = block.tokens_RW[row]
            if is_target_RW is not None and block.is_target_RW is not None:
                is_target_RW[i] = block.is_target_RW[row]
            pieces[i] = block.pieces_P4[block.row_pieces[row] : block.row_pieces[row + 1]]
            row_pieces[i + 1] = len(pieces[i])
    return PackedRows(
        tokens_RW=tokens_RW,
        pieces_P4=np.concatenate(pieces) if pieces else np.zeros((0, 4), dtype=np.uint32),
        row_pieces=np.cumsum(row_pieces),
        is_target_RW=is_target_RW,
    )


@dataclass(frozen=True)
class Block:
    """Views into one block of a mapped shard; the columns are those of `PackedRows`."""

    tokens_RW: npt.NDArray[np.integer]
    pieces_P4: npt.NDArray[np.uint32]
    row_pieces: list[int]
    is_target_RW: npt.NDArray[np.bool_] | None


class _OpenShard:
    """One memory-mapped tar and its index; arrays are views into the map."""

    def __init__(self, tar: Path, index: Path, manifest: dict[str, Any]) -> None:
        self.path = tar
        self.dtype = np.dtype(manifest["dtype"])
        self.width = int(manifest["seq_len"]) + 1
        self.masked = bool(manifest["masked"])
        with index.open("rb") as file:
            self.index = np.load(file)
        with tar.open("rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def block(self, number: int, *, verify: bool) -> Block:
        """Arrays of one block, its checksum compared on first touch."""
        entry = self.index[number]
        if verify:
            with memoryview(self.bytes) as whole, whole[int(entry["start"]) : int(entry["stop"])] as content:
                found = hashlib.sha256(content).hexdigest()
            expected = entry["sha256"].tobytes().hex()
            if found != expected:
                raise _corrupted(self.path, expected, found, part=f", block {number}")
        rows, pieces = int(entry["rows"]), int(entry["piece_count"])
        return Block(
            self._array(entry["tokens"], self.dtype, rows, self.width),
            self._array(entry["pieces"], np.dtype(np.uint32), pieces, 4),
            self._array(entry["row_pieces"], np.dtype(np.int64), rows + 1, 1)[:, 0].tolist(),
            self._array(entry["is_target"], np.dtype(np.bool_), rows, self.width) if self.masked else None,
        )

    def _array(self, offset: np.uint64, dtype: np.dtype, rows: int, columns: int) -> npt.NDArray[Any]:
        flat: npt.NDArray[Any] = np.frombuffer(self.bytes, dtype=dtype, count=rows * columns, offset=int(offset))
        return flat.reshape(rows, columns)


def _check_file(path: Path, expected: dict[str, Any], *, read: bool) -> None:
    if not path.exists():
        remedy = "restore it, or write the shards again"
        raise Refusal(path, NO_VALUE, "is missing though the manifest names it", remedy)
    size = path.stat().st_size
    if size != expected["bytes"]:
        rule = f"has {size} bytes and the manifest says {expected['bytes']}: the file was cut or changed"
        raise Refusal(path, NO_VALUE, rule, "restore it from a copy, or delete the shards and write them again")
    if read and (found := file_sha256(path)) != expected["sha256"]:
        raise _corrupted(path, expected["sha256"], found)


def _corrupted(path: Path, expected: str, found: str, part: str = "") -> Refusal:
    return Refusal(
        f"{path}{part}",
        NO_VALUE,
        f"is corrupted: its sha256 is {found} and was {expected} when written; none of it has been trained on",
        "restore the file from a copy, or delete the shards and write them again",
    )
