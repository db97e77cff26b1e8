"""Documents: an id is the text's hash, and a file's bytes depend on its documents alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.refusal import Refusal
from data.text.document import Document, DocumentWriter, document_files, read_documents, write_documents


def some_documents(count: int = 50) -> list[Document]:
    return [
        Document(
            text=f"text {n} é\n" * (n + 1), source=f"books/{n % 7}.txt", position=n * 10, signals={"b": n / 3, "a": 1.0}
        )
        for n in range(count)
    ]


def test_an_id_is_the_first_half_of_the_sha256_of_the_text() -> None:
    assert Document(text="é", source="a", position=0).id == hashlib.sha256("é".encode()).hexdigest()[:32]


def test_what_is_written_is_read_back_in_order(tmp_path: Path) -> None:
    documents = some_documents()
    assert write_documents(tmp_path / "00000.parquet", documents[:20]) == 20
    write_documents(tmp_path / "00001.parquet", documents[20:])
    assert list(read_documents(tmp_path)) == documents
    assert list(read_documents(tmp_path / "00001.parquet")) == documents[20:]


def test_equal_documents_make_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_documents(tmp_path / name / "0.parquet", some_documents())
    assert (tmp_path / "a/0.parquet").read_bytes() == (tmp_path / "b/0.parquet").read_bytes()


def test_a_file_broken_off_while_writing_is_not_readable(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), DocumentWriter(tmp_path / "0.parquet") as writer:  # noqa: PT012
        writer.write(some_documents(1)[0])
        raise KeyboardInterrupt
    with pytest.raises(Refusal, match="not a readable Parquet"):
        list(read_documents(tmp_path))


def test_row_groups_stay_small_however_many_documents_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.text.document.ROW_GROUP_DOCUMENTS", 8)
    write_documents(tmp_path / "0.parquet", some_documents(20))
    metadata = pq.ParquetFile(tmp_path / "0.parquet").metadata
    assert [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)] == [8, 8, 4]


def test_a_folder_without_documents_and_a_foreign_parquet_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="holds no document files"):
        document_files(tmp_path)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "foreign.parquet")
    with pytest.raises(Refusal, match="id, source, position, signals"):
        list(read_documents(tmp_path))
