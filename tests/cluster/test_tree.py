"""What a job brings along."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from cluster.tree import pack, shipped_files, working_tree
from conf.refusal import Refusal


def git(tree: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=tree, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with one committed, one changed, one deleted, one untracked and two ignored files."""
    root = tmp_path / "tree"
    (root / "pipelines").mkdir(parents=True)
    (root / "pipelines" / "__main__.py").write_text("print('committed')\n")
    (root / "gone.py").write_text("")
    (root / ".gitignore").write_text("runs/\n*.ckpt\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    (root / "pipelines" / "__main__.py").write_text("print('changed')\n")
    (root / "gone.py").unlink()
    (root / "new file.py").write_text("untracked\n")
    (root / "runs").mkdir()
    (root / "runs" / "weights").write_text("ignored")
    (root / "sub").mkdir()
    (root / "sub" / "x.ckpt").write_text("ignored")
    return root


def test_uncommitted_and_untracked_files_are_shipped_and_ignored_ones_are_not(tree: Path, tmp_path: Path) -> None:
    package = pack(tree, tmp_path / "tree.zip")
    with zipfile.ZipFile(package.path) as archive:
        assert sorted(archive.namelist()) == [".gitignore", "new file.py", "pipelines/__main__.py"]
        assert archive.read("pipelines/__main__.py") == b"print('changed')\n"
    assert package.files == 3


def test_excludes_outside_the_tree_count_too(tree: Path) -> None:
    (tree / ".git" / "info" / "exclude").write_text("new*\n")
    assert "new file.py" not in shipped_files(tree)


def test_a_tree_without_a_repository_is_read_by_the_same_rules(tree: Path) -> None:
    for path in sorted((tree / ".git").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tree / ".git").rmdir()
    assert shipped_files(tree) == [".gitignore", "new file.py", "pipelines/__main__.py"]


def test_a_subfolder_of_a_repository_ships_only_itself(tree: Path) -> None:
    (tree / "part" / "pipelines").mkdir(parents=True)
    (tree / "part" / "pipelines" / "__main__.py").write_text("")
    assert shipped_files(tree / "part") == ["pipelines/__main__.py"]


def test_the_same_files_make_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    first = pack(tree, tmp_path / "1.zip")
    (tree / "new file.py").write_text("untracked\n")  # a new modification time
    assert pack(tree, tmp_path / "2.zip").digest == first.digest
    (tree / "new file.py").write_text("other\n")
    assert pack(tree, tmp_path / "3.zip").digest != first.digest


def test_a_tree_too_large_names_its_largest_files(tree: Path, tmp_path: Path) -> None:
    (tree / "weights.bin").write_bytes(b"".join(i.to_bytes(4, "little") for i in range(100_000)))
    with pytest.raises(Refusal, match=r"weights\.bin \(0\.4 MiB\).*") as caught:
        pack(tree, tmp_path / "tree.zip", limit_bytes=50_000)
    assert ".gitignore" in str(caught.value)


def test_this_checkout_is_found_and_ships_itself() -> None:
    files = shipped_files(working_tree())
    assert "pipelines/__main__.py" in files
    assert not [name for name in files if name.startswith((".git/", ".venv/"))]


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"pipelines/__main__\.py"):
        working_tree(str(tmp_path))
