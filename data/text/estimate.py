"""How much text there is in files, estimated from a sample of each kind of file, for `plan`.

text_bytes(files, ReaderSettings())     # 28.6e6 for 10.6 MB of .txt.gz
bytes_per_token(4096)                   # 3.5
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from conf.refusal import Refusal
from data.text.readers import ReaderSettings, first_rows
from data.text.sources import SourceFile
from data.text.text_stream import wide_encoding

SAMPLED_FILES = range(16, 513)  # of each kind, evenly over their names: as many as hold about what follows
SAMPLED_BYTES_IN_ALL = 16 << 20
SAMPLED_BYTES = 1 << 20  # of each, unpacked

BYTES_PER_TOKEN = {512: 1.9, 1024: 2.55, 4096: 3.5, 16_384: 4.1, 32_768: 4.25, 131_072: 4.6}
"""By size of vocabulary: measured on eight novels, WikiText and Python's library, which differ by 5 % (BPE of our own);
the last from published tokenizers. Between them by the logarithm of the size."""


def bytes_per_token(vocab_size: int) -> float:
    """Estimated bytes of English or code in a token of a vocabulary of this size."""
    sizes = [math.log(size) for size in BYTES_PER_TOKEN]
    return round(float(np.interp(math.log(vocab_size), sizes, list(BYTES_PER_TOKEN.values()))), 2)


def text_bytes(
    files: Sequence[SourceFile], settings: ReaderSettings, *, text_of: Callable[[dict[str, Any]], str] | None = None
) -> int:
    """Estimated bytes of text in all files: a sample of each format and compression is unpacked, the rest goes by size.

    text_of: the text of a .jsonl record, where it is not the one of `settings.text_field`.
    """

    def record_text(record: dict[str, Any]) -> Any:
        return text_of(record) if text_of is not None else record.get(settings.text_field)

    total = 0.0
    for kind in {(file.format, file.compression) for file in files}:
        alike = [file for file in files if (file.format, file.compression) == kind]
        size = sum(file.bytes for file in alike)
        max_files = min(
            max(SAMPLED_BYTES_IN_ALL * len(alike) // max(size, 1), SAMPLED_FILES.start), SAMPLED_FILES.stop - 1
        )
        step = -(-len(alike) // max_files)
        samples = [amounts for file in alike[::step] if (amounts := _sampled(file, settings, record_text)) is not None]
        packed, text = (sum(column) for column in zip(*samples, strict=True)) if samples else (1, 1)
        total += size * text / max(packed, 1)
    return round(total)


def _sampled(
    file: SourceFile, settings: ReaderSettings, text_of: Callable[[dict[str, Any]], Any]
) -> tuple[float, float] | None:
    """Bytes on disk of the sample and bytes of text in them; None for a file that cannot be read."""
    try:
        if file.format == "parquet":
            rows, of_all = first_rows(file, settings)
            return file.bytes, sum(rows) / max(len(rows), 1) * of_all
        packed, raw, whole = _head(file)
        if file.format == "jsonl":
            lines = raw.split(b"\n")
            lines = lines if whole else lines[:-1] or lines
            read = sum(len(line) + 1 for line in lines)
            return packed * min(read / max(len(raw), 1), 1.0), sum(_text_of_line(line, text_of) for line in lines)
        return packed, len(_utf8(raw))
    except (OSError, EOFError, ValueError, LookupError, Refusal, pa.ArrowException):
        return None


def _head(file: SourceFile) -> tuple[int, bytes, bool]:
    """Bytes of the file that were read, what they unpack to, and whether that is all of it."""
    if file.compression == "zstd":
        packed = pa.OSFile(file.path)
        with pa.CompressedInputStream(packed, "zstd") as stream:  # closes both
            raw = stream.read(SAMPLED_BYTES)
            return min(packed.tell(), file.bytes), raw, len(raw) < SAMPLED_BYTES
    with open(file.path, "rb") as plain:
        raw = gzip.GzipFile(fileobj=plain).read(SAMPLED_BYTES) if file.compression else plain.read(SAMPLED_BYTES)
        whole = len(raw) < SAMPLED_BYTES
        return file.bytes if whole else min(plain.tell(), file.bytes), raw, whole


def _utf8(raw: bytes) -> bytes:
    encoding = wide_encoding(raw[:1024])
    return raw if encoding is None else raw.decode(encoding, errors="ignore").encode("utf-8", errors="ignore")


def _text_of_line(line: bytes, text_of: Callable[[dict[str, Any]], Any]) -> int:
    try:
        record = json.loads(line)
        text = text_of(record) if isinstance(record, dict) else None
    except (ValueError, RecursionError, TypeError, KeyError):
        return 0
    return len(text.encode("utf-8", errors="replace")) if isinstance(text, str) else 0
