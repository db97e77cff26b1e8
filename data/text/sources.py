"""Which files a corpus is made of: folders, files and globs the user names, or Python's own library.

Every entry of a folder is taken, counted under a reason, or refused by name. Nothing blocks: a FIFO is not opened.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conf.refusal import NO_VALUE, Refusal

Format = Literal["text", "topics", "jsonl", "parquet"]

FORMATS: dict[str, Format] = {".txt": "text", ".md": "text", ".py": "text", ".jsonl": "jsonl"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
READABLE = ".txt, .md, .py, .jsonl (each also .gz or .zst) and .parquet"
CONVERSATIONS = ".jsonl (also .gz or .zst)"

# Why an entry of a folder is no file of the corpus; a file of another kind is counted by its suffix.
HIDDEN_FILES = "hidden files"
HIDDEN_FOLDERS = "hidden folders"
LINKED_FOLDERS = "linked folders (name them themselves to have them read)"
MATCHED_FOLDERS = "folders that a pattern matches (it takes files; end it with /** for what is below)"
BROKEN_LINKS = "links to nothing or to themselves"
SPECIAL_FILES = "FIFOs, sockets and devices"
CLOSED_FOLDERS = "folders that cannot be opened"
REASONS = (
    *(HIDDEN_FILES, HIDDEN_FOLDERS, LINKED_FOLDERS, MATCHED_FOLDERS, BROKEN_LINKS, SPECIAL_FILES, CLOSED_FOLDERS),
)
NO_SUFFIX = "no suffix"

PROGRESS_EVERY = 1000  # files, while a large folder is listed

# Tests of the library, and what pip or the build put among it: neither is the library's own source.
LIBRARY_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "__phello__"}
)
LIBRARY_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file to read. `name` is what documents record: the path below (and with) the root the user named. Bytes of a
    name that are not UTF-8 stand in it as `\\xNN`."""

    path: str
    name: str
    bytes: int
    format: Format
    compression: Literal["gzip", "zstd"] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A plain file: the root it was listed under, and its real path."""

    root: str
    path: str
    real: str
    bytes: int


def list_files(
    paths: Sequence[str],
    skipped: Counter[str] | None = None,
    *,
    key: str = "corpus.paths",
    readable: str = READABLE,
    on_progress: Callable[[int], None] = lambda files: None,
) -> list[SourceFile]:
    """Return the readable files of folders (walked), files and globs (`**` crosses folders), sorted by name.

    Names start with the root's own name, and with as many of its parents as it takes to keep two roots apart. What lies
    below a folder or glob and is not read is counted in `skipped`: under its suffix, or one of REASONS. `on_progress` is
    called with the number of files so far. Raises Refusal, which calls the setting `key` and what can be read
    `readable`, when a path does not exist or is no plain file, a file named outright is of no readable kind, or nothing
    readable is found.
    """
    if not paths:
        raise Refusal(
            key, [], "there is nothing to read", f"set it to folders, files or globs, as in '{key}=[books/,notes/*.md]'"
        )
    skipped = Counter() if skipped is None else skipped
    entries: dict[str, _Entry] = {}
    for path in paths:
        for entry in _expand(os.path.expanduser(path), path, key, skipped, paths, readable):
            entries.setdefault(entry.real, entry)
            if len(entries) % PROGRESS_EVERY == 0:
                on_progress(len(entries))
    real_roots = {root: os.path.realpath(root) for root in {entry.root for entry in entries.values()}}
    labels = _root_labels({Path(root) for root in real_roots.values()})
    files = []
    for entry in entries.values():
        kind = _kind(os.path.basename(entry.path))
        if kind is None:
            skipped[_suffix(os.path.basename(entry.path))] += 1
            continue
        below = os.path.relpath(entry.path, entry.root) if entry.root in ("", ".") else entry.path[len(entry.root) :]
        name = _printable(f"{labels[Path(real_roots[entry.root])]}/{below.lstrip('/')}".lstrip("/"))
        files.append(SourceFile(path=entry.path, name=name, bytes=entry.bytes, format=kind[0], compression=kind[1]))
    if not files:
        counted = ", ".join(f"{reason} ({count})" for reason, count in skipped.most_common(5)) or "no files at all"
        raise Refusal(key, list(paths), f"holds no readable text: {counted}", f"readable are {readable}")
    return sorted(files, key=lambda file: (file.name, file.path))


def _expand(
    path: str, given: str, key: str, skipped: Counter[str], paths: Sequence[str], readable: str
) -> Iterator[_Entry]:
    """The files of one entry of the setting `key`, written as `given` among `paths`."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        if os.path.lexists(path):
            problem = "is a link to nothing" if isinstance(error, FileNotFoundError) else _describe_error(error)
            raise Refusal(key, given, problem, "name a folder, file or glob that is there") from error
        if not glob.has_magic(path):
            remedy = _quote_remedy(given, key, paths) or "give an existing folder, file or glob"
            raise Refusal(key, given, _describe_error(error), remedy) from error
        yield from _glob(path, given, key, skipped)
        return
    if stat.S_ISDIR(status.st_mode):
        yield from _walk(path, path, skipped)
    elif not stat.S_ISREG(status.st_mode):
        raise Refusal(
            key,
            given,
            "is a FIFO, a socket or a device, and only plain files are read, since every step may read them again",
            "write its text to a file and name that",
        )
    elif _kind(os.path.basename(path)) is None:
        raise Refusal(key, given, "a file of this suffix is not read", f"readable are {readable}")
    else:
        root, real = os.path.dirname(path), os.path.realpath(path)
        yield _Entry(root=root, path=path, real=real, bytes=status.st_size)


