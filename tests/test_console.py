"""What a person sees while steps run: one bar for what is counted, or lines now and then where there is no terminal."""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipelines.console.display import Display, Pace, console, count, print_steps, size, summary
from pipelines.engine.events import Event, StepReport
from pipelines.engine.files import FileHashes
from pipelines.engine.resolve import resolve
from pipelines.graph import build
from pipelines.settings.compose import compose
from pipelines.verbs.commands import _next_words
from tests.conftest import ROOT

PROGRAM = """
import sys, time
from pipelines.console import display as console
from pipelines.engine.events import Event

console.QUIET_SECONDS = 0.5
with console.Display() as display:
    display.event(Event(kind="started", step="pretrain", digest="d"))
    for done in range(1, 11):
        note = f"loss {9 - done / 10:.3f}"
        display.event(Event(kind="progress", step="pretrain", digest="d", label="trained", done=done * 2048, total=20480,
                            unit="tokens", line=note))
        time.sleep(0.15)
    display.event(Event(kind="finished", step="pretrain", digest="d", seconds=1.5))
"""


def test_without_a_terminal_progress_is_told_in_lines_now_and_then() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in result.stderr.splitlines() if "trained" in line]
    assert 1 <= len(lines) <= 4, result.stderr
    assert "of 20.5 k tokens" in lines[-1] and "tokens/s, loss 8." in lines[-1] and " left" in lines[-1]


def test_on_a_terminal_one_bar_follows_what_is_counted() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stderr=theirs, stdout=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # a terminal's way of saying that nobody is left to write
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert process.wait() == 0
    assert b"loss 8.0" in shown and b"tokens/s" in shown
    assert b"\x1b[1A" not in shown, "a second bar: the cursor had to go up to the first"


def test_what_a_step_left_out_is_one_line_a_reason_and_told_again_when_cached(
    capsys: pytest.CaptureFixture[str],
) -> None:
    left_out = {"documents too short (filters.min_characters = 32)": 1180, "hidden files": 2}
    step: dict[str, Any] = {"step": "corpus", "digest": "d", "metrics": {"documents": 3, "left_out": left_out}}
    with Display() as display:
        display.event(Event(kind="finished", seconds=2.0, **step))
        display.event(Event(kind="cached", **step))
        display.event(Event(kind="cached", step="shards", digest="d", metrics={"tokens": 1}))
    assert capsys.readouterr().err.split("\n") == [
        "corpus       left out 1,180: documents too short (filters.min_characters = 32)",
        "corpus       left out 2: hidden files",
        "corpus       done in 2.0s",
        "corpus       cached; left out 1,180 documents too short, 2 hidden files",
        "shards       cached",
        "",
    ]


