"""The code a job runs: the working tree as it stands, uncommitted and untracked files too, ignored ones not.

Git decides what is ignored (`.gitignore`, `.git/info/exclude`, the user's own excludes), because it is what the person
already told. The package is the same bytes for the same files, so a cluster that has it is not sent it again.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from conf.refusal import NO_VALUE, Refusal

RAY_PACKAGE_LIMIT_BYTES = 512 * 2**20
"""Ray keeps a job's package in its control store and refuses anything larger."""

_MIB = 2**20
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Package:
    """A zip of the tree. `digest` is the sha256 of its bytes."""

    path: Path
    digest: str
    files: int
    bytes: int


def working_tree(root: str | None = None) -> Path:
    """The tree to ship: `root`, or the checkout this code was loaded from. Raises Refusal if that is not a checkout."""
    tree = Path(root).expanduser().absolute() if root else Path(__file__).absolute().parents[1]
    if not (tree / "pipelines" / "__main__.py").is_file():
        raise Refusal(
            "tree",
            tree,
            "holds no pipelines/__main__.py, and a job runs `python -m pipelines` in the shipped tree",
            "give the checkout with tree=DIR",
        )
    if root is None and not (tree / "pyproject.toml").is_file():
        raise Refusal(
            "tree",
            NO_VALUE,
            f"Athanor runs from {tree}, an installed copy and not a checkout, so there is no working tree to ship",
            "install with `pip install -e`, or give a checkout with tree=DIR",
        )
    return tree


def shipped_files(tree: Path) -> list[str]:
    """Paths relative to `tree` of tracked files and of untracked files that are not ignored, sorted.

    A tree without a repository is read the same way, through an empty repository made for the question.
    """
    if _git(tree, "rev-parse", "--is-inside-work-tree").returncode == 0:
        listing = _git(tree, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    else:
        with tempfile.TemporaryDirectory() as empty:
            _git(Path(empty), "init", "-q", "--bare", empty)
            where = (f"--git-dir={empty}", f"--work-tree={tree}")
            listing = _git(tree, *where, "ls-files", "-z", "--others", "--exclude-standard")
    if listing.returncode != 0:
        raise Refusal(tree, NO_VALUE, f"git cannot list the files to ship: {listing.stderr.strip()}")
    names = sorted({name for name in listing.stdout.split("\0") if name})
    # A deleted file is still in the index, and a submodule is a folder.
    return [name for name in names if (tree / name).is_file()]


def pack(tree: Path, target: Path, *, limit_bytes: int = RAY_PACKAGE_LIMIT_BYTES) -> Package:
    """Write the shipped files to the zip `target`, byte for byte reproducible. Raises Refusal when it passes the
    limit."""
    names = shipped_files(tree)
    packed_bytes = 0
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            path = tree / name
            entry = zipfile.ZipInfo(name, date_time=_EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            executable = path.stat().st_mode & stat.S_IXUSR
            entry.external_attr = (stat.S_IFREG | (0o755 if executable else 0o644)) << 16
            archive.writestr(entry, path.read_bytes())
            packed_bytes += entry.compress_size
            if packed_bytes > limit_bytes:
                raise _too_large(tree, names, limit_bytes)
    size = target.stat().st_size
    if size >= limit_bytes:
        raise _too_large(tree, names, limit_bytes)
    with target.open("rb") as packed:
        digest = hashlib.file_digest(packed, "sha256").hexdigest()
    return Package(path=target, digest=digest, files=len(names), bytes=size)


def _too_large(tree: Path, names: list[str], limit_bytes: int) -> Refusal:
    sizes = sorted(((os.path.getsize(tree / name), name) for name in names), reverse=True)
    largest = ", ".join(f"{name} ({size / _MIB:.1f} MiB)" for size, name in sizes[:5])
    total = sum(size for size, _ in sizes) / _MIB
    return Refusal(
        tree,
        NO_VALUE,
        f"the tree to ship is {total:.0f} MiB in {len(sizes)} files and packs to more than {limit_bytes / _MIB:.0f} MiB, "
        "the most a Ray job may bring. Data belongs in the store or on a shared path",
        f"list it in .gitignore. The largest files: {largest}",
    )


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Refusal(
            "git", NO_VALUE, "was not found; it decides which files of the tree are shipped", "install git"
        ) from error
