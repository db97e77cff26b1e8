"""Which files make a corpus: found by folder, file and glob, named below their root, nothing else read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from data.errors import DataError
from data.readers import exclude_files
from data.sources import list_files, python_library_files


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
    assert skipped == {".jpg": 1}
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
        ([], "corpus.paths is empty"),
        (["missing"], "does not exist"),
        (["*.txt"], "matches no file"),
        (["pictures"], r"holds no readable text: \.jpg \(1\)"),
        (["pictures/cover.jpg"], "suffix is not readable"),
        (["empty"], "no files at all"),
    ],
)
def test_what_cannot_be_a_corpus_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str], message: str
) -> None:
    touch(tmp_path, "pictures/cover.jpg")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as refused:
        list_files(paths)
    assert "corpus.paths" in str(refused.value)
    with pytest.raises(DataError) as refused:
        list_files(paths, key="other.paths")
    assert "other.paths" in str(refused.value) and "corpus.paths" not in str(refused.value)


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
