"""From files to documents: .txt .md .py .jsonl (each also .gz or .zst), .parquet, and Python's own library.

Nothing is dropped in silence: invalid bytes, malformed lines and skipped files are counted under a reason.
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import fnmatch
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from conf.refusal import NO_VALUE, Refusal, refuse_below
from conf.refusal import field as key_of
from data.text import text_stream
from data.text.document import Document
from data.text.sources import SourceFile
from data.text.text_stream import OF_A_CORPUS, check_expansion, leave_out, lines_of, open_text

PARQUET_ROWS = 1024  # decoded together
CUT_CONTEXT = 48
MIN_CUT_CHARACTERS = 256
SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class ReaderSettings:
    """How files become documents."""

    text_field: str = "text"
    """The field of a .jsonl line, or the column of a .parquet, that holds the text."""
    max_document_characters: int | None = 65_536
    """A longer text file is cut at paragraph ends (or line ends) into documents of at most this size; null never cuts.
    Lines of .jsonl and rows of .parquet are documents as they are."""
    newlines: Literal["unix", "keep"] = "unix"
    """unix: CRLF and CR become LF, and a byte order mark at the start goes away. keep: text as it is in the file."""
    max_malformed_lines_per_file: int = 10
    """More malformed .jsonl lines (or .parquet rows) than this in one file end the run; fewer are skipped and counted."""
    max_line_bytes: int = field(default=32 << 20, metadata={"absent_at_default": True})
    """A longer .jsonl line or .parquet row is malformed, and never held in memory: a line takes some 20 times its size."""
    max_expansion: float = field(default=250, metadata={"absent_at_default": True})
    """A file that unpacks to more than this many times its bytes (and 64 MiB) is refused. Text packs 2 to 20 times."""

    def __post_init__(self) -> None:
        if self.max_document_characters is not None and self.max_document_characters < MIN_CUT_CHARACTERS:
            raise Refusal(
                "max_document_characters",
                self.max_document_characters,
                f"must be at least {MIN_CUT_CHARACTERS}",
                f"set {key_of('max_document_characters')}=null to never cut files",
            )
        refuse_below(self, 0, "max_malformed_lines_per_file")
        refuse_below(self, 1024, "max_line_bytes")
        refuse_below(self, 2, "max_expansion")


@dataclass(kw_only=True)
class ReadLog:
    """What reading left behind: counts by reason, and the first malformed places as `file:line: what`."""

    counts: Counter[str]
    malformed: list[str]

    MAX_MALFORMED_SHOWN = 20

    @classmethod
    def new(cls) -> ReadLog:
        """An empty log."""
        return cls(counts=Counter(), malformed=[])

    def note_malformed(self, file: SourceFile, line: int, what: str, allowed: int, *, unit: str = "line") -> None:
        """Count a malformed line (or row); raise Refusal when the file has more than `allowed`."""
        what = SURROGATES.sub("\ufffd", what)  # it may quote names of fields, and is printed
        self.counts["malformed_lines"] += 1
        key = f"malformed_lines in {file.name}"
        self.counts[key] += 1
        if len(self.malformed) < self.MAX_MALFORMED_SHOWN:
            self.malformed.append(f"{file.name}:{line}: {what}")
        if self.counts[key] > allowed:
            raise Refusal(
                f"{file.path}, {unit} {line}",
                NO_VALUE,
                f"{what.rstrip('.')}; this is malformed {unit} {self.counts[key]} of the file, and at most {allowed} are "
                "passed over",
                f"repair the file, or raise max_malformed_lines_per_file of {OF_A_CORPUS}, or of finetune.data.reader",
            )


def read_file(file: SourceFile, settings: ReaderSettings, log: ReadLog) -> Iterator[Document]:
    """Yield the documents of one file in order; what was skipped or repaired is added to `log`.

    Raises Refusal for a file that cannot be opened or decompressed, lacks the text field, or is malformed past the
    limit.
    """
    read = {"text": _read_text, "topics": _read_topics, "jsonl": _read_jsonl, "parquet": _read_parquet}[file.format]
    log.counts["files"] += 1
    damaged = (ValueError, LookupError) if file.format == "parquet" else ()  # of names and offsets in a damaged one
    with refuse_unreadable(file, leave_out(file), *damaged):
        yield from read(file, settings, log)


@contextlib.contextmanager
def refuse_unreadable(file: SourceFile, remedy: str, *also: type[Exception]) -> Iterator[None]:
    """Raise Refusal for a file that cannot be opened or decompressed, with the remedy of leaving it out."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException, *also) as error:
        raise Refusal(
            file.path, NO_VALUE, f"cannot be read ({type(error).__name__}: {error})", f"repair it, or {remedy}"
        ) from error


