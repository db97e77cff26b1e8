"""The corpus step: nothing lost uncounted, nothing held out seen in training, the same bytes wherever shards run."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.refusal import Refusal
from data.text.corpus import CorpusSettings, build_corpus, corpus_files, in_process, plan_shards
from data.text.decontaminate import HeldOutSettings, is_held_out
from data.text.document import Document, document_id, read_documents
from data.text.readers import ReaderSettings
from data.text.sources import READABLE, SourceFile, list_files


def prose(seed: int, words: int = 250) -> str:
    chooser = random.Random(seed)
    vocabulary = [
        f"{a}{b}" for a in ("lo", "mi", "ra", "te", "vu", "ka") for b in ("na", "ser", "tik", "o", "bel", "um")
    ]
    return " ".join(chooser.choices(vocabulary, k=words))


def write_texts(folder: Path, texts: Mapping[str, str]) -> CorpusSettings:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return CorpusSettings(paths=(str(folder),), shard_bytes=20_000, held_out=HeldOutSettings(fraction=0.2))


def build(settings: CorpusSettings, root: Path) -> tuple[dict[str, Any], list[Document], list[Document]]:
    out, scratch = root / "out", root / "scratch"
    out.mkdir(parents=True)
    build_corpus(settings, out, in_process(out, scratch), scratch=scratch)
    card = json.loads((out / "card.json").read_text(encoding="utf-8"))
    return card, list(read_documents(out / "train")), list(read_documents(out / "heldout"))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_every_document_is_kept_or_dropped_under_a_reason(tmp_path: Path) -> None:
    texts = {f"{n:03d}.txt": prose(n) for n in range(100)}
    texts |= {f"copy{n}.txt": prose(n) for n in range(7)}
    texts |= {f"near{n}.txt": prose(n) + " and one more" for n in range(10, 15)}
    texts |= {"short.txt": "too short", "empty.txt": "", "numbers.txt": "12 34 56\n78 90 12\n11 22 33\n44 55 66 77"}
    card, train, held_out = build(write_texts(tmp_path / "in", texts), tmp_path)
    assert card["documents_read"] == card["files"] == len(texts)
    assert card["dropped"] == {
        "empty": 1,
        "exact_duplicate": 7,
        "few_letters": 1,
        "near_duplicate": 5 - card["dropped"].get("near_duplicate_of_held_out", 0),
        "too_short": 1,
    } | {key: n for key, n in card["dropped"].items() if key == "near_duplicate_of_held_out"}
    assert card["dropped_documents"] == 15
    assert len(train) + len(held_out) == 100
    assert (card["train_documents"], card["heldout_documents"]) == (len(train), len(held_out))
    assert card["train_bytes"] == sum(len(d.text.encode()) for d in train)
    assert held_out


def in_training(variant: Callable[[int], str]) -> str:
    """The first variant of a text that the split leaves in training."""
    return next(text for text in map(variant, range(1, 50)) if not is_held_out(document_id(text), 0.2))


def test_no_training_document_is_near_contains_or_is_inside_a_held_out_one(tmp_path: Path) -> None:
    texts = {f"{n:03d}.txt": prose(n) for n in range(60)}
    settings = write_texts(tmp_path / "in", texts)
    _, _, held_out = build(settings, tmp_path / "first")
    secret = held_out[0].text
    extra = {
        "a-near.txt": in_training(lambda n: f"{secret} and {n} more"),
        "b-contains.txt": in_training(lambda n: f"{prose(1000, 800)} {n} {secret} {prose(1001, 800)}"),
        "c-inside.txt": in_training(lambda n: " ".join(secret.split()[n : n + 160])),
    }
    card, train, held_out = build(write_texts(tmp_path / "in", extra), tmp_path / "second")
    assert secret in {d.text for d in held_out}
    assert not {"in/a-near.txt", "in/b-contains.txt", "in/c-inside.txt"} & {d.source for d in train}
    reasons = ("near_duplicate_of_held_out", "contains_held_out", "inside_held_out")
    assert [card["dropped"].get(reason) for reason in reasons] == [1, 1, 1]


def test_a_document_never_changes_sides_as_the_corpus_grows(tmp_path: Path) -> None:
    settings = write_texts(tmp_path / "in", {f"{n:03d}.txt": prose(n) for n in range(60)})
    _, _, before = build(settings, tmp_path / "first")
    write_texts(tmp_path / "in", {f"{n:03d}.txt": prose(n) for n in range(60, 120)})
    _, _, after = build(settings, tmp_path / "second")
    assert {d.id for d in before} <= {d.id for d in after}


class TwoProcesses:
    """A map_shards that starts shards in reverse order in other processes, with payloads pickled."""

    def __init__(self, out_dir: Path, scratch: Path) -> None:
        self.folders = {False: out_dir, True: scratch}

    def __call__(
        self,
        fn: Callable[[Any, Path], dict[str, Any]],
        payloads: Mapping[str, Any],
        *,
        label: str,
        scratch: bool = False,
    ) -> dict[str, dict[str, Any]]:
        with ProcessPoolExecutor(2) as pool:
            futures = {name: pool.submit(fn, payloads[name], self.folders[scratch]) for name in reversed(payloads)}
            return {name: json.loads(json.dumps(futures[name].result())) for name in payloads}


def test_the_corpus_is_the_same_bytes_whoever_runs_its_shards(tmp_path: Path) -> None:
    settings = write_texts(tmp_path / "in", {f"{n:03d}.txt": prose(n) for n in range(80)})
    build(settings, tmp_path / "one")
    out, scratch = tmp_path / "two/out", tmp_path / "two/scratch"
    out.mkdir(parents=True)
    build_corpus(settings, out, TwoProcesses(out, scratch), scratch=scratch)
    assert digests(out) == digests(tmp_path / "one/out")
    assert len([name for name in digests(out) if name.startswith("train/")]) > 3


def test_where_the_files_lie_does_not_enter_the_corpus(tmp_path: Path) -> None:
    texts = {f"{n:03d}.txt": prose(n) for n in range(30)}
    for place in ("a", "far/away/b"):
        build(write_texts(tmp_path / place / "in", texts), tmp_path / place)
    assert digests(tmp_path / "a/out") == digests(tmp_path / "far/away/b/out")


def test_shards_follow_from_the_files_alone_and_none_is_lost() -> None:
    files = [SourceFile(path=f"/{n}", name=f"{n:03d}", bytes=n % 7 * 100, format="text") for n in range(200)]
    shards = plan_shards(files, 1000)
    assert [file for shard in shards for file in shard] == files
    assert all(shard for shard in shards)
    assert all(sum(f.bytes for f in shard) <= 1000 for shard in shards)
    assert [len(shard) for shard in plan_shards(files, 1)] == [len(shard) for shard in plan_shards(files, 1)]
    assert plan_shards([replace(files[3], bytes=10**12)], 1000) == [(replace(files[3], bytes=10**12),)]
    assert plan_shards([replace(file, bytes=0) for file in files], 1000) == [tuple(replace(f, bytes=0) for f in files)]


@pytest.mark.parametrize(("documents", "held"), [(4, 1), (12, 2), (40, 4)])
def test_when_chance_holds_out_too_little_the_lowest_hashes_are_taken(
    tmp_path: Path, documents: int, held: int
) -> None:
    texts = {f"{n}.txt": prose(n) for n in range(documents)}
    settings = replace(write_texts(tmp_path / "in", texts), held_out=HeldOutSettings(fraction=1e-9))
    _, train, held_out = build(settings, tmp_path)
    assert {d.id for d in held_out} == set(sorted(d.id for d in [*train, *held_out])[:held])
    assert len(train) == documents - held


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"a.txt": ""}, "corpus: empty, "),
        (
            {"a.txt": "short", "b.txt": "1 2 3"},
            r"corpus: empty, .*2 documents too short \(filters.min_characters = 32\)",
        ),
        ({"a.txt": "\ufffd" * 40}, "corpus: empty, .*1 documents that are not UTF-8"),
        ({"a.jsonl": "{}"}, "corpus: empty, .*1 malformed lines"),
        ({"a.txt": prose(1)}, "each needs at least 1"),
        ({"a.txt": prose(1), "b.txt": prose(1)}, "each needs at least 1"),
        ({"a.txt": prose(1), "b.txt": prose(1) + " and more"}, "each needs at least 1"),
    ],
)
def test_a_corpus_with_nothing_to_train_or_evaluate_on_is_refused(
    tmp_path: Path, texts: dict[str, str], message: str
) -> None:
    with pytest.raises(Refusal, match=message):
        build(write_texts(tmp_path / "in", texts), tmp_path)


def test_what_is_left_out_is_told_with_the_setting_and_the_count(tmp_path: Path) -> None:
    texts = {f"{n:03d}.txt": prose(n) for n in range(40)} | {f"copy{n}.txt": prose(n) for n in range(7)}
    texts |= {
        "short.txt": "too short",
        "latin.jsonl": '{"text": 1}\n',
        "table.csv": "1,2",
        "x.json": "{}",
        "y.json": "[]",
    }
    texts |= {"notes/a.txt": prose(100), ".hidden.txt": "x"}
    settings = replace(write_texts(tmp_path / "in", texts), exclude=("*/notes/*",))
    card, _, _ = build(settings, tmp_path)
    assert card["left_out"] == {
        "copies of other documents": 7,
        "documents too short (filters.min_characters = 32)": 1,
        "malformed lines or rows, the first: in/latin.jsonl:1: field 'text' is not text": 1,
        "hidden files": 1,
        "files that `exclude` names": 1,
        f"files of other kinds (.json 2, .csv 1); readable are {READABLE}": 3,
    }


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_where_a_shared_notice_leaves_nothing_it_is_named_and_the_remedy_works(tmp_path: Path, suffix: str) -> None:
    """30 documents of 40 words behind a notice of 154: those in training are all mostly held-out text."""
    texts = [f"{prose(1000, 154)} {prose(n, 40)}" for n in range(30)]
    lines = {"all.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts)}
    settings = write_texts(
        tmp_path / "in", lines if suffix == "jsonl" else {f"{n}.txt": t for n, t in enumerate(texts)}
    )
    with pytest.raises(
        Refusal, match=r"documents that are mostly held-out text \(held_out.max_overlap = 0.5\)"
    ) as refused:
        build(settings, tmp_path / "refused")
    assert "30 document(s) 0 would be left to train on" in str(refused.value)
    assert "max_document_characters" not in str(refused.value) and "Give more text" not in str(refused.value)
    loosened = replace(settings, held_out=replace(settings.held_out, max_overlap=None))
    assert build(loosened, tmp_path / "made")[0]["train_documents"] > 20


def test_only_files_that_can_be_cut_are_told_to_be_cut(tmp_path: Path) -> None:
    for name, told in (("a.txt", True), ("a.jsonl", False)):
        text = prose(1) if told else json.dumps({"text": prose(1)})
        with pytest.raises(Refusal, match="Give more text") as refused:
            build(write_texts(tmp_path / name / "in", {name: text}), tmp_path / name)
        assert ("max_document_characters" in str(refused.value)) is told


def test_one_long_file_is_enough_for_a_corpus(tmp_path: Path) -> None:
    text = "\n\n".join(prose(n) for n in range(100))
    settings = replace(
        write_texts(tmp_path / "in", {"a.txt": text}), reader=ReaderSettings(max_document_characters=8192)
    )
    _, train, held_out = build(settings, tmp_path)
    assert sorted(d.position for d in [*train, *held_out])[0] == 0
    assert all(text[d.position : d.position + len(d.text)] == d.text for d in [*train, *held_out])


def test_excluding_everything_is_refused(tmp_path: Path) -> None:
    settings = replace(write_texts(tmp_path / "in", {"a.txt": "a"}), exclude=("*",))
    with pytest.raises(Refusal, match="leaves none of the 1 files"):
        corpus_files(settings)


def test_settings_and_files_travel_to_workers(tmp_path: Path) -> None:
    settings = write_texts(tmp_path / "in", {"a.txt": "a"})
    files = list_files(settings.paths)
    assert pickle.loads(pickle.dumps((settings, files))) == (settings, files)
