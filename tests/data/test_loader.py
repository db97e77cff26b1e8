"""The loader's batches depend on the row numbers alone: not on ranks, micro-batches, threads or restarts."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.refusal import Refusal
from data.batch import combine_digest, hash_sum
from data.loader import Loader, StepBatch, check_division, open_loader, order_over
from data.mixture import MixturePhase, MixtureSettings
from data.order import OrderSettings
from data.rows.packing import TokenDocument, pack_stream
from data.rows.shard_set import ShardSet
from data.rows.shards import ShardSettings, write_manifest, write_shard

SEQ_LEN = 16
MIXTURE = MixtureSettings(phases=(MixturePhase(weights={"books": 0.25, "code": 0.75}),))


def write(folder: Path, seed: int, documents: int) -> Path:
    rng = np.random.default_rng(seed)
    records = []
    for shard in range(2):
        texts = [
            TokenDocument(id=str(i), source="file", position=i, tokens=rng.integers(8, 500, size=rng.integers(1, 90)))
            for i in range(documents)
        ]
        rows = pack_stream(texts, seq_len=SEQ_LEN, bos_id=2, eos_id=3, pad_id=0, dtype=np.uint16)
        name = f"train-{shard:05d}"
        records.append(write_shard(rows, texts, folder, name=name, rows_per_block=8, vocab_size=500, counts=Counter()))
    write_manifest(folder, records, settings=ShardSettings(seq_len=SEQ_LEN, rows_per_block=8), vocab_size=500)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shards")
    return {"books": write(root / "books", 1, 20), "code": write(root / "code", 2, 40)}


def take(loader: Loader, steps: int) -> list[StepBatch]:
    with loader:
        return list(itertools.islice(loader, steps))


def open_(folders: dict[str, Path], world_size: int = 1, rank: int = 0, micro: int = 2, start_row: int = 0) -> Loader:
    return open_loader(
        folders,
        rows_per_step=24,
        micro_batch_rows=micro,
        rank=rank,
        world_size=world_size,
        order=OrderSettings(seed=3, window_blocks=4),
        mixture=MIXTURE,
        start_row=start_row,
    )


def whole(step: StepBatch) -> dict[str, torch.Tensor]:
    return {name: torch.cat([micro[name] for micro in step.micro_batches]) for name in step.micro_batches[0]}


@pytest.mark.parametrize(("world_size", "micro"), [(2, 3), (3, 8), (4, 1), (24, 1)])
def test_ranks_share_out_the_very_rows_one_process_reads(folders: dict[str, Path], world_size: int, micro: int) -> None:
    alone = take(open_(folders), 5)
    ranks = [take(open_(folders, world_size, rank, micro), 5) for rank in range(world_size)]
    for number, step in enumerate(alone):
        parts = [ranks[rank][number] for rank in range(world_size)]
        assert combine_digest(step.row_hashes) == combine_digest(np.concatenate([p.row_hashes for p in parts]))
        assert combine_digest(step.row_hashes) == combine_digest([hash_sum(part.row_hashes) for part in parts])
        assert step.target_count == sum(part.target_count for part in parts)
        for rank, part in enumerate(parts):
            assert {len(m["tokens_BT"]) for m in part.micro_batches} == {micro}
            for name, tensor in whole(part).items():
                assert torch.equal(tensor, whole(step)[name][rank::world_size])


def test_a_loader_started_at_a_row_gives_the_very_next_step(folders: dict[str, Path]) -> None:
    through = take(open_(folders), 9)
    for stop in (1, 4, 8):
        first = open_(folders)
        for _ in range(stop):
            next(first)
        state = first.state()
        assert state["rows_consumed"] == stop * 24
        resumed = open_(folders, start_row=state["rows_consumed"])
        restored = open_(folders)
        restored.restore(state)
        for loader in (first, resumed, restored):
            with loader:
                step = next(loader)
            assert step.first_row == stop * 24
            assert combine_digest(step.row_hashes) == combine_digest(through[stop].row_hashes)


def test_batches_hold_the_rows_the_order_names(folders: dict[str, Path]) -> None:
    sets = {name: ShardSet.open(path) for name, path in folders.items()}
    located = order_over(sets, order=OrderSettings(seed=3, window_blocks=4), mixture=MIXTURE).locate(np.arange(24))
    batch = whole(take(open_(folders), 1)[0])
    for i in range(24):
        row = list(sets.values())[located.source[i]].gather([int(located.row[i])])
        assert batch["tokens_BT"][i].tolist() == row.tokens_RW[0, :-1].tolist()
        shown = batch["targets_BT"][i] >= 0
        assert batch["targets_BT"][i][shown].tolist() == row.tokens_RW[0, 1:][shown.numpy()].tolist()
        assert batch["documents_BT"][i].tolist() == row.document_numbers()[0, :-1].tolist()
    assert np.bincount(located.source).tolist() == [6, 18]


def test_an_epoch_trains_on_every_target_once(folders: dict[str, Path]) -> None:
    shards = ShardSet.open(folders["books"])
    loader = open_loader({"books": folders["books"]}, rows_per_step=1, micro_batch_rows=1)
    seen: Counter[int] = Counter()
    for step in take(loader, shards.rows):
        targets = whole(step)["targets_BT"]
        seen.update(targets[targets >= 0].tolist())
    assert seen == {i: n for i, n in enumerate(shards.target_counts().tolist()) if n}


def test_the_digest_notices_a_changed_token_target_boundary_and_place(folders: dict[str, Path]) -> None:
    from data.batch import row_hashes
    from data.tasks.objectives import NextToken

    rows = ShardSet.open(folders["books"]).gather(range(4))
    numbers = np.arange(4)
    before = row_hashes(NextToken()(rows, numbers), numbers)
    assert len(set(before.tolist())) == 4
    for name in ("tokens_RT", "targets_RT", "positions_RT"):
        examples = NextToken()(rows, numbers)
        getattr(examples, name)[2, 5] += 1
        changed = row_hashes(examples, numbers) != before
        assert changed.tolist() == [False, False, True, False]
    assert (row_hashes(NextToken()(rows, numbers), numbers + 1) != before).all()


def test_a_corrupted_block_ends_the_run_before_its_rows_are_seen(tmp_path: Path) -> None:
    folder = write(tmp_path, 5, 40)
    shards = ShardSet.open(folder)
    order = OrderSettings(window_blocks=1)
    located = order_over({"a": shards}, order=order).locate(np.arange(shards.rows))
    bad_row = int(located.row[-1])
    shard, _, _ = shards.where(bad_row)
    tar = shards.path_of(shards.manifest["shards"][shard], "tar")
    content = tar.read_bytes()
    token_bytes = shards.gather([bad_row]).tokens_RW.tobytes()
    at = content.index(token_bytes)
    tar.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    clean_rows = int(np.flatnonzero(located.row // 8 == bad_row // 8)[0])
    loader = open_loader({"a": folder}, rows_per_step=1, micro_batch_rows=1, order=order)
    take(loader, clean_rows)
    with loader, pytest.raises(Refusal, match="none of it has been trained on"):
        next(loader)


def test_restoring_over_other_data_or_another_order_is_refused_with_both_digests(folders: dict[str, Path]) -> None:
    state = open_(folders).state()
    other_seed = open_loader(
        folders, rows_per_step=24, micro_batch_rows=2, order=OrderSettings(seed=4), mixture=MIXTURE
    )
    with pytest.raises(Refusal, match=f"{state['digest']}.*{other_seed.state()['digest']}"):
        other_seed.restore(state)
    swapped = open_({"books": folders["code"], "code": folders["books"]})
    with pytest.raises(Refusal, match="other data"):
        swapped.restore(state)
    assert open_(folders, world_size=2, micro=1).state() == state


@pytest.mark.parametrize(
    ("rows", "world_size", "micro", "says"),
    [
        (24, 1, 5, r"global batch of 20 or 25 rows .* or micro_batch_rows of .*\b24\b"),
        (24, 7, 1, r"global batch of 21 or 28 rows"),
        (6, 2, 8, r"global batch of 16 rows .* or micro_batch_rows of 1, 3"),
        (4, 8, 1, r"4 rows cannot feed 8 ranks.*at most 4 ranks.*at least 8 rows"),
        (8, 1, 0, r"micro_batch_rows = 0: must be at least 1"),
    ],
)
def test_a_batch_that_does_not_divide_names_what_would(rows: int, world_size: int, micro: int, says: str) -> None:
    with pytest.raises(Refusal, match=says):
        check_division(rows, world_size=world_size, micro_batch_rows=micro)


def test_a_corpus_smaller_than_one_batch_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(Refusal, match=r"too small for one batch: it packs into \d+ rows of 16 tokens.*takes 9000"):
        open_loader(folders, rows_per_step=9000, micro_batch_rows=1)


def test_sources_of_different_row_length_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    texts = [TokenDocument(id="0", source="file", position=0, tokens=np.arange(100))]
    rows = pack_stream(texts, seq_len=8, bos_id=2, eos_id=3, pad_id=0, dtype=np.uint16)
    record = write_shard(rows, texts, tmp_path, name="a", rows_per_block=8, vocab_size=500, counts=Counter())
    write_manifest(tmp_path, [record], settings=ShardSettings(seq_len=8, rows_per_block=8), vocab_size=500)
    with pytest.raises(Refusal, match=r"different seq_len: \{'books': 16, 'short': 8\}"):
        open_loader({"books": folders["books"], "short": tmp_path}, rows_per_step=1, micro_batch_rows=1)


def test_a_dropped_loader_leaves_no_thread_behind(folders: dict[str, Path]) -> None:
    before = set(threading.enumerate())  # those of other tests' loaders may still be ending
    loader = open_(folders)
    next(loader)
    [started] = set(threading.enumerate()) - before
    del loader
    started.join(5)
    assert not started.is_alive()


def test_waiting_is_measured_and_data_read_ahead_costs_none(folders: dict[str, Path]) -> None:
    with open_(folders) as loader:
        next(loader)
        time.sleep(0.3)
        ready = next(loader)
    assert 0 <= ready.data_seconds < 0.05
