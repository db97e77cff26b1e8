"""The unit of text between reading and tokenizing: a document, and the Parquet files it lives in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from conf.refusal import NO_VALUE, Refusal

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("signals", pa.map_(pa.string(), pa.float64()), nullable=False),
    ]
)

# A row group is closed at whichever comes first, so that reading one back stays within tens of megabytes.
ROW_GROUP_DOCUMENTS = 4096
ROW_GROUP_CHARACTERS = 16 << 20


def document_id(text: str) -> str:
    """Return the first 32 hex digits of the SHA-256 of `text` in UTF-8. Equal ids mean equal text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text and where it came from.

    `source` names the file below the root the user gave. `position` finds the text in it: the character offset (after
    decoding and newline normalization) in a text file, the line from 1 in a .jsonl, the row from 0 in a .parquet.
    `signals` are the numbers the filters saw.
    """

    text: str
    source: str
    position: int
    signals: Mapping[str, float] = field(default_factory=dict)
    id: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", document_id(self.text))


class DocumentWriter:
    """Write documents to one Parquet file whose bytes depend on the documents alone.

    A context manager; without a clean exit the file is left unfinished (no footer), so nothing can mistake it for
    whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.documents = 0
        self.text_bytes = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd", compression_level=3, version="2.6")
        self._pending: list[Document] = []
        self._pending_characters = 0

    def write(self, document: Document) -> None:
        """Append one document."""
        self._pending.append(document)
        self._pending_characters += len(document.text)
        if len(self._pending) >= ROW_GROUP_DOCUMENTS or self._pending_characters >= ROW_GROUP_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        table = pa.table(
            {
                "id": [d.id for d in self._pending],
                "text": pa.array([d.text for d in self._pending], type=pa.large_string()),
                "source": [d.source for d in self._pending],
                "position": [d.position for d in self._pending],
                "signals": pa.array(
                    [sorted(d.signals.items()) for d in self._pending], type=SCHEMA.field("signals").type
                ),
            },
            schema=SCHEMA,
        )
        self._writer.write_table(table, row_group_size=len(self._pending))
        self.documents += len(self._pending)
        self.text_bytes += sum(len(d.text.encode("utf-8")) for d in self._pending)
        self._pending, self._pending_characters = [], 0

    def close(self) -> None:
        """Write what is pending and the footer that makes the file whole."""
        self._flush()
        self._writer.close()

    def __enter__(self) -> DocumentWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()


def write_documents(path: Path, documents: Iterable[Document]) -> int:
    """Write `documents` to one Parquet file and return how many there were."""
    with DocumentWriter(path) as writer:
        for document in documents:
            writer.write(document)
    return writer.documents


def document_files(path: Path) -> list[Path]:
    """Return the Parquet files of a document folder in name order, or the one file that `path` is.

    Raises Refusal when there is none.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    if not files:
        raise Refusal(
            path,
            NO_VALUE,
            "holds no document files (*.parquet), which the corpus step writes",
            "run that step (athanor run), or give the folder of a corpus",
        )
    return files


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of a Parquet file, or of all of a folder's files in name order. Memory: one row group."""
    for file in document_files(path):
        yield from _read_file(file)


def _read_file(file: Path) -> Iterator[Document]:
    try:
        parquet = pq.ParquetFile(file)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _damaged(file, error) from error
    with parquet:
        missing = [name for name in SCHEMA.names if name not in parquet.schema_arrow.names]
        if missing:
            raise Refusal(
                file,
                NO_VALUE,
                f"lacks the column(s) {', '.join(missing)} of a document file",
                "if it is a file of yours, name it in the paths of a corpus",
            )
        for group in range(parquet.num_row_groups):
            try:
                columns = parquet.read_row_group(group).to_pydict()
            except (OSError, ValueError, LookupError, pa.ArrowException) as error:
                raise _damaged(file, error) from error
            rows = zip(*(columns[name] for name in ("id", "text", "source", "position", "signals")), strict=True)
            for identity, text, source, position, signals in rows:
                yield Document(id=identity, text=text, source=source, position=position, signals=dict(signals))


def _damaged(file: Path, error: Exception) -> Refusal:
    return Refusal(file, NO_VALUE, f"is not a readable Parquet file ({error})", "remove its artifact and run again")
