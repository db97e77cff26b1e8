"""Every token a model was trained on leads back to its file, its document and its characters, exactly."""

from __future__ import annotations

import inspect
import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from conf.refusal import Refusal
from data.loader import open_loader, order_over
from data.rows.shard_set import ShardSet
from data.rows.shard_tasks import make_conversation_shard, make_shard, plan_shards
from data.rows.shards import ShardSettings, write_manifest
from data.text.document import Document, read_documents, write_documents
from data.tokenizers.sentencepiece import Tokenizer
from data.tokenizers.training import TokenizerSettings, train_tokenizer
from data.trace import TracedRow, trace_step

ALPHABET = [
    "the ",
    "quick ",
    "lazy ",
    "    ",
    "\n",
    "\t\t",
    "naïve ",
    "…",
    "日本",
    "👩‍🚀",
    "▁",
    "<s>",
    "</s>",
    "x=1;",
    "é",
    "0",
]
SETTINGS = ShardSettings(seq_len=24, rows_per_block=4, shard_text_bytes=3000)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    folder = tmp_path_factory.mktemp("corpus")
    for file in range(2):
        documents = [
            Document(text="".join(draw.choices(ALPHABET, k=draw.randint(1, 80))), source=f"f{file}.md", position=i)
            for i in range(40)
        ]
        write_documents(folder / f"{file:05d}.parquet", documents)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [Path(module.__file__).read_text() for module in (random, pytest, inspect)]
    train_tokenizer(texts, TokenizerSettings(vocab_size=384), folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def folder(corpus: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    tasks = plan_shards(corpus, SETTINGS)
    records = [
        make_shard(task, folder / task.name, corpus_dir=corpus, tokenizer=tokenizer, settings=SETTINGS)
        for task in tasks
    ]
    write_manifest(folder, records, settings=SETTINGS, vocab_size=tokenizer.vocab_size)
    return folder


def trace(
    folder: Path,
    tokenizer: Tokenizer,
    corpora: dict[str, Path],
    step: int,
    column: int | None = None,
    rows_per_step: int = 8,
) -> list[TracedRow]:
    sets = {"a": ShardSet.open(folder)}
    return list(
        trace_step(
            sets,
            order_over(sets),
            step=step,
            rows_per_step=rows_per_step,
            tokenizer=tokenizer,
            corpora=corpora,
            column=column,
        )
    )


def test_shards_hold_every_document_of_the_corpus_in_order(corpus: Path, folder: Path) -> None:
    shards = ShardSet.open(folder)
    assert len(shards.manifest["shards"]) > 3
    ids = [i for number in range(len(shards.manifest["shards"])) for i in shards.documents(number)["id"].to_pylist()]
    assert ids == [document.id for document in read_documents(corpus)]


def test_the_spans_of_an_epoch_tile_every_document(corpus: Path, folder: Path, tokenizer: Tokenizer) -> None:
    rows = ShardSet.open(folder).rows
    spans: dict[str, list[tuple[int, int]]] = {}
    for row in trace(folder, tokenizer, {"a": corpus}, step=1, rows_per_step=rows):
        for piece in row.pieces:
            assert piece.characters is not None
            spans.setdefault(piece.document, []).append(piece.characters)
    texts = {document.id: document.text for document in read_documents(corpus)}
    assert set(spans) == set(texts)
    for document, found in spans.items():
        found.sort()
        assert found[0][0] == 0
        assert found[-1][1] == len(texts[document])
        # Neighbouring rows share a token, so spans may overlap by its characters, but they leave no gap.
        assert all(after[0] <= before[1] for before, after in pairwise(found))


def test_traced_text_is_the_text_of_the_batch(corpus: Path, folder: Path, tokenizer: Tokenizer) -> None:
    with open_loader({"a": folder}, rows_per_step=8, micro_batch_rows=8) as loader:
        steps = [next(loader), next(loader)]
    rows = trace(folder, tokenizer, {"a": corpus}, step=2)
    tokens = steps[1].micro_batches[0]["tokens_BT"].numpy()
    assert [row.global_row for row in rows] == list(range(8, 16))
    for row, tokens_T in zip(rows, tokens, strict=True):
        for piece in row.pieces:
            ids = tokens_T[piece.start : piece.stop].tolist()
            shown = tokenizer.decode(ids)
            # A character cut by the row's edge is whole in the trace and U+FFFD in the decoded tokens.
            inner = shown.strip("�")
            assert inner in piece.text
            assert len(piece.text) <= len(shown) + 2


def test_one_column_leads_to_one_token(corpus: Path, folder: Path, tokenizer: Tokenizer) -> None:
    whole = trace(folder, tokenizer, {"a": corpus}, step=1)
    for column in (0, 7, 24):
        for row, alone in zip(whole, trace(folder, tokenizer, {"a": corpus}, step=1, column=column), strict=True):
            (piece,) = alone.pieces
            around = next(p for p in row.pieces if p.start <= column < p.stop)
            assert (piece.start, piece.stop, piece.document) == (column, column + 1, around.document)
            assert piece.characters is not None
            assert around.characters is not None
            assert around.characters[0] <= piece.characters[0] <= piece.characters[1] <= around.characters[1]
            assert piece.text in around.text


def test_without_its_text_a_row_is_shown_by_its_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    for row in trace(folder, tokenizer, {}, step=1):
        assert all(piece.characters is None for piece in row.pieces)
        assert any(piece.text for piece in row.pieces)


def test_a_corpus_that_has_changed_is_refused(corpus: Path, folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for file in corpus.glob("*.parquet"):
        write_documents(tmp_path / file.name, [Document(text=f"other {i}", source="f", position=i) for i in range(40)])
    with pytest.raises(Refusal, match="where the shards were made of"):
        trace(folder, tokenizer, {"a": tmp_path}, step=1)
    with pytest.raises(Refusal, match="step = 0: steps count from 1"):
        trace(folder, tokenizer, {"a": corpus}, step=0)


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_tar_is_refused_when_its_rows_are_traced(
    corpus: Path, folder: Path, tokenizer: Tokenizer, tmp_path: Path, damage: str
) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(folder, copy)
    for tar in copy.rglob("*.tar"):
        content = tar.read_bytes()
        tar.write_bytes(bytes(byte ^ 1 for byte in content) if damage == "flipped" else content[: len(content) // 2])
    with pytest.raises(Refusal, match=r"train-\d+\.tar.* (is corrupted: its sha256|has \d+ bytes)"):
        trace(copy, tokenizer, {"a": corpus}, step=1)


def test_the_plan_depends_on_the_corpus_and_covers_it(corpus: Path) -> None:
    for size in (1, 500, 3000, 10**9):
        tasks = plan_shards(corpus, ShardSettings(shard_text_bytes=size))
        covered = [
            (s.file, s.group_row + row) for t in tasks for s in t.slices for row in range(s.first_row, s.last_row)
        ]
        assert covered == [(f"{file:05d}.parquet", row) for file in range(2) for row in range(40)]
    assert len(tasks) == 1


def test_conversations_become_masked_shards_with_their_losses_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from data.rows.packing import TokenDocument
    from data.tokenizers.chat import encode_chat

    conversations = []
    for i in range(20):
        messages = [{"role": "user", "content": "the quick " * i}, {"role": "assistant", "content": f"lazy {i}"}]
        ids, is_target = encode_chat(tokenizer, messages)
        conversations.append(TokenDocument(id=str(i), source="chat", position=i, tokens=ids, is_target=is_target))
    record = make_conversation_shard(
        conversations, tmp_path, name="sft-00000", tokenizer=tokenizer, settings=SETTINGS, too_long="drop"
    )
    kept = [c for c in conversations if len(c.tokens) <= 25]
    assert record["counts"] == {"conversation_too_long": 20 - len(kept)}
    write_manifest(tmp_path, [record], settings=SETTINGS, vocab_size=tokenizer.vocab_size, masked=True)
    assert record["targets"] == sum(sum(c.is_target or []) for c in kept)
    with open_loader({"sft": tmp_path}, rows_per_step=record["rows"], micro_batch_rows=1) as loader:
        step = next(loader)
    assert step.target_count == record["targets"]
    for micro in step.micro_batches:
        assert (micro["targets_BT"] != -100).any(), "a row without a target reached training"
    traced = [p for row in trace(tmp_path, tokenizer, {}, 1, rows_per_step=record["rows"]) for p in row.pieces]
    assert sorted(int(p.document) for p in traced) == sorted(c.position for c in kept)
    assert {p.text for p in traced} == {tokenizer.decode(c.tokens) for c in kept}
