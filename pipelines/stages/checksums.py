"""Checksums that travel with an exported folder, in the form that `sha256sum -c SHA256SUMS` reads."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from conf.refusal import NO_VALUE, Refusal

NAME = "SHA256SUMS"


def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS over every file of a folder."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in names if name != NAME]
    (folder / NAME).write_text("".join(lines), encoding="utf-8")


def check_checksums(folder: Path) -> None:
    """Verify a folder's files against its SHA256SUMS, if any. Raises Refusal for a changed or missing file."""
    try:
        text = (folder / NAME).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return
    for line in text.split("\n"):
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if line and match is None:
            raise Refusal(folder / NAME, NO_VALUE, f"holds {line!r:.80}, which is no checksum", _REMEDY)
        if match is not None:
            path = folder / match[2]
            if not path.is_file() or _sha256(path) != match[1]:
                state = "is not what was exported (checksum)" if path.is_file() else "is missing"
                raise Refusal(path, NO_VALUE, state, _REMEDY)


def check_published(path: Path, sha256: str | None) -> None:
    """Compare a file of an artifact with its checksum, if there is one. Raises Refusal where it differs."""
    if sha256 is not None and _sha256(path) != sha256:
        remedy = "copy the artifact again, or run the command that made it"
        raise Refusal(path, NO_VALUE, "is not what was published (checksum)", remedy)


_REMEDY = f"copy the folder again, or delete {NAME} from it if the change is yours"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
