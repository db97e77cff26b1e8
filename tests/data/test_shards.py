"""Shards: the same rows give the same bytes, plain webdataset reads them, and a flipped bit is found in time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from conf.refusal import Refusal
from data.rows.packing import PackedRows, TokenDocument, pack_conversations, pack_stream
from data.rows.shard_set import ShardSet
from data.rows.shards import MANIFEST, ShardSettings, write_manifest, write_shard

SEQ_LEN, ROWS_PER_BLOCK, VOCAB = 16, 4, 1000
SETTINGS = ShardSettings(seq_len=SEQ_LEN, rows_per_block=ROWS_PER_BLOCK)


def documents_of(seed: int, count: int = 30) -> list[TokenDocument]:
    rng = np.random.default_rng(seed)
    return [
        TokenDocument(
            id=f"{seed}-{i}",
            source=f"file-{seed}.txt",
            position=i,
            tokens=rng.integers(8, VOCAB, size=rng.integers(1, 60)),
        )
        for i in range(count)
    ]


def rows_of(documents: list[TokenDocument]) -> PackedRows:
    return pack_stream(documents, seq_len=SEQ_LEN, bos_id=2, eos_id=3, pad_id=0, dtype=np.uint16)


def write(folder: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> list[PackedRows]:
    packed, records = [], []
    for seed in seeds:
        documents = documents_of(seed)
        packed.append(rows_of(documents))
        records.append(
            write_shard(
                packed[-1],
                documents,
                folder / f"part-{seed}",
                name=f"train-{seed:05d}",
                rows_per_block=ROWS_PER_BLOCK,
                vocab_size=VOCAB,
                counts=Counter(),
            )
        )
    write_manifest(folder, records, settings=SETTINGS, vocab_size=VOCAB)
    return packed


def equal(left: PackedRows, right: PackedRows) -> bool:
    masks = (left.is_target_RW, right.is_target_RW)
    return (
        np.array_equal(left.tokens_RW, right.tokens_RW)
        and np.array_equal(left.pieces_P4, right.pieces_P4)
        and np.array_equal(left.row_pieces, right.row_pieces)
        and ((masks[0] is None and masks[1] is None) or np.array_equal(masks[0], masks[1]))  # type: ignore[arg-type]
    )


def test_rows_come_back_as_written_and_number_through_the_shards(tmp_path: Path) -> None:
    packed = write(tmp_path)
    shards = ShardSet.open(tmp_path, verify=True)
    assert shards.rows == sum(map(len, packed))
    start = 0
    for rows in packed:
        assert equal(shards.gather(range(start, start + len(rows))), rows)
        start += len(rows)
    picked = np.array([start - 1, 0, 5, len(packed[0]), 5])
    everything = shards.gather(range(start))
    assert (shards.gather(picked).tokens_RW == everything.tokens_RW[picked]).all()
    assert (shards.gather(picked).document_numbers() == everything.document_numbers()[picked]).all()


def test_plain_webdataset_reads_the_same_rows(tmp_path: Path) -> None:
    packed = write(tmp_path)
    shards = ShardSet.open(tmp_path)
    urls = [str(shards.path_of(record, "tar")) for record in shards.manifest["shards"]]
    blocks: list[dict[str, Any]] = list(wds.WebDataset(urls, shardshuffle=False).decode())
    assert len({block["__key__"] for block in blocks}) == len(blocks) == shards.manifest["totals"]["blocks"]
    tokens = np.concatenate([block["tokens.npy"] for block in blocks])
    assert (tokens == np.concatenate([rows.tokens_RW for rows in packed])).all()
    pieces = np.concatenate([block["pieces.npy"] for block in blocks])
    assert (pieces == np.concatenate([rows.pieces_P4 for rows in packed])).all()


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "two")
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 3 * 3 + 1
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_a_loss_mask_travels_with_its_rows(tmp_path: Path) -> None:
    conversations = [
        TokenDocument(id=str(i), source="chat", position=i, tokens=[9] * n, is_target=[k > n // 2 for k in range(n)])
        for i, n in enumerate([12, 7, 5, 17, 9, 3])
    ]
    rows = pack_conversations(conversations, seq_len=SEQ_LEN, pad_id=0, dtype=np.uint16, counts=Counter())
    record = write_shard(
        rows, conversations, tmp_path, name="sft", rows_per_block=2, vocab_size=VOCAB, counts=Counter(odd=2)
    )
    totals = write_manifest(
        tmp_path, [record], settings=ShardSettings(seq_len=SEQ_LEN, rows_per_block=2), vocab_size=VOCAB, masked=True
    )
    assert totals["counts"] == {"odd": 2}
    assert totals["targets"] == sum(sum(c.is_target or []) for c in conversations)
    assert equal(ShardSet.open(tmp_path).gather(range(len(rows))), rows)


def test_the_totals_add_up(tmp_path: Path) -> None:
    write(tmp_path)
    totals = json.loads((tmp_path / MANIFEST).read_text())["totals"]
    assert totals["tokens"] + totals["padding"] == totals["rows"] * SEQ_LEN
    assert totals["targets"] == sum(len(d.tokens) + 1 for seed in range(3) for d in documents_of(seed))
    counts = ShardSet.open(tmp_path).target_counts()
    assert counts.sum() == totals["targets"]
    assert counts[3] == totals["documents"] == 90


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found_when_its_block_is_first_touched_and_no_sooner(tmp_path: Path) -> None:
    write(tmp_path)
    tar = tmp_path / "part-1" / "train-00001.tar"
    flip(tar, 700)  # in the first block's tokens
    shards = ShardSet.open(tmp_path)
    first_bad = shards.manifest["shards"][0]["rows"]
    shards.gather(range(first_bad))
    shards.gather([first_bad + ROWS_PER_BLOCK])
    with pytest.raises(Refusal, match=r"train-00001\.tar, block 0: is corrupted: its sha256 is \w{64} and was \w{64}"):
        shards.gather([first_bad + ROWS_PER_BLOCK - 1])
    with pytest.raises(Refusal, match="Restore the file from a copy"):
        ShardSet.open(tmp_path, verify=True)


@pytest.mark.parametrize("kind", ["idx", "docs.parquet"])
def test_a_changed_sidecar_is_found_by_verify(tmp_path: Path, kind: str) -> None:
    write(tmp_path)
    flip(tmp_path / "part-0" / f"train-00000.{kind}", 300)
    with pytest.raises(Refusal, match="is corrupted"):
        ShardSet.open(tmp_path, verify=True)


def test_a_changed_index_is_found_before_it_is_used(tmp_path: Path) -> None:
    write(tmp_path)
    flip(tmp_path / "part-0" / "train-00000.idx", 400)
    with pytest.raises(Refusal, match=r"train-00000\.idx: is corrupted"):
        ShardSet.open(tmp_path).gather([0])


def test_cut_missing_and_unfinished_shards_are_refused_at_opening(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"holds no shards\.json"):
        ShardSet.open(tmp_path)
    write(tmp_path)
    tar = tmp_path / "part-2" / "train-00002.tar"
    content = tar.read_bytes()
    tar.write_bytes(content[:-512])
    with pytest.raises(Refusal, match=f"has {len(content) - 512} bytes and the manifest says {len(content)}"):
        ShardSet.open(tmp_path)
    tar.unlink()
    with pytest.raises(Refusal, match="is missing"):
        ShardSet.open(tmp_path)
    (tmp_path / MANIFEST).write_text('{"version": 0}')
    with pytest.raises(Refusal, match="has format version 0, and this program reads version 1"):
        ShardSet.open(tmp_path)
    (tmp_path / MANIFEST).write_text('{"version": 1, "sea')
    with pytest.raises(Refusal, match=r"shards\.json: is not readable"):
        ShardSet.open(tmp_path)


def test_tokens_of_another_vocabulary_and_empty_corpora_are_refused(tmp_path: Path) -> None:
    documents = documents_of(0)
    with pytest.raises(Refusal, match="is not below the 500 pieces"):
        write_shard(
            rows_of(documents), documents, tmp_path, name="a", rows_per_block=4, vocab_size=500, counts=Counter()
        )
    record = write_shard(
        rows_of([]), [], tmp_path, name="a", rows_per_block=4, vocab_size=500, counts=Counter(conversation_too_long=3)
    )
    with pytest.raises(Refusal, match=r"nothing to train on.*conversation_too_long.*3"):
        write_manifest(tmp_path, [record], settings=SETTINGS, vocab_size=500)


def test_a_folder_that_takes_no_bytes_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(Refusal, match=r"out: shard a cannot be written.* then run the same command again"):
        write_shard(
            rows_of(documents_of(0)),
            documents_of(0),
            tmp_path / "out",
            name="a",
            rows_per_block=4,
            vocab_size=VOCAB,
            counts=Counter(),
        )
