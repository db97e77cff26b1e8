"""KEY=VALUE as a person types it: what a shell hands over just works, or the message says exactly how to write it."""

from __future__ import annotations

import io
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.refusal import Refusal
from data.text.corpus import corpus_files
from pipelines.__main__ import VERBS, Verb, main
from pipelines.engine.store.open import open_store
from pipelines.settings.compose import compose
from pipelines.settings.derive import Settings
from pipelines.settings.overrides import hydra_overrides, points_of
from pipelines.verbs.sweep import combinations
from tests.conftest import complaint

NAMES = (
    *("a=b.txt", "ü.txt", "文.txt", "a (1).txt", "a#b.txt", "a~b.txt", "a b.txt", "a'b.txt", 'a"b.txt', "a[1].txt"),
    *("a{x}.txt", "a!b.txt", "a;b.txt", "a&b.txt", "😀.txt", "a:b.txt", "a\\b.txt", "a%b.txt", "'tis.txt", "a$b.txt"),
    *("(.txt", "]x.txt"),
)


def value_of(word: str, *, sweep: bool = False) -> Any:
    """What Hydra reads of an override."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = hydra_overrides(["experiment=text", word], Settings, sweep=sweep)
    return OverridesParser.create().parse_override(words[1]).value()


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_any_name_is_read_as_a_shell_hands_it_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text")
    other = tmp_path / "other.txt"
    other.write_text("text")
    for paths in (f"[{tmp_path / name}]", str(tmp_path / name), f"[{other},{tmp_path / name}]"):
        settings = compose(["experiment=text", f"corpus.paths={paths}"])
        assert str(tmp_path / name) in {file.path for file in corpus_files(settings.corpus)}


@given(st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters=",\\'\"[](){}$"), min_size=1))
def test_a_setting_that_is_text_takes_any_text(text: str) -> None:
    text = text.strip()
    if text and text.lower() != "null":
        assert value_of(f"store={text}") == value_of(f"tracking.name={text}") == text
        assert value_of(f"corpus.paths=[{text}]") == value_of(f"sources.web.paths={text}") == [text]


def test_numbers_and_words_of_yaml_are_text_where_text_is_meant() -> None:
    settings = compose(["experiment=text", "store=2024", "tracking.name=1e3", "corpus.paths=[007,true,null]"])
    assert (settings.store, settings.tracking.name, settings.corpus.paths) == ("2024", "1e3", ("007", "true", "null"))
    assert compose(["experiment=text", "tracking.name=null"]).tracking.name is None
    assert compose(["experiment=text", "model='tiny'"]).model == compose(["experiment=text", "model=tiny"]).model


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("[a,b]", ["a", "b"]),
        ("['a,b','c d']", ["a,b", "c d"]),
        ("[a\\,b]", ["a,b"]),
        ('[ a , "b,c" ]', ["a", "b,c"]),
        ("[books/[ab]*.txt,x]", ["books/[ab]*.txt", "x"]),
        ("[Say (a, b),c]", ["Say (a, b)", "c"]),
        ("[a(,b]", ["a(", "b"]),
        ("[]", []),
    ],
)
def test_commas_part_a_list_and_quotes_keep_them(typed: str, read: list[str]) -> None:
    assert value_of(f"corpus.paths={typed}") == read


def test_a_name_with_a_comma_is_asked_for_in_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a, b.txt").write_text("text")
    with pytest.raises(Refusal) as told:
        corpus_files(compose(["experiment=text", "corpus.paths=[a, b.txt]"]).corpus)
    [word] = shlex.split(str(told.value).partition("stands in quotes: ")[2].removesuffix("."))
    assert [file.name for file in corpus_files(compose(["experiment=text", word]).corpus)] == [
        f"{tmp_path.name}/a, b.txt"
    ]


def test_a_tilde_is_the_home_folder_within_brackets_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.txt", "~nobody.txt"):
        (tmp_path / name).write_text("text")
    monkeypatch.chdir(tmp_path)
    settings = compose(["experiment=text", "corpus.paths=[~/a.txt,~nobody.txt]", "store=~/runs"])
    assert len(corpus_files(settings.corpus)) == 2
    assert open_store(settings.store).address("corpus", "0" * 64).startswith(str(tmp_path / "runs"))


def test_dollar_signs_can_be_meant_as_they_stand() -> None:
    with pytest.raises(Refusal, match="refers to the setting x") as told:
        compose(["experiment=text", "store=a/${x}"])
    assert r"'\${x}'" in str(told.value)
    assert compose(["experiment=text", r"store='a/\${x}'"]).store == "a/${x}"
    assert compose(["experiment=text", "store=a/${seed}"]).store == "a/0"


def test_what_cannot_be_read_says_how_to_write_it(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        return complaint(capsys, "plan", "experiment=text", *words)

    assert "the bracket is not closed. Write 'corpus.paths=[a]'" in said("corpus.paths=[a")
    assert "an entry of the list is empty. Write 'corpus.paths=[a]'" in said("corpus.paths=[a,]")
    assert "Write 'corpus.paths=[a,b]' or " in said("corpus.paths=a,b")
    assert "optim.lr = '3(4)': expected a finite number" in said("optim.lr=3(4)")
    assert "optim.lr = 'ü': expected a finite number" in said("optim.lr=ü")
    assert "'auto', 'on'" not in (choice := said("pretrain.compile=ö")) and "must be one of auto, on, off" in choice
    assert "Lists are written [a,b]" in said("model.pattern=[{first: ü}]")
    assert "ASCII letters, digits and _" in said("sources.bücher.paths=[a]")
    assert (
        "~tracking: tracking is a group, which has one option chosen. Write one of tracking=off, tracking=wandb."
        in (said("~tracking"))
    )
    assert said("~pretrain").startswith("athanor: pretrain: has no value and no default")


def test_several_values_are_a_sweep_where_they_are_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("optim.lr=1e-3,3e-4", "optim.lr=choice(1e-3,3e-4)", "model=tiny,demo", "model=choice(tiny,demo)"):
        assert "several values are a sweep" in complaint(capsys, "plan", "experiment=text", word)
    assert value_of("store=a,b") == "a,b"


def test_points_of_a_sweep_keep_their_text() -> None:
    words = ["experiment=text", "corpus.paths=[ü (1).txt,b]", "tracking.name=a=b,c", "model=choice(tiny,demo)"]
    points = [compose(point) for point in points_of(words, Settings)]
    assert [settings.tracking.name for settings in points] == ["a=b", "a=b", "c", "c"]
    assert {settings.corpus.paths for settings in points} == {("ü (1).txt", "b")}
    assert points[0].model != points[1].model


@pytest.mark.parametrize("value", ["interval(0,1)", "choice()", "range(1)x", "glob(*)"])
def test_a_sweep_without_values_to_try_is_refused_in_a_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, value: str
) -> None:
    (tmp_path / "a.txt").write_text("text")
    words = ("run", "-m", "experiment=text", f"corpus.paths=[{tmp_path}]", f"optim.lr={value}")
    assert complaint(capsys, *words).startswith("athanor: optim.lr = ")


def test_a_point_that_cannot_be_is_one_mistake_and_the_others_run(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    points = combinations(["experiment=text", f"corpus.paths=[{tmp_path}]", "optim.lr=choice(1e-3,x)"])
    assert [point.settings is None for point in points] == [False, True]
    assert "optim.lr = 'x': expected a finite number" in str(points[1].refusal)


def test_bytes_that_are_not_utf8_are_a_path_or_one_refusal() -> None:
    assert compose(["experiment=text", "corpus.paths=[/a/\udcff]"]).corpus.paths == ("/a/\udcff",)
    with pytest.raises(Refusal, match=r"^evaluate\.samples\.prompts = 'a\\udcff': holds bytes that are not UTF-8"):
        compose(["experiment=text", "evaluate.samples.prompts=[a\udcff]"])


def test_a_terminal_without_utf8_is_spelled_to_and_no_command_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1", write_through=True))
    monkeypatch.setitem(VERBS, "plan", Verb(help="", function=lambda options: sys.stdout.write("文 é") and 0))
    with pytest.raises(SystemExit) as left:
        main(["plan", "experiment=text"])
    assert left.value.code == 0 and written.getvalue() == b"\\u6587 \xe9"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written := io.BytesIO(), encoding="utf-8", write_through=True))
    monkeypatch.setitem(VERBS, "plan", Verb(help="", function=lambda options: sys.stdout.write("文 \udcff") and 0))
    with pytest.raises(SystemExit):
        main(["plan", "experiment=text"])
    assert written.getvalue() == "文 \\udcff".encode()
