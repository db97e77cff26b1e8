"""Which files make a corpus: found by folder, file and glob, named below their root, nothing else read."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from conf.refusal import Refusal
from data.text.readers import exclude_files
from data.text.sources import (
    BROKEN_LINKS,
    HIDDEN_FILES,
    HIDDEN_FOLDERS,
    LINKED_FOLDERS,
    MATCHED_FOLDERS,
    NO_SUFFIX,
    SPECIAL_FILES,
    list_files,
    python_library_files,
)


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name, encoding="utf-8")


def test_a_folder_gives_its_readable_files_sorted_and_named_below_it(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "books/b.txt",
        "books/a.md.gz",
        "books/deep/c.jsonl.zst",
        "books/d.parquet",
        "books/e.PY",
        "books/cover.jpg",
    )
    touch(tmp_path, "books/.git/config.txt", "books/.hidden.txt")
    skipped: Counter[str] = Counter()
    files = list_files([str(tmp_path / "books")], skipped)
    assert [(f.name, f.format, f.compression) for f in files] == [
        ("books/a.md.gz", "text", "gzip"),
        ("books/b.txt", "text", None),
        ("books/d.parquet", "parquet", None),
        ("books/deep/c.jsonl.zst", "jsonl", "zstd"),
        ("books/e.PY", "text", None),
    ]
    assert skipped == {".jpg": 1, "hidden files": 1, "hidden folders": 1}
    assert files[1].bytes == len("books/b.txt")


def test_globs_and_single_files_are_named_below_their_fixed_folder(tmp_path: Path) -> None:
    touch(tmp_path, "x/one/a.txt", "x/two/b.txt", "x/two/c.md")
    assert [f.name for f in list_files([str(tmp_path / "x/**/*.txt")])] == ["x/one/a.txt", "x/two/b.txt"]
    assert [f.name for f in list_files([str(tmp_path / "x/two/c.md")])] == ["two/c.md"]


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.txt")
    assert len(list_files([str(tmp_path / "x"), str(tmp_path / "x/a.txt"), str(tmp_path / "x/*.txt")])) == 1


def test_roots_of_equal_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    touch(tmp_path, "first/data/a.txt", "second/data/a.txt")
    files = list_files([str(tmp_path / "first/data"), str(tmp_path / "second/data")])
    assert [f.name for f in files] == ["first/data/a.txt", "second/data/a.txt"]


def test_names_do_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    touch(tmp_path, "here/books/a.txt", "there/deep/books/a.txt")
    here, there = (list_files([str(tmp_path / place)]) for place in ("here/books", "there/deep/books"))
    assert [f.name for f in here] == [f.name for f in there]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], r"corpus\.paths = \[\]"),
        (["missing"], "does not exist"),
        (["*.txt"], "matches no file"),
        (["pictures"], r"holds no readable text: \.jpg \(1\)"),
        (["pictures/cover.jpg"], "a file of this suffix is not read"),
        (["empty"], "no files at all"),
    ],
)
def test_what_cannot_be_a_corpus_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str], message: str
) -> None:
    touch(tmp_path, "pictures/cover.jpg")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match=message) as refused:
        list_files(paths)
    assert "corpus.paths" in str(refused.value)
    with pytest.raises(Refusal) as refused:
        list_files(paths, key="other.paths")
    assert "other.paths" in str(refused.value) and "corpus.paths" not in str(refused.value)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder with one of everything that is no plain readable file."""
    root = tmp_path / "x"
    touch(root, "a.txt", ".hidden.txt", ".git/config.txt", "table.csv", "site.tar.gz", "LICENSE", "in/b.txt")
    touch(tmp_path, "shelf/book.txt")
    os.mkfifo(root / "pipe.txt")
    for name, target in (
        ("shelf", tmp_path / "shelf"),
        ("circle", root),
        ("again", Path(".")),
        ("self.txt", Path("self.txt")),
        ("one.txt", Path("two.txt")),
        ("two.txt", Path("one.txt")),
        ("nowhere.txt", Path("gone.txt")),
        ("null.txt", Path("/dev/null")),
        ("link.txt", tmp_path / "shelf" / "book.txt"),
    ):
        (root / name).symlink_to(target)
    (root / os.fsdecode(b"caf\xe9.txt")).write_text("x", encoding="utf-8")
    return root


