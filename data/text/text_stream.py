"""The bytes of a file as UTF-8: unpacked within limits, UTF-16 and UTF-32 recoded, cut into lines within limits."""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import shlex
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa

from conf.refusal import NO_VALUE, Refusal
from data.text.sources import SourceFile

READ_BLOCK_BYTES = 1 << 20
OF_A_CORPUS = "corpus.reader or sources.NAME.reader"
HEAD_BYTES = 1024
"""Read to distinguish UTF-16 and UTF-32 from UTF-8."""
EXPANSION_FREE_BYTES = 64 << 20
"""Unpacked from a file before `max_expansion` applies: a small file of one repeated line does no harm."""


def open_text(file: SourceFile, max_expansion: float, counts: Counter[str]) -> IO[bytes]:
    """Open a file for reading as UTF-8, decompressed by its suffix, UTF-16 and UTF-32 recoded.

    While it is read, a truncated archive raises OSError or EOFError, and one that expands too far Refusal.
    """
    return io.BufferedReader(_Utf8(_unpacked(file), file, max_expansion, counts), READ_BLOCK_BYTES)


def _unpacked(file: SourceFile) -> IO[bytes]:
    if file.compression == "gzip":
        return gzip.GzipFile(file.path)  # type: ignore[return-value]
    if file.compression == "zstd":
        # The zstandard package ends a truncated file without a word; Arrow's decoder raises.
        return pa.CompressedInputStream(pa.OSFile(file.path), "zstd")
    return open(file.path, "rb", buffering=0)


class _Utf8(io.RawIOBase):
    """A stream's bytes recoded to UTF-8; an invalid one becomes 0xFF, which is invalid in UTF-8 too."""

    def __init__(self, stream: IO[bytes], file: SourceFile, max_expansion: float, counts: Counter[str]) -> None:
        self._stream, self._file, self._max_expansion, self._unpacked = stream, file, max_expansion, 0
        self._pending = b""
        while len(self._pending) < HEAD_BYTES and (more := self._read(HEAD_BYTES - len(self._pending))):
            self._pending += more
        self._decoder = None
        if (encoding := wide_encoding(self._pending)) is not None:
            self._decoder = codecs.getincrementaldecoder(encoding)(errors=WRONG_BYTES)
            self._pending = self._recoded(self._pending)
            counts[f"files_read_as_{encoding[:6].upper()}"] += 1

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with UTF-8, possibly not all of it; returns the number of bytes, 0 at the end of the file."""
        while not self._pending:
            raw = self._read(len(buffer))
            self._pending = raw if self._decoder is None else self._recoded(raw)
            if not raw and not self._pending:
                return 0
        taken = min(len(self._pending), len(buffer))
        buffer[:taken], self._pending = self._pending[:taken], self._pending[taken:]
        return taken

    def close(self) -> None:
        self._stream.close()
        super().close()

    def _read(self, size: int) -> bytes:
        raw = self._stream.read(size)
        self._unpacked += len(raw)
        check_expansion(self._file, self._unpacked, self._max_expansion)
        return raw

    def _recoded(self, raw: bytes) -> bytes:
        assert self._decoder is not None
        return self._decoder.decode(raw, final=not raw).encode("utf-8", errors="surrogateescape")


WRONG_BYTES = "athanor-wrong-bytes"
codecs.register_error(WRONG_BYTES, lambda error: ("\udcff" * (error.end - error.start), error.end))  # type: ignore[attr-defined]


def wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by a byte order mark or by zeros at every second byte; None for UTF-8."""
    marks = {"utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE}
    marks |= {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    for encoding, mark in marks.items():
        if head.startswith(mark):
            return encoding
    zeros = (head[::2].count(0), head[1::2].count(0))
    if max(zeros) > len(head) // 5 > 0 and 8 * min(zeros) < max(zeros):
        return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    return None


def check_expansion(file: SourceFile, unpacked: int, limit: float) -> None:
    """Raise Refusal for a packed file that holds more than `limit` times its bytes: a bomb, or one repeated line."""
    if unpacked > max(EXPANSION_FREE_BYTES, limit * file.bytes) and (file.compression or file.format == "parquet"):
        raise Refusal(
            file.path,
            NO_VALUE,
            f"unpacks to more than {limit:g} times its {file.bytes:,} bytes, as no text does",
            f"if it is text, raise max_expansion of {OF_A_CORPUS}, or of finetune.data.reader; else {leave_out(file)}",
        )


def lines_of(stream: IO[bytes], max_line_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of each line, ended by LF alone; None for one of more than `max_line_bytes`, which is never held."""
    number = 0
    while raw := stream.readline(max_line_bytes + 1):
        number += 1
        if len(raw) <= max_line_bytes or raw.endswith(b"\n"):
            yield number, raw
            continue
        while raw and not raw.endswith(b"\n"):
            raw = stream.readline(READ_BLOCK_BYTES)
        yield number, None


def leave_out(file: SourceFile) -> str:
    """The remedy for a file as a whole."""
    override = shlex.quote(f"corpus.exclude=['{glob.escape(file.name)}']")
    return f"leave it out, with {override} (or exclude of sources.NAME) in a corpus"
