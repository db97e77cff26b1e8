"""Readers: every format gives text with its place, and everything wrong is repaired, counted or refused."""

from __future__ import annotations

import gzip
import json
import pickle
import random
import re
import shlex
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from conf.refusal import Refusal
from data.text.document import Document
from data.text.readers import ReaderSettings, ReadLog, exclude_files, read_file
from data.text.sources import SourceFile, list_files, python_library_files

WHOLE = ReaderSettings(max_document_characters=None)


def read(path: Path, settings: ReaderSettings = WHOLE, log: ReadLog | None = None) -> list[Document]:
    (file,) = list_files([str(path)])
    return list(read_file(file, settings, log or ReadLog.new()))


def prose(seed: int, paragraphs: int) -> str:
    chooser = random.Random(seed)
    words = [f"{a}{b}" for a in ("lo", "mi", "ra", "te", "vu") for b in ("na", "ser", "tik", "o", "bel")]
    return "\n\n".join(" ".join(chooser.choices(words, k=chooser.randint(20, 90))) for _ in range(paragraphs))


@pytest.mark.parametrize("suffix", ["txt", "md", "py"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document_in_every_compression(tmp_path: Path, suffix: str, compression: str) -> None:
    text = "def f():\n    return 'é😀'\n" * 1000
    raw = text.encode()
    packed = {"": raw, ".gz": gzip.compress(raw), ".zst": zstandard.compress(raw)}[compression]
    path = tmp_path / f"a.{suffix}{compression}"
    path.write_bytes(packed)
    (document,) = read(path)
    assert (document.text, document.position) == (text, 0)
    assert document.source == f"{tmp_path.name}/a.{suffix}{compression}"


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_a_jsonl_line_is_a_document_at_its_line_number(tmp_path: Path, compression: str) -> None:
    raw = b'{"body": "one"}\n\n{"body": "two\\r\\nlines", "id": 3}\n'
    packed = {"": raw, ".gz": gzip.compress(raw), ".zst": zstandard.compress(raw)}[compression]
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(packed)
    documents = read(path, ReaderSettings(text_field="body"))
    assert [(d.text, d.position) for d in documents] == [("one", 1), ("two\nlines", 3)]


def test_a_parquet_row_is_a_document_at_its_row_number(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["a", None, "b"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    log = ReadLog.new()
    documents = read(tmp_path / "a.parquet", ReaderSettings(text_field="content"), log)
    assert [(d.text, d.position) for d in documents] == [("a", 0), ("b", 2)]
    assert log.counts["null_rows"] == 1


@pytest.mark.parametrize(("field", "message"), [("text", "columns are content, n"), ("n", "is int64, not text")])
def test_a_parquet_without_the_text_column_names_those_it_has(tmp_path: Path, field: str, message: str) -> None:
    pq.write_table(pa.table({"content": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(Refusal, match=message):
        read(tmp_path / "a.parquet", ReaderSettings(text_field=field))


def test_a_long_file_is_cut_at_paragraphs_and_each_piece_found_at_its_offset(tmp_path: Path) -> None:
    text = prose(1, 400)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = read(tmp_path / "a.txt", ReaderSettings(max_document_characters=4096))
    assert "".join(piece.text for piece in pieces) == text
    assert all(text[p.position : p.position + len(p.text)] == p.text for p in pieces)
    assert all(len(p.text) <= 4096 for p in pieces)
    assert all(p.text.endswith("\n\n") for p in pieces[:-1])
    assert len(pieces) > 10


@pytest.mark.parametrize(("boundary", "ending"), [("\n", "\n"), (" ", " "), ("", "x")])
def test_a_file_without_paragraphs_is_cut_at_lines_then_spaces_then_anywhere(
    tmp_path: Path, boundary: str, ending: str
) -> None:
    text = ("x" * 50 + boundary) * 200
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = read(tmp_path / "a.txt", ReaderSettings(max_document_characters=512))
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.text.endswith(ending) and 256 <= len(piece.text) <= 512 for piece in pieces[:-1])


def test_cuts_fall_back_into_step_after_a_longer_preface(tmp_path: Path) -> None:
    body = prose(2, 600)
    cut = ReaderSettings(max_document_characters=8192)
    pieces = []
    for name, preface in (("a", "Short.\n\n"), ("b", prose(3, 9) + "\n\n")):
        (tmp_path / f"{name}.txt").write_text(preface + body, encoding="utf-8")
        pieces.append({document.id for document in read(tmp_path / f"{name}.txt", cut)})
    assert len(pieces[0] & pieces[1]) > 0.6 * len(pieces[0])


def test_a_file_read_in_small_blocks_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "é\r\n😀\r\rx\n".encode() * 50 + b"bad \xff\xfe \r")
    log = ReadLog.new()
    (expected,) = read(tmp_path / "a.txt", log=log)
    assert expected.text == "é\n😀\n\nx\n" * 50 + "bad \ufffd\ufffd \n"
    for size in (1, 2, 3, 7):
        monkeypatch.setattr("data.text.text_stream.READ_BLOCK_BYTES", size)
        small = ReadLog.new()
        assert read(tmp_path / "a.txt", log=small) == [expected]
        assert small.counts == log.counts


def test_invalid_utf8_is_replaced_and_counted_by_byte_and_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait \xff")
    log = ReadLog.new()
    assert read(tmp_path / "a.txt", log=log)[0].text == "caf\ufffd au lait \ufffd"
    assert (log.counts["invalid_utf8_bytes"], log.counts["files_with_invalid_utf8"]) == (2, 1)


def test_half_a_surrogate_pair_in_json_is_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud800b"}\n{"text": "c\xff"}\n')
    log = ReadLog.new()
    assert [d.text for d in read(tmp_path / "a.jsonl", log=log)] == ["a\ufffdb", "c\ufffd"]
    assert log.counts["invalid_utf8_bytes"] == 2


def test_a_malformed_line_whose_fields_hold_half_a_surrogate_pair_is_told_in_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"k\\ud800": 1}\n{"text": "c"}\n')
    log = ReadLog.new()
    read(tmp_path / "a.jsonl", log=log)
    assert "(here: k\ufffd;" in log.malformed[0]
    with pytest.raises(Refusal, match="\\(here: k\ufffd;"):
        read(tmp_path / "a.jsonl", ReaderSettings(max_malformed_lines_per_file=0))


def test_newlines_and_the_byte_order_mark_stay_when_asked_to(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r")
    assert read(tmp_path / "a.txt", ReaderSettings(newlines="keep"))[0].text == "\ufeffa\r\nb\r"


MALFORMED = [
    '{"text": ',
    "[1]",
    '"text"',
    '{"txt": "a"}',
    '{"text": 3}',
    "[" * 100_000,
    '{"text": "a", "n": 1' + "0" * 5000 + "}",
]


def test_malformed_lines_are_passed_over_counted_and_located(tmp_path: Path) -> None:
    good = json.dumps({"text": "good"})
    (tmp_path / "a.jsonl").write_text("\n".join([good, *MALFORMED, good]), encoding="utf-8")
    log = ReadLog.new()
    assert [d.position for d in read(tmp_path / "a.jsonl", log=log)] == [1, 9]
    assert log.counts["malformed_lines"] == len(MALFORMED)
    assert [place.split(" ")[0] for place in log.malformed] == [f"{tmp_path.name}/a.jsonl:{n}:" for n in range(2, 9)]
    assert "here: txt" in log.malformed[3]


def test_more_malformed_lines_than_allowed_end_the_run_naming_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(MALFORMED), encoding="utf-8")
    with pytest.raises(Refusal, match=r"a\.jsonl, line 3: .*max_malformed_lines_per_file") as caught:
        read(tmp_path / "a.jsonl", ReaderSettings(max_malformed_lines_per_file=2))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.exit_code) == (str(caught.value), 2)


def strings(*texts: bytes) -> pa.Array:
    """An Arrow array of type string over any bytes, as a careless writer leaves it."""
    ends = np.cumsum([0, *map(len, texts)]).astype(np.int32)
    return pa.Array.from_buffers(
        pa.string(), len(texts), [None, pa.py_buffer(ends.tobytes()), pa.py_buffer(b"".join(texts))]
    )


def test_invalid_utf8_in_a_parquet_row_is_replaced_and_counted_like_a_files(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": strings(b"ab\xff", b"cde", b"caf\xe9 \xe9")}), tmp_path / "a.parquet")
    log = ReadLog.new()
    assert [d.text for d in read(tmp_path / "a.parquet", log=log)] == ["ab\ufffd", "cde", "caf\ufffd \ufffd"]
    assert log.counts["invalid_utf8_bytes"] == 3


def test_two_columns_of_the_text_fields_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(Refusal, match=r"a\.parquet: has 2 columns 'text'"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["one", None, "two"]),
        pa.array(["one", None, "two"], pa.large_string()),
        pa.array(["one", None, "two"], pa.string_view()),
        pa.array(["one", None, "two"]).dictionary_encode(),
        pa.array(["one", None, "two"], pa.json_()),
    ],
    ids=lambda column: str(column.type),
)
def test_every_arrow_string_type_is_text(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert [(d.text, d.position) for d in read(tmp_path / "a.parquet")] == [("one", 0), ("two", 2)]


def test_a_column_of_nulls_is_counted_and_ends_no_run(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "a.parquet")
    log = ReadLog.new()
    assert read(tmp_path / "a.parquet", log=log) == []
    assert log.counts["null_rows"] == 3


def test_a_damaged_parquet_file_is_refused_by_name_wherever_the_damage_is(tmp_path: Path) -> None:
    chooser = random.Random(4)
    pq.write_table(pa.table({"text": [prose(n, 2) for n in range(50)]}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    refused = 0
    for _ in range(150):
        raw = bytearray(whole)
        for _ in range(3):
            raw[
                chooser.randrange(len(raw) - 2000, len(raw)) if chooser.random() < 0.7 else chooser.randrange(len(raw))
            ] = chooser.randrange(256)
        (tmp_path / "a.parquet").write_bytes(raw)
        try:
            read(tmp_path / "a.parquet")
        except Refusal as error:
            refused += "a.parquet" in str(error)
    assert refused > 75


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_utf16_is_read_by_its_mark_or_its_zeros_and_said(tmp_path: Path, name: str, encoding: str) -> None:
    text = "Caf\u00e9 \u6587\u5b57 \U0001f600, twice over\r\nand a second line\u2028of it.\n"
    raw = (json.dumps({"text": text}, ensure_ascii=False) + "\n" if "jsonl" in name else text).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    log = ReadLog.new()
    assert [d.text for d in read(tmp_path / name, log=log)] == [text.replace("\r\n", "\n")]
    assert {key: n for key, n in log.counts.items() if n and key != "files"} == {
        f"files_read_as_{encoding[:6].upper()}": 1
    }


def test_wrong_bytes_of_utf16_are_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffab".encode("utf-16-le") + b"\x00\xd8" + "c".encode("utf-16-le") + b"\x41")
    log = ReadLog.new()
    assert [d.text for d in read(tmp_path / "a.txt", log=log)] == ["ab\ufffd\ufffdc\ufffd"]
    assert log.counts["invalid_utf8_bytes"] == 3


@pytest.mark.parametrize("packed", [True, False])
def test_a_line_past_the_limit_is_counted_and_never_held(tmp_path: Path, packed: bool) -> None:
    raw = b'{"text": "one"}\n{"text": "' + b"a " * (8 << 20) + b'"}\n{"text": "two"}'
    (tmp_path / "a.jsonl.gz" if packed else tmp_path / "a.jsonl").write_bytes(gzip.compress(raw) if packed else raw)
    log, settings = ReadLog.new(), ReaderSettings(max_line_bytes=1 << 20)
    tracemalloc.start()
    documents = read(tmp_path / ("a.jsonl.gz" if packed else "a.jsonl"), settings, log)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [(d.text, d.position) for d in documents] == [("one", 1), ("two", 3)]
    assert log.malformed == [
        f"{tmp_path.name}/a.jsonl{'.gz' if packed else ''}:2: longer than max_line_bytes = 1,048,576"
    ]
    assert peak < 8 << 20, "the line alone is 16 MiB"


def test_a_parquet_row_past_the_limit_is_counted(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", "x" * 5000, "two"]}), tmp_path / "a.parquet")
    log = ReadLog.new()
    assert [d.position for d in read(tmp_path / "a.parquet", ReaderSettings(max_line_bytes=1024), log)] == [0, 2]
    assert log.counts["malformed_lines"] == 1


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.txt.zst", "a.parquet"])
def test_what_unpacks_beyond_belief_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("data.text.text_stream.EXPANSION_FREE_BYTES", 1 << 16)
    raw = (json.dumps({"text": "a " * 100}) + "\n").encode() * 20_000
    if name == "a.parquet":
        texts = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["a " * 100]))
        pq.write_table(pa.table({"text": texts}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else zstandard.compress(raw))
    limit = ReaderSettings(max_expansion=20)
    with pytest.raises(Refusal, match=f"{name}: unpacks to more than 20 times") as refused:
        read(tmp_path / name, limit)
    (quoted,) = re.findall(r"leave it out, with (.*) \(or exclude", str(refused.value))
    (override,) = shlex.split(quoted)  # as a shell takes it
    remedy = override.removeprefix("corpus.exclude=['").removesuffix("']")
    assert exclude_files(list_files([str(tmp_path / name)]), (remedy,)) == []
    assert len(read(tmp_path / name, ReaderSettings(max_expansion=1e9))) >= 1


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.parquet"])
def test_a_file_that_is_not_what_its_suffix_says_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"this is plain text, whatever the name says")
    with pytest.raises(Refusal, match=f"{name}: cannot be read"):
        read(tmp_path / name)


def test_a_truncated_archive_is_named(tmp_path: Path) -> None:
    raw = random.Random(0).randbytes(100_000)
    for name, packed in (("a.txt.gz", gzip.compress(raw)), ("b.txt.zst", zstandard.compress(raw))):
        (tmp_path / name).write_bytes(packed[:-2000])
        with pytest.raises(Refusal, match=f"{name}: cannot be read"):
            read(tmp_path / name)


def test_archives_of_several_parts_are_read_to_the_end(tmp_path: Path) -> None:
    for name, compress in (("a.txt.gz", gzip.compress), ("b.txt.zst", zstandard.compress)):
        (tmp_path / name).write_bytes(compress(b"first, ") + compress(b"second"))
        assert [d.text for d in read(tmp_path / name)] == ["first, second"]


def test_an_empty_file_is_an_empty_document_for_the_filters_to_count(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    assert [d.text for d in read(tmp_path / "a.txt")] == [""]


def test_each_topic_of_the_language_reference_is_a_document_at_its_place() -> None:
    file: SourceFile = next(f for f in python_library_files() if f.format == "topics")
    topics = list(read_file(file, WHOLE, ReadLog.new()))
    source = Path(file.path).read_text(encoding="utf-8")
    assert len(topics) > 50
    assert all(source[t.position] in "'\"" for t in topics)
    assert any(t.text.startswith('The "if" statement') and "\n*****" in t.text for t in topics)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_document_characters": 10},
        {"max_malformed_lines_per_file": -1},
        {"max_line_bytes": 1},
        {"max_expansion": 1},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(Refusal, match="must be"):
        ReaderSettings(**wrong)  # type: ignore[arg-type]