def test_every_entry_of_a_folder_is_read_or_counted_under_a_reason(hostile: Path) -> None:
    skipped: Counter[str] = Counter()
    files = list_files([str(hostile)], skipped)
    assert [f.name for f in files] == ["x/a.txt", "x/caf\\xe9.txt", "x/in/b.txt", "x/link.txt"]
    assert skipped == {
        HIDDEN_FILES: 1,
        HIDDEN_FOLDERS: 1,
        LINKED_FOLDERS: 3,
        BROKEN_LINKS: 4,
        SPECIAL_FILES: 2,
        ".csv": 1,
        ".tar.gz": 1,
        NO_SUFFIX: 1,
    }
    assert Path(files[1].path).read_text(encoding="utf-8") == "x"


def test_a_pattern_goes_in_no_circles_and_counts_what_it_matches_and_does_not_take(hostile: Path) -> None:
    skipped: Counter[str] = Counter()
    found = [f.name for f in list_files([f"{hostile}/**/*.txt"], skipped)]
    assert found == ["x/a.txt", "x/caf\\xe9.txt", "x/in/b.txt", "x/link.txt"]
    assert skipped == {LINKED_FOLDERS: 3, BROKEN_LINKS: 4, SPECIAL_FILES: 2}
    skipped.clear()
    assert len(list_files([f"{hostile}/*"], skipped)) == 3
    assert skipped[MATCHED_FOLDERS] == 4


def test_a_linked_folder_named_itself_is_read(hostile: Path) -> None:
    assert [f.name for f in list_files([str(hostile / "shelf")])] == ["shelf/book.txt"]
    assert [f.name for f in list_files([f"{hostile}/shel*/*.txt"])] == ["x/shelf/book.txt"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pipe.txt", "a FIFO, a socket or a device"),
        ("null.txt", "a FIFO, a socket or a device"),
        ("self.txt", "a link to itself"),
        ("nowhere.txt", "a link to nothing"),
        ("a.txt/b.txt", "does not exist"),
        ("x" * 300, "File name too long"),
        ("zero\0byte.txt", "does not exist"),
    ],
)
def test_what_is_no_file_is_refused_by_name_and_never_waited_for(hostile: Path, name: str, message: str) -> None:
    with pytest.raises(Refusal, match=message) as refused:
        list_files([str(hostile / name)])
    assert str(refused.value).startswith("corpus.paths = '")


def test_a_home_that_nobody_has_is_refused() -> None:
    with pytest.raises(Refusal, match="does not exist"):
        list_files(["~nobody-has-this-name/texts"])


def test_a_large_folder_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.text.sources.PROGRESS_EVERY", 2)
    touch(tmp_path, *(f"x/{n}.txt" for n in range(5)))
    heard: list[int] = []
    list_files([str(tmp_path / "x")], on_progress=heard.append)
    assert heard == [2, 4]


def test_the_python_library_has_its_sources_and_no_tests_or_packages() -> None:
    names = [f.name for f in python_library_files()]
    assert names == sorted(names)
    assert {"python-library/ast.py", "python-library/asyncio/tasks.py", "python-library/pydoc_data/topics.py"} <= set(
        names
    )
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not any(name.startswith("python-library/_sysconfigdata") for name in names)
    assert [f.format for f in python_library_files() if f.name.endswith("topics.py")] == ["topics"]


def test_excluded_names_match_globs_across_folders(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.txt", "x/drafts/b.txt", "x/deep/drafts/c.txt")
    kept = exclude_files(list_files([str(tmp_path / "x")]), ("*/drafts/*",))
    assert [f.name for f in kept] == ["x/a.txt"]