def _decoded_blocks(stream: IO[bytes], settings: ReaderSettings, log: ReadLog) -> Iterator[str]:
    """Decode UTF-8 block by block. Invalid bytes become U+FFFD and are counted."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    carry, first = "", True
    while True:
        raw = stream.read(text_stream.READ_BLOCK_BYTES)
        text = carry + decoder.decode(raw, final=not raw)
        carry = ""
        if first and text:
            text, first = (text.removeprefix("\ufeff") if settings.newlines == "unix" else text), False
        if settings.newlines == "unix" and raw and text.endswith("\r"):
            text, carry = text[:-1], "\r"  # its LF may open the next block
        text, invalid = SURROGATES.subn("\ufffd", text)
        log.counts["invalid_utf8_bytes"] += invalid
        if settings.newlines == "unix":
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if text:
            yield text
        if not raw:
            return


def _read_text(file: SourceFile, settings: ReaderSettings, log: ReadLog) -> Iterator[Document]:
    limit = settings.max_document_characters
    position, pending = 0, ""
    with open_text(file, settings.max_expansion, log.counts) as stream:
        before = log.counts["invalid_utf8_bytes"]
        blocks = _decoded_blocks(stream, settings, log)
        if limit is None:
            blocks = iter(["".join(blocks)])
        for block in blocks:
            pending += block
            while limit is not None and len(pending) > limit:
                cut = _cut_point(pending, limit)
                yield Document(text=pending[:cut], source=file.name, position=position)
                pending, position = pending[cut:], position + cut
    if pending or position == 0:
        yield Document(text=pending, source=file.name, position=position)
    log.counts["files_with_invalid_utf8"] += log.counts["invalid_utf8_bytes"] > before


def _cut_point(text: str, limit: int) -> int:
    """Return where to end a document: a paragraph end in the second half of `limit`, else a line end, else a space.

    Of several the one with the lowest hash of its surroundings, not the last: two editions of a book, shifted against
    each other by a longer preface, then fall back into step, and near-duplicate pieces can be seen as such.
    """
    for boundary in ("\n\n", "\n", " "):
        ends = (match.end() for match in re.finditer(boundary, text[: limit - 1]) if match.end() > limit // 2)
        best = min(ends, key=lambda at: (_surroundings_hash(text, at), at), default=None)
        if best is not None:
            return best
    return limit


def _surroundings_hash(text: str, at: int) -> int:
    letters = filter(str.isalnum, text[max(at - CUT_CONTEXT, 0) : at + CUT_CONTEXT].lower())
    return zlib.crc32("".join(letters).encode("utf-8"))


def _read_topics(file: SourceFile, settings: ReaderSettings, log: ReadLog) -> Iterator[Document]:
    """Yield one document per topic of pydoc_data/topics.py, the language reference behind `help("if")`."""
    source = "".join(document.text for document in _read_text(file, settings, log))
    line_starts = [0, *(match.end() for match in re.finditer("\n", source))]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Dict):
            continue
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                position = line_starts[key.lineno - 1] + key.col_offset
                yield Document(text=value.value, source=file.name, position=position)


def _read_jsonl(file: SourceFile, settings: ReaderSettings, log: ReadLog) -> Iterator[Document]:
    for line_number, record in read_json_lines(file, settings, log):
        text = record.get(settings.text_field)
        if not isinstance(text, str):
            known = ", ".join(sorted(map(str, record))) or "none"
            problem = (
                "is not text"
                if settings.text_field in record
                else f"is missing (here: {known}; reader.text_field names it)"
            )
            log.note_malformed(
                file, line_number, f"field {settings.text_field!r} {problem}", settings.max_malformed_lines_per_file
            )
            continue
        yield Document(text=_clean_text(text, settings, log), source=file.name, position=line_number)


def read_json_lines(file: SourceFile, settings: ReaderSettings, log: ReadLog) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a .jsonl file; blank lines are passed over, malformed ones counted.

    Raises Refusal past `settings.max_malformed_lines_per_file`.
    """
    allowed = settings.max_malformed_lines_per_file
    with open_text(file, settings.max_expansion, log.counts) as stream:
        for number, raw in lines_of(stream, settings.max_line_bytes):
            if raw is None:
                log.note_malformed(file, number, _too_long(settings), allowed)
                continue
            line = _decoded(raw, log)
            if not line.strip("\ufeff \t\r\n"):
                continue
            try:
                record = json.loads(line.removeprefix("\ufeff"))
            except (ValueError, RecursionError) as error:  # also of an integer of more digits than Python takes
                log.note_malformed(file, number, f"not JSON ({str(error).partition(';')[0]})", allowed)
                continue
            if isinstance(record, dict):
                yield number, record
            else:
                log.note_malformed(file, number, f"a JSON {type(record).__name__}, not an object", allowed)


