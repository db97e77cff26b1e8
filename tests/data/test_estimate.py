"""What `plan` says of a corpus before it is read, beside what reading, tokenizing and packing it then count."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data.rows.instructions import InstructionSettings, build_instructions, load_conversations
from data.rows.shard_tasks import plan_shards
from data.text.corpus import build_corpus, in_process
from data.text.estimate import BYTES_PER_TOKEN, bytes_per_token, text_bytes
from data.text.readers import ReaderSettings
from data.text.sources import list_files
from data.tokenizers.sentencepiece import Tokenizer
from pipelines.settings.compose import compose
from pipelines.verbs import plan as planning

FORMS = ["txt", "txt.gz", "txt.zst", "utf-16 txt", "jsonl", "jsonl.gz", "parquet", "all of them"]


def write(folder: Path, form: str, number: int, text: str) -> None:
    """A text in one of the forms that are read, beside other fields where there are fields."""
    record = {"id": number, "url": f"https://example.org/texts/{number}", "text": text}
    stem = folder / f"{form.replace(' ', '-')}-{number:03d}"
    raw, line = text.encode(), (json.dumps(record) + "\n").encode()
    if form == "parquet":
        pq.write_table(pa.table({key: [value] for key, value in record.items()}), f"{stem}.parquet")
        return
    suffix, packed = {
        "txt": (".txt", raw),
        "txt.gz": (".txt.gz", gzip.compress(raw)),
        "txt.zst": (".txt.zst", zstandard.compress(raw)),
        "utf-16 txt": (".txt", text.encode("utf-16")),
        "jsonl": (".jsonl", line),
        "jsonl.gz": (".jsonl.gz", gzip.compress(line)),
    }[form]
    Path(f"{stem}{suffix}").write_bytes(packed)


@pytest.fixture(scope="module")
def pieces(library_texts: list[str]) -> list[str]:
    """About half a megabyte of modules in 150 pieces."""
    return [text[at : at + 4000] for text in library_texts for at in range(0, len(text), 4000)][:150]


@pytest.mark.parametrize("form", FORMS)
def test_every_figure_of_plan_about_a_corpus_is_near_what_is_then_counted(
    tmp_path: Path, pieces: list[str], tokenizer: Tokenizer, form: str
) -> None:
    (tmp_path / "in").mkdir()
    for number, text in enumerate(pieces):
        write(tmp_path / "in", form if form in FORMS[:-1] else FORMS[number % (len(FORMS) - 1)], number, text)
    settings = compose(
        [
            "experiment=text",
            f"corpus.paths=[{tmp_path / 'in'}]",
            "corpus.dedup.near_duplicates=false",
            f"tokenizer.vocab_size={tokenizer.vocab_size}",
            "shards.shard_text_bytes=60000",
        ]
    )
    told = planning.data(settings, 1_000_000, [])
    assert told["basis"].startswith("guessed at 2.55 bytes a token")
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    out.mkdir()
    card = build_corpus(settings.corpus, out, in_process(out, scratch), scratch=scratch)
    assert planning.corpus_bytes(settings.corpus) == pytest.approx(card["train_bytes"], rel=0.1)
    train = pq.read_table(out / "train", columns=["text"])["text"].to_pylist()
    tokens = sum(len(ids) + 2 for ids in tokenizer.encode_batch(train))
    assert told["tokens"] == pytest.approx(tokens, rel=0.15)
    assert told["shards"] == pytest.approx(len(plan_shards(out / "train", settings.shards)), rel=0.15)
    assert told["epochs"] == pytest.approx(1_000_000 / tokens, rel=0.15)


@pytest.mark.parametrize("packed", [False, True])
def test_conversations_are_counted_by_what_they_say_and_not_as_they_lie(
    tmp_path: Path, pieces: list[str], packed: bool
) -> None:
    lines = [
        {"messages": [{"role": "user", "content": text[:300]}, {"role": "assistant", "content": text[300:]}], "n": 1}
        if number % 2
        else {"prompt": text[:300], "completion": text[300:], "source": "somewhere"}
        for number, text in enumerate(pieces)
    ]
    raw = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    settings = compose(
        ["experiment=text", f"corpus.paths=[{tmp_path}]", "finetune=chat", f"finetune.data.paths=[{path}]"]
    )
    chosen = InstructionSettings(kind="files", paths=(str(path),))
    build_instructions(chosen, [], tmp_path / "out")
    said = [m["content"] for c in load_conversations(tmp_path / "out" / "train.jsonl") for m in c.messages]
    assert planning.conversation_bytes(settings) == pytest.approx(sum(len(t.encode()) for t in said), rel=0.1)


def test_a_part_of_large_files_tells_of_the_rest(
    tmp_path: Path, library_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.text.estimate.SAMPLED_BYTES", 1 << 17)
    monkeypatch.setattr("data.text.estimate.SAMPLED_FILES", range(3, 4))
    text = "\n".join(library_texts)
    for number in range(8):
        (tmp_path / f"{number}.txt.gz").write_bytes(gzip.compress(text.encode()))
        with gzip.open(tmp_path / f"{number}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": line}) + "\n" for line in text.split("\n"))
    truth = 8 * (len(text.encode()) + len(text.replace("\n", "").encode()))
    assert text_bytes(list_files([str(tmp_path)]), ReaderSettings()) == pytest.approx(truth, rel=0.25)


def test_what_cannot_be_sampled_is_counted_by_its_size(tmp_path: Path) -> None:
    for name in ("a.txt.gz", "b.parquet", "c.txt.zst", "d.jsonl"):
        (tmp_path / name).write_bytes(b"not what the suffix says")
    assert 0 <= text_bytes(list_files([str(tmp_path)]), ReaderSettings()) <= 4 * 24


def test_bytes_per_token_are_those_of_a_tokenizer_of_that_size(library_texts: list[str], tokenizer: Tokenizer) -> None:
    counted = sum(len(t.encode()) for t in library_texts) / sum(map(len, tokenizer.encode_batch(library_texts)))
    assert bytes_per_token(tokenizer.vocab_size) == pytest.approx(counted, rel=0.15)
    assert [bytes_per_token(size) for size in BYTES_PER_TOKEN] == sorted(BYTES_PER_TOKEN.values())
    assert bytes_per_token(128) == 1.9 and bytes_per_token(1 << 20) == 4.6
