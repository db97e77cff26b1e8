"""Which files a corpus is made of: folders, files and globs the user names, or Python's own library."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.errors import DataError

Format = Literal["text", "topics", "jsonl", "parquet"]

FORMATS: dict[str, Format] = {".txt": "text", ".md": "text", ".py": "text", ".jsonl": "jsonl"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
READABLE = ".txt, .md, .py, .jsonl (each also .gz or .zst) and .parquet"

# Tests of the library, and what pip or the build put among it: neither is the library's own source.
LIBRARY_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "__phello__"}
)
LIBRARY_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file to read. `name` is what documents record: the path below (and with) the root the user named."""

    path: str
    name: str
    bytes: int
    format: Format
    compression: Literal["gzip", "zstd"] | None = None


def list_files(
    paths: Sequence[str], skipped: Counter[str] | None = None, *, key: str = "corpus.paths"
) -> list[SourceFile]:
    """Return the readable files of folders (walked), files and globs (`**` crosses folders), sorted by name.

    Names start with the root's own name, and with as many of its parents as it takes to keep two roots apart. Files of
    other kinds below a folder or glob are counted by suffix in `skipped`. Raises DataError, which calls the setting `key`,
    when a path does not exist, a file named outright is of no readable kind, or nothing readable is found.
    """
    if not paths:
        raise DataError(
            f"{key} is empty: nothing to read. Set it to folders, files or globs, as in {key}=[books/,notes/*.md]."
        )
    skipped = Counter() if skipped is None else skipped
    found: dict[str, tuple[Path, Path]] = {}
    for path in paths:
        for root, file in _expand(path, key):
            found.setdefault(str(file.resolve()), (root, file))
    labels = _root_labels({root.resolve() for root, _ in found.values()})
    files = []
    for root, file in found.values():
        kind = _kind(file)
        if kind is None:
            skipped[file.suffix or file.name] += 1
            continue
        name = "/".join((labels[root.resolve()], *file.relative_to(root).parts)).strip("/")
        files.append(
            SourceFile(path=str(file), name=name, bytes=file.stat().st_size, format=kind[0], compression=kind[1])
        )
    if not files:
        seen = ", ".join(f"{suffix} ({count})" for suffix, count in skipped.most_common(5)) or "no files at all"
        raise DataError(f"{key} = {list(paths)} holds no readable text: {seen}. Readable are {READABLE}.")
    return sorted(files, key=lambda file: (file.name, file.path))


def _expand(path: str, key: str) -> Iterable[tuple[Path, Path]]:
    """Yield (root, file) for one entry of the setting `key`."""
    given = Path(path).expanduser()
    if given.is_dir():
        for folder, folders, names in os.walk(given):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if not name.startswith("."):
                    yield given, Path(folder, name)
    elif given.is_file():
        if _kind(given) is None:
            raise DataError(f"{key} names {path}, whose suffix is not readable. Readable are {READABLE}.")
        yield given.parent, given
    elif glob.has_magic(path):
        root = Path(*_before_magic(given.parts))
        matches = sorted(Path(match) for match in glob.glob(str(given), recursive=True))
        if not any(match.is_file() for match in matches):
            raise DataError(
                f"{key} names {path}, and that pattern matches no file. Check it with ls (a quoted ** crosses folders)."
            )
        yield from ((root, match) for match in matches if match.is_file())
    else:
        raise DataError(f"{key} names {path}, which does not exist. Give an existing folder, file or glob.")


def _before_magic(parts: tuple[str, ...]) -> Iterable[str]:
    for part in parts[:-1]:
        if glob.has_magic(part):
            return
        yield part


def _kind(file: Path) -> tuple[Format, Literal["gzip", "zstd"] | None] | None:
    """Return (format, compression) by suffix, or None when the file is of no readable kind."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes[-1:] == [".parquet"]:
        return "parquet", None
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    kind = FORMATS.get(suffixes[-2] if compression and len(suffixes) > 1 else suffixes[-1]) if suffixes else None
    return (kind, compression) if kind else None  # type: ignore[return-value]


def _root_labels(roots: set[Path]) -> dict[Path, str]:
    """Name each root by its last path components, as few as keep all roots apart."""
    depth = max((len(root.parts) for root in roots), default=1)
    for count in range(1, depth + 1):
        labels = {root: "/".join(part.strip("/") for part in root.parts[-count:]) for root in roots}
        if len(set(labels.values())) == len(roots):
            return labels
    raise AssertionError("resolved paths differ, so their whole paths do")


def python_library_files() -> list[SourceFile]:
    """Return the sources of the Python that runs this, by name: no tests, no installed packages, no build output.

    pydoc_data/topics.py, the language reference as strings, gets its own format so that each topic is a document.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            n for n in folders if n not in LIBRARY_SKIPPED_FOLDERS and not n.startswith(LIBRARY_SKIPPED_PREFIXES)
        )
        for name in sorted(names):
            if not name.endswith(".py") or name.startswith(LIBRARY_SKIPPED_PREFIXES):
                continue
            file = Path(folder, name)
            relative = file.relative_to(root).as_posix()
            kind: Format = "topics" if relative == "pydoc_data/topics.py" else "text"
            files.append(
                SourceFile(path=str(file), name=f"python-library/{relative}", bytes=file.stat().st_size, format=kind)
            )
    if not files:
        raise DataError(
            f"This Python has no library sources under {root} (some distributions ship only compiled files). "
            "Use a full Python, or another corpus: experiment=text corpus.paths=[...]."
        )
    return sorted(files, key=lambda file: file.name)
