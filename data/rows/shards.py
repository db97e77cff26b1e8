"""Packed rows on disk: one uncompressed tar per shard, one member set per block of rows.

    name.tar            KEY.tokens.npy KEY.pieces.npy KEY.row_pieces.npy [KEY.is_target.npy] for every block; plain
                        `webdataset` reads it too; times and owners are zero, so equal rows are equal bytes
    name.idx            a .npy table, one record per block: where its arrays lie in the tar, and their sha256
    name.docs.parquet   one record per document: id, source, position, corpus file and record, tokens
    shards.json         all shards in their global order, what is in them, sha256 of every file

Rows are numbered through all shards in the manifest's order; that number is what `order.py` permutes.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from conf.refusal import NO_VALUE, Refusal, refuse_below
from data.rows.packing import PackedRows, TokenDocument, token_dtype

MANIFEST = "shards.json"
FORMAT_VERSION = 1
INDEX_DTYPE = np.dtype(
    [
        ("start", "<u8"),
        ("stop", "<u8"),
        ("tokens", "<u8"),
        ("pieces", "<u8"),
        ("row_pieces", "<u8"),
        ("is_target", "<u8"),
        ("rows", "<u4"),
        ("piece_count", "<u4"),
        ("sha256", "u1", (32,)),
    ]
)

DOCUMENT_COLUMNS = ("id", "source", "position", "corpus_file", "corpus_row", "tokens")


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """How rows are cut and grouped. None of it depends on how many workers write."""

    seq_len: int = 1024
    """Tokens of a row: the context that is trained on."""
    rows_per_block: int = 64
    """Rows of a block, which is read, verified and shuffled as one."""
    shard_text_bytes: int = 256 * 2**20
    """Bytes of text that go into one shard, about."""

    def __post_init__(self) -> None:
        refuse_below(self, 1, "seq_len", "rows_per_block", "shard_text_bytes")


def write_shard(
    rows: PackedRows,
    documents: Iterable[TokenDocument],
    out_dir: Path,
    *,
    name: str,
    rows_per_block: int,
    vocab_size: int,
    counts: Counter[str],
) -> dict[str, Any]:
    """Write one shard under `out_dir` and return its record for the manifest. The same rows give the same bytes.

    Raises Refusal where a token lies outside the vocabulary or the disk does not take the bytes.
    """
    if len(rows) and int(rows.tokens_RW.max()) >= vocab_size:
        raise Refusal(
            f"shard {name}",
            NO_VALUE,
            f"token id {int(rows.tokens_RW.max())} is not below the {vocab_size} pieces of the vocabulary: the documents "
            "were tokenized with another tokenizer than the one the shards are made for",
            "use one tokenizer for both",
        )
    paths = {kind: out_dir / f"{name}.{kind}" for kind in ("tar", "idx", "docs.parquet")}
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        index = _write_tar(paths["tar"], rows, name, rows_per_block)
        with paths["idx"].open("wb") as file:
            np.save(file, index)
        documents_written = _write_documents(paths["docs.parquet"], documents)
    except OSError as error:
        raise Refusal(
            out_dir,
            NO_VALUE,
            f"shard {name} cannot be written here ({error.strerror or error})",
            "free some space or make the folder writable, then run the same command again: finished shards are kept",
        ) from error
    numbers_RW = rows.document_numbers()
    return {
        "name": name,
        "rows": len(rows),
        "blocks": len(index),
        "documents": documents_written,
        # Of the rows' seq_len input columns: tokens + padding = rows * seq_len.
        "tokens": int(np.count_nonzero(numbers_RW[:, :-1])),
        "targets": int(np.count_nonzero(rows.valid_targets(numbers_RW))),
        "padding": int(np.count_nonzero(numbers_RW[:, :-1] == 0)),
        "pieces": len(rows.pieces_P4),
        "counts": dict(sorted(counts.items())),
        "files": {kind: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for kind, path in paths.items()},
    }


def write_manifest(
    directory: Path,
    shards: Sequence[dict[str, Any]],
    *,
    settings: ShardSettings,
    vocab_size: int,
    masked: bool = False,
) -> dict[str, Any]:
    """Write `shards.json` over shards already lying somewhere under `directory`; their order here is the global order.

    Returns the totals. Raises Refusal where a shard is missing or where there is not a single row.
    """
    records = []
    for shard in shards:
        found = sorted(directory.rglob(f"{shard['name']}.tar"))
        if len(found) != 1:
            rule = f"shard {shard['name']} lies here {len(found)} times and not once"
            raise Refusal(directory, NO_VALUE, rule, "remove the folder and write the shards again")
        records.append({**shard, "folder": found[0].parent.relative_to(directory).as_posix()})
    sums = ("rows", "blocks", "documents", "tokens", "targets", "padding", "pieces")
    totals: dict[str, Any] = {key: sum(shard[key] for shard in shards) for key in sums}
    counts: Counter[str] = Counter()
    for shard in shards:
        counts.update(shard["counts"])
    totals["counts"] = dict(sorted(counts.items()))
    if totals["rows"] == 0:
        raise Refusal(
            "shards",
            NO_VALUE,
            f"nothing to train on: {totals['documents']} documents gave no row of {settings.seq_len} tokens (left out: "
            f"{totals['counts'] or 'none'})",
            "give more text, or loosen what leaves it out",
        )
    totals["mean_piece_tokens"] = totals["tokens"] / totals["pieces"]
    manifest = {
        "version": FORMAT_VERSION,
        "seq_len": settings.seq_len,
        "rows_per_block": settings.rows_per_block,
        "vocab_size": vocab_size,
        "dtype": np.dtype(token_dtype(vocab_size)).name,
        "masked": masked,
        "totals": totals,
        "shards": records,
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return totals


class _HashedFile:
    """A file to write to that keeps the sha256 of what was written since `begin`."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file = file
        self.begin()

    def begin(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self.file.write(content)

    def tell(self) -> int:
        return self.file.tell()


def _write_tar(path: Path, rows: PackedRows, name: str, rows_per_block: int) -> npt.NDArray[Any]:
    blocks = -(-len(rows) // rows_per_block)
    index = np.zeros(blocks, dtype=INDEX_DTYPE)
    with path.open("wb") as file:
        hashed = _HashedFile(file)
        with tarfile.open(fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
            for number in range(blocks):
                block = rows.slice(number * rows_per_block, min((number + 1) * rows_per_block, len(rows)))
                arrays: dict[str, npt.NDArray[Any]] = {
                    "tokens": block.tokens_RW,
                    "pieces": block.pieces_P4,
                    "row_pieces": block.row_pieces,
                }
                if block.is_target_RW is not None:
                    arrays["is_target"] = block.is_target_RW
                entry = index[number]
                entry["rows"], entry["piece_count"] = len(block), len(block.pieces_P4)
                entry["start"] = hashed.tell()
                hashed.begin()
                for kind, array in arrays.items():
                    entry[kind] = _add_array(tar, hashed, f"{name}-{number:06d}.{kind}.npy", array)
                entry["stop"] = hashed.tell()
                entry["sha256"] = np.frombuffer(hashed.sha256.digest(), dtype=np.uint8)
    return index


def _add_array(tar: tarfile.TarFile, file: _HashedFile, member: str, array: npt.NDArray[Any]) -> int:
    """Add one .npy member; returns where in the tar its first element lies (64-byte aligned, as .npy headers are)."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array))
    info = tarfile.TarInfo(member)
    info.size = buffer.tell()
    buffer.seek(0)
    first_element = file.tell() + tarfile.BLOCKSIZE + info.size - array.nbytes
    tar.addfile(info, buffer)
    return first_element


def _write_documents(path: Path, documents: Iterable[TokenDocument]) -> int:
    # Imported here: settings modules must stay light for `plan`.
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {name: [] for name in DOCUMENT_COLUMNS}
    for document in documents:
        for name in DOCUMENT_COLUMNS:
            columns[name].append(len(document.tokens) if name == "tokens" else getattr(document, name))
    texts = ("id", "source", "corpus_file")
    schema = pa.schema([(name, pa.string() if name in texts else pa.int64()) for name in DOCUMENT_COLUMNS])
    pq.write_table(pa.table(columns, schema=schema), path, compression="zstd")
    return len(columns["id"])


def file_sha256(path: Path) -> str:
    """Hex sha256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