def test_a_step_that_is_silent_is_told_of_less_and_less_often(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.console.display.QUIET_SECONDS", 0.05)
    monkeypatch.setattr("pipelines.console.display.LONGEST_SILENCE_SECONDS", 0.1)
    step: dict[str, Any] = {"step": "corpus", "digest": "d"}
    with Display() as display:
        display.event(Event(kind="started", **step))
        display.event(Event(kind="progress", label="read", done=0, total=5, unit="shards", **step))
        time.sleep(0.6)
        display.event(Event(kind="finished", seconds=0.6, **step))
        time.sleep(0.2)
    lines = capsys.readouterr().err.split("\n")
    told = [line for line in lines if re.fullmatch(r"corpus       still at it, 0\.\ds: read 0 of 5 shards", line)]
    assert 3 <= len(told) <= 7
    assert lines[-2].startswith("corpus       done"), "nothing of a step that has ended"


def test_listing_and_hashing_files_say_how_far_they_are_in_every_verb(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pipelines.engine.waiting.LOG_AFTER_SECONDS", 0.02)
    monkeypatch.setattr("data.text.sources.PROGRESS_EVERY", 1)
    real_stat = os.stat

    def slow_stat(path: Any, **more: Any) -> os.stat_result:
        time.sleep(0.05 if str(path).endswith(".txt") else 0)
        return real_stat(path, **more)

    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("text")
    monkeypatch.setattr("os.stat", slow_stat)
    step = build(compose(["experiment=text", f"corpus.paths=[{tmp_path}]"]))["corpus"]
    listed = capsys.readouterr()
    assert listed.out == ""
    assert re.search(r"^corpus: the files in corpus\.paths are listed, [12] so far \(0 s\)$", listed.err, re.MULTILINE)
    resolve([step], FileHashes(tmp_path / "hashes"))
    assert "corpus: its 3 files are looked at, and hashed where they are new" in capsys.readouterr().err


def test_the_last_table_tells_step_state_seconds_size_figure_and_path(capsys: pytest.CaptureFixture[str]) -> None:
    done = StepReport(
        name="shards",
        kind="rows",
        digest="d",
        state="made",
        seconds=3.2,
        metrics={"rows": 12_901},
        path="/a/b",
        bytes=3 << 20,
    )
    console().print(summary([done, StepReport(name="pretrain", kind="model", digest="e", state="to make")]))
    header, made, waiting = (re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines())
    assert header == ["step", "state", "seconds", "size", "key figure", "path"]
    assert made == ["shards", "made", "3.2s", "3.0 MiB", "12,901 rows", "/a/b"]
    assert waiting == ["pretrain", "to make", "-", "-", "-", "-"]


def test_the_time_left_after_a_resume_is_that_of_what_is_made_now() -> None:
    """A million tokens were there, 45 s go into starting, then a thousand come a second and slow down to a hundred."""
    pace, total = Pace(), 2e6
    assert pace.after(1e6, 0.0) == 0.0
    done = 1e6
    for second in range(45, 75):
        done += 1000
        rate = pace.after(done, second)
    assert (total - done) / rate == pytest.approx((total - done) / 1000, rel=1e-6)
    for second in range(75, 200):
        done += 100
        rate = pace.after(done, second)
    assert rate == pytest.approx(100, rel=0.05)
    assert pace.after(0.0, 201) == 0.0  # a count that begins anew
    assert pace.after(10.0, 202) == 0.0 and pace.after(20.0, 203) == 10.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (999_499, "999 k"),
        (999_949_312, "1 B"),
        (999.6e6, "1 B"),
        (122_070, "122 k"),
    ],
)
def test_counts_have_three_digits_and_never_an_exponent(value: float, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1023, "1023 B"), (1024, "1.0 KiB"), (1024**2 - 1, "1.0 MiB"), (3 << 20, "3.0 MiB")]
)
def test_sizes_round_into_the_next_unit(value: float, text: str) -> None:
    assert size(value) == text


def test_a_step_with_warnings_is_marked_and_they_stand_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"loss": 10.3, "warnings": ["diverged in step 61: the loss is 27.00, and it began at 8.30"]}
    report = StepReport(name="pretrain", kind="model", digest="d", state="cached", metrics=figures)
    print_steps([report, StepReport(name="export", kind="export", digest="e", state="to make")])
    said = capsys.readouterr().out
    assert "loss 10.300 (!)" in said and said.count("(!)") == 1
    assert said.splitlines()[-1] == f"pretrain: WARNING {figures['warnings'][0]}"


def test_what_to_type_next_is_whole_commands_that_a_shell_takes_as_they_are() -> None:
    words = ["experiment=text", "corpus.paths=[/a book/**/*.txt,'b c']", "store=s3://bucket/prefix", "optim.lr=3e-4"]
    words += [f"evaluate.samples.prompts=['{'word ' * 20}']"]
    reports = [
        StepReport(
            name=name, kind="model" if name == "pretrain" else name, digest="d", state="made", path=f"/s t/{name}"
        )
        for name in ("pretrain", "export", "report")
    ]
    lines = [line.split(maxsplit=1) for line in _next_words(words, ["--until", "export"], reports, "it's").splitlines()]
    typed = {what: shlex.split(command) for what, command in lines}
    assert typed["open"] == ["/s t/report/report.html"]
    assert typed["try"] == ["athanor", "generate", *words, "--prompt", "it's"]
    assert typed["look"] == ["athanor", "trace", *words, "--step", "1"]
    assert typed["change"] == ["athanor", "run", *words, "optim.lr=1e-3", "--until", "export"]
    assert typed["why"] == ["athanor", "why", "pretrain", *words, "optim.lr=1e-3"]