def _too_long(settings: ReaderSettings) -> str:
    return f"longer than max_line_bytes = {settings.max_line_bytes:,}"


def _decoded(raw: bytes, log: ReadLog) -> str:
    """UTF-8 to text. Invalid bytes become U+FFFD and are counted."""
    return without_surrogates(raw.decode("utf-8", errors="surrogateescape"), log)


def _read_parquet(file: SourceFile, settings: ReaderSettings, log: ReadLog) -> Iterator[Document]:
    row = text_bytes = 0
    for batch in _text_batches(file, settings):
        for raw in batch:
            if raw is None:
                log.counts["null_rows"] += 1
            elif raw.size > settings.max_line_bytes:
                allowed = settings.max_malformed_lines_per_file
                log.note_malformed(file, row, _too_long(settings), allowed, unit="row")
            else:
                text_bytes += raw.size
                check_expansion(file, text_bytes, settings.max_expansion)
                text = _clean_text(_decoded(raw.to_pybytes(), log), settings, log)
                yield Document(text=text, source=file.name, position=row)
            row += 1


def first_rows(file: SourceFile, settings: ReaderSettings) -> tuple[list[int], int]:
    """Bytes of text of the first rows of a Parquet file, and how many rows it has in all."""
    with pq.ParquetFile(file.path) as parquet:
        rows = parquet.metadata.num_rows
    return [0 if raw is None else raw.size for raw in next(_text_batches(file, settings), ())], rows


def _text_batches(file: SourceFile, settings: ReaderSettings) -> Iterator[Iterator[pa.Buffer | None]]:
    """The text column of a Parquet file in batches of rows; each row the bytes of a text, or None.

    Read as a dictionary: a text that a file of kilobytes repeats a million times is then in memory once.
    """
    field = settings.text_field
    with pq.ParquetFile(file.path) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
    if schema.names.count(field) != 1:
        count = f"{schema.names.count(field)} columns" if field in schema.names else "no column"
        raise Refusal(
            file.path,
            NO_VALUE,
            f"has {count} {field!r}; its columns are {', '.join(schema.names)}",
            f"name the text column, by a name that no other has, with text_field of {OF_A_CORPUS}",
        )
    kind = _storage(schema.field(field).type)
    if not (_is_text(kind) or pa.types.is_null(kind)):
        raise Refusal(
            file.path,
            NO_VALUE,
            f"column {field!r} is {kind}, not text",
            f"name a text column with text_field of {OF_A_CORPUS}",
        )
    columns = [
        metadata.row_group(group).column(at)
        for group in range(metadata.num_row_groups)
        for at in _leaf_columns(metadata, field)
    ]
    check_expansion(file, sum(column.total_uncompressed_size for column in columns), settings.max_expansion)
    with pq.ParquetFile(file.path, metadata=metadata, read_dictionary=[field]) as parquet:
        for batch in parquet.iter_batches(batch_size=PARQUET_ROWS, columns=[field]):
            yield _buffers(batch.column(0))


def _leaf_columns(metadata: Any, field: str) -> list[int]:
    """Indices of the leaf columns of that name, the same in every row group."""
    return [at for at in range(metadata.num_columns) if metadata.schema.column(at).path == field]


def _storage(kind: pa.DataType) -> pa.DataType:
    """The type that an Arrow type is stored as: of a dictionary its values, of an extension its storage."""
    if pa.types.is_dictionary(kind):
        return _storage(kind.value_type)
    return _storage(kind.storage_type) if isinstance(kind, pa.BaseExtensionType) else kind


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _buffers(column: pa.Array) -> Iterator[pa.Buffer | None]:
    column = column.storage if isinstance(column, pa.ExtensionArray) else column
    if pa.types.is_null(column.type):
        return iter([None] * len(column))
    column = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    values = column.dictionary
    return (None if at is None else values[at].as_buffer() for at in column.indices.to_pylist())


def _clean_text(text: str, settings: ReaderSettings, log: ReadLog) -> str:
    """Apply to a record's text what reading a file does to bytes: no lone surrogates, newlines as asked."""
    text = without_surrogates(text, log)
    return text.replace("\r\n", "\n").replace("\r", "\n") if settings.newlines == "unix" else text


def without_surrogates(text: str, log: ReadLog) -> str:
    """Put U+FFFD for halves of UTF-16 pairs, which JSON may spell and no file can hold; counted as invalid bytes."""
    text, invalid = SURROGATES.subn("\ufffd", text)
    log.counts["invalid_utf8_bytes"] += invalid
    return text


def exclude_files(files: Iterable[SourceFile], patterns: tuple[str, ...]) -> list[SourceFile]:
    """Return the files whose name matches none of the glob `patterns` (`*` also crosses folders)."""
    return [file for file in files if not any(fnmatch.fnmatchcase(file.name, pattern) for pattern in patterns)]
