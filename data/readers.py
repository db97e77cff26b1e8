"""From files to documents: .txt .md .py .jsonl (each also .gz or .zst), .parquet, and Python's own library.

Nothing is dropped in silence: invalid bytes, malformed lines and skipped files are counted under a reason.
"""

from __future__ import annotations

import ast
import codecs
import fnmatch
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data.document import Document
from data.errors import DataError
from data.sources import SourceFile

READ_BLOCK_BYTES = 1 << 20
CUT_CONTEXT = 48
OF_A_CORPUS = "corpus.reader or sources.NAME.reader"
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
    """More malformed .jsonl lines than this in one file end the run; fewer are skipped and counted."""

    def __post_init__(self) -> None:
        if self.max_document_characters is not None and self.max_document_characters < 256:
            raise DataError(
                f"max_document_characters = {self.max_document_characters}: must be at least 256, or null to never "
                "cut files."
            )
        if self.max_malformed_lines_per_file < 0:
            raise DataError(f"max_malformed_lines_per_file = {self.max_malformed_lines_per_file}: must be 0 or more.")


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

    def note_malformed(self, file: SourceFile, line: int, what: str, allowed: int) -> None:
        """Count a malformed line; raise DataError when the file has more than `allowed`."""
        self.counts["malformed_lines"] += 1
        key = f"malformed_lines in {file.name}"
        self.counts[key] += 1
        if len(self.malformed) < self.MAX_MALFORMED_SHOWN:
            self.malformed.append(f"{file.name}:{line}: {what}")
        if self.counts[key] > allowed:
            raise DataError(
                f"{file.path}, line {line}: {what}. This is malformed line {self.counts[key]} of the file and at most "
                f"{allowed} are passed over. Repair the file, or raise max_malformed_lines_per_file of {OF_A_CORPUS}, "
                "or of finetune.data.reader."
            )


def read_file(file: SourceFile, settings: ReaderSettings, log: ReadLog) -> Iterator[Document]:
    """Yield the documents of one file in order; what was skipped or repaired is added to `log`.

    Raises DataError for a file that cannot be opened or decompressed, lacks the text field, or is malformed past the
    limit.
    """
    read = {"text": _read_text, "topics": _read_topics, "jsonl": _read_jsonl, "parquet": _read_parquet}[file.format]
    log.counts["files"] += 1
    try:
        yield from read(file, settings, log)
    except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: SourceFile, error: Exception) -> DataError:
    return DataError(
        f"{file.path} cannot be read: {type(error).__name__}: {error}. Repair or remove the file, then run again."
    )


def open_bytes(file: SourceFile) -> IO[bytes]:
    """Open a file for reading, decompressing by its suffix. A truncated archive raises while it is read."""
    if file.compression == "gzip":
        return io.BufferedReader(gzip.GzipFile(file.path), READ_BLOCK_BYTES)
    if file.compression == "zstd":
        # The zstandard package ends a truncated file without a word; Arrow's decoder raises.
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(file.path), "zstd"), READ_BLOCK_BYTES)
    return open(file.path, "rb")


def _decoded_blocks(stream: IO[bytes], settings: ReaderSettings, log: ReadLog) -> Iterator[str]:
    """Decode UTF-8 block by block. Invalid bytes become U+FFFD and are counted."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    carry, first = "", True
    while True:
        raw = stream.read(READ_BLOCK_BYTES)
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
    with open_bytes(file) as stream:
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

    Raises DataError past `settings.max_malformed_lines_per_file`.
    """
    with open_bytes(file) as stream:
        for number, raw in enumerate(stream, start=1):
            line = raw.decode("utf-8", errors="surrogateescape")
            line, invalid = SURROGATES.subn("\ufffd", line)
            log.counts["invalid_utf8_bytes"] += invalid
            if not line.strip("\ufeff \t\r\n"):
                continue
            try:
                record = json.loads(line.removeprefix("\ufeff"))
            except (json.JSONDecodeError, RecursionError) as error:
                log.note_malformed(file, number, f"not JSON ({error})", settings.max_malformed_lines_per_file)
                continue
            if isinstance(record, dict):
                yield number, record
            else:
                log.note_malformed(
                    file,
                    number,
                    f"a JSON {type(record).__name__}, not an object",
                    settings.max_malformed_lines_per_file,
                )


def _read_parquet(file: SourceFile, settings: ReaderSettings, log: ReadLog) -> Iterator[Document]:
    with pq.ParquetFile(file.path) as parquet:
        names = parquet.schema_arrow.names
        if settings.text_field not in names:
            raise DataError(
                f"{file.path} has no column {settings.text_field!r}; its columns are {', '.join(names)}. "
                f"Name the text column with text_field of {OF_A_CORPUS}."
            )
        kind = parquet.schema_arrow.field(settings.text_field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(
                f"{file.path}: column {settings.text_field!r} is {kind}, not text. Name a text column with "
                f"text_field of {OF_A_CORPUS}."
            )
        row = 0
        for batch in parquet.iter_batches(batch_size=1024, columns=[settings.text_field]):
            for text in batch.column(0).to_pylist():
                if text is None:
                    log.counts["null_rows"] += 1
                else:
                    yield Document(text=_clean_text(text, settings, log), source=file.name, position=row)
                row += 1


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