def _quote_remedy(path: str, key: str, paths: Sequence[str]) -> str:
    """Remedy for a name that was split at its commas; empty where no such file exists."""
    for first in range(len(paths)):
        for last in range(first + 1, len(paths)):
            for comma in (",", ", "):
                name = comma.join(paths[first : last + 1])
                if path in paths[first : last + 1] and os.path.exists(os.path.expanduser(name)):
                    return f"a comma parts a list; a name that has one stands in quotes: \"{key}=['{name}']\""
    return ""


def _describe_error(error: OSError | ValueError) -> str:
    code = getattr(error, "errno", None)
    if code == errno.ELOOP:
        return "is a link to itself"
    if code in (None, errno.ENOENT, errno.ENOTDIR):
        return "does not exist"
    return f"cannot be opened ({getattr(error, 'strerror', error)})"


def _walk(root: str, top: str, skipped: Counter[str]) -> Iterator[_Entry]:
    """The plain files below `top`, folder by folder; linked and hidden folders are counted, not entered."""
    pending = [top]
    while pending:
        folder = pending.pop()
        real, folders = os.path.realpath(folder), []
        for entry in _entries(folder, skipped):
            is_folder = entry.is_dir(follow_symlinks=False)
            if entry.name.startswith("."):
                skipped[HIDDEN_FOLDERS if is_folder else HIDDEN_FILES] += 1
            elif is_folder:
                folders.append(entry.path)
            elif (
                found := _plain_file(root, entry.path, real, entry.is_symlink(), LINKED_FOLDERS, skipped)
            ) is not None:
                yield found
        pending += reversed(folders)


def _entries(folder: str, skipped: Counter[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder or ".") as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        skipped[CLOSED_FOLDERS] += 1
        return []


def _plain_file(
    root: str, path: str, real_folder: str, linked: bool, if_folder: str, skipped: Counter[str]
) -> _Entry | None:
    """The entry at `path` if it is a plain file or a link to one; else None, counted in `skipped`."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if os.path.lexists(path):  # else it was removed meanwhile
            skipped[BROKEN_LINKS] += 1
        return None
    except OSError as error:
        skipped[BROKEN_LINKS if error.errno == errno.ELOOP else CLOSED_FOLDERS] += 1
        return None
    if stat.S_ISREG(status.st_mode):
        real = os.path.realpath(path) if linked else os.path.join(real_folder, os.path.basename(path))
        return _Entry(root=root, path=path, real=real, bytes=status.st_size)
    skipped[if_folder if stat.S_ISDIR(status.st_mode) else SPECIAL_FILES] += 1
    return None


def _glob(pattern: str, given: str, key: str, skipped: Counter[str]) -> Iterator[_Entry]:
    """The plain files that a pattern matches, as glob matches it; `**` follows no links, which may go in circles."""
    parts = Path(pattern).parts
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    root, matched = os.path.join("", *parts[:first]), False
    for path in sorted(set(_matches(root, parts[first:], skipped)), key=lambda path: path.split("/")):
        found = _plain_file(root, path, "", True, MATCHED_FOLDERS, skipped)
        if found is not None:
            matched = True
            yield found
    if not matched:
        raise Refusal(key, given, "this pattern matches no file", "check it with ls (a quoted ** crosses folders)")


def _matches(folder: str, parts: tuple[str, ...], skipped: Counter[str], *, deep: bool = False) -> Iterator[str]:
    """Paths below `folder` that match the parts of a pattern, one part a level; `**` (then `deep`) any number of levels."""
    part, rest = parts[0], parts[1:]
    if part == "**":
        for below in _folders(folder, skipped):
            yield from _matches(below, rest or ("*",), skipped, deep=True)
        return
    names = [part]
    if glob.has_magic(part):
        names = fnmatch.filter([entry.name for entry in _entries(folder, skipped)], part)
        names = [name for name in names if part.startswith(".") or not name.startswith(".")]
    for path in (os.path.join(folder, name) for name in names):
        if rest:
            yield from _matches(path, rest, skipped) if os.path.isdir(path) else ()
        elif os.path.lexists(path) and not (deep and os.path.isdir(path)):  # its files match by themselves
            yield path


def _folders(top: str, skipped: Counter[str]) -> Iterator[str]:
    """`top` and the folders below it, without hidden ones; linked ones are counted."""
    pending = [top]
    while pending:
        folder = pending.pop()
        yield folder
        below = []
        for entry in _entries(folder, skipped):
            path = os.path.join(folder, entry.name)
            if os.path.isdir(path) and not entry.name.startswith("."):
                if entry.is_symlink():
                    skipped[LINKED_FOLDERS] += 1
                else:
                    below.append(path)
        pending += reversed(below)


def _kind(name: str) -> tuple[Format, Literal["gzip", "zstd"] | None] | None:
    """Return (format, compression) by a file name's suffixes, or None when the file is of no readable kind."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes[-1:] == [".parquet"]:
        return "parquet", None
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    kind = FORMATS.get(suffixes[-2] if compression and len(suffixes) > 1 else suffixes[-1]) if suffixes else None
    return (kind, compression) if kind else None  # type: ignore[return-value]


def _suffix(name: str) -> str:
    """The key that a file of another kind is counted under: `.json`, `.tar.gz`."""
    suffixes = Path(name).suffixes
    compressed = bool(suffixes) and suffixes[-1].lower() in COMPRESSIONS
    return _printable("".join(suffixes[-2 if compressed else -1 :])) or NO_SUFFIX


def _printable(name: str) -> str:
    """A file name as text: Parquet, JSON and a terminal hold no bytes that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


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
        raise Refusal(
            root,
            NO_VALUE,
            "there are no sources of this Python's library here (some distributions ship only compiled files)",
            "use a full Python, or another corpus: experiment=text 'corpus.paths=[DIR]'",
        )
    return sorted(files, key=lambda file: file.name)
