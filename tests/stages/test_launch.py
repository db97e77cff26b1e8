"""What the driver shows of a training run that goes on in other processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.console import display as console
from pipelines.engine.events import Event
from pipelines.stages.launch import Watch
from pipelines.training.loop import NOTES
from pipelines.training.metrics import METRICS, MetricsLog


class Shown:
    """A stage's context that hands what it is told to the display, as the engine's does."""

    def __init__(self, display: console.Display) -> None:
        self.display, self.kept, self.said = display, list[str](), list[str]()

    def progress(self, label: str, done: float, total: float | None, unit: str = "", note: str = "") -> None:
        self.display.event(
            Event(
                kind="progress", step="pretrain", digest="d", label=label, done=done, total=total, unit=unit, line=note
            )
        )

    def log(self, line: str) -> None:
        self.said.append(line)

    def keep(self, relpath: str) -> None:
        self.kept.append(relpath)


def row(step: int, mfu: float | None = 0.257) -> dict[str, Any]:
    return {"step": step, "loss": 4.5 - step / 10, "tokens": 2048 * step, "mfu": mfu}


def test_the_progress_line_has_loss_mfu_tokens_per_second_and_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr(console, "QUIET_SECONDS", 0.0)
    context = Shown(console.Display())
    (tmp_path / NOTES).parent.mkdir()
    (tmp_path / NOTES).write_text("told by the attempt before\n")
    watch = Watch({"train": {"total_tokens": 20480.0}}, tmp_path, context)  # type: ignore[arg-type]
    watch.look()
    assert capsys.readouterr().err == "" and context.said == []  # nothing is there yet
    log = MetricsLog(tmp_path / METRICS, keep_steps=0)
    log(row(1))
    watch.look()
    clock[0] += 45.0  # of compiling, say, which no later step takes
    log(row(2))
    watch.look()
    clock[0] += 4.0
    log(row(3))
    log(row(4))
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 5, "lo')  # a row that is being written
    watch.look()
    first, unknown, second = capsys.readouterr().err.splitlines()
    assert first == "pretrain     trained 2.05 k of 20.5 k tokens, loss 4.400, 26% MFU"
    assert unknown == "pretrain     trained 4.1 k of 20.5 k tokens, loss 4.300, 26% MFU"
    assert second == "pretrain     trained 8.19 k of 20.5 k tokens, 1.02 k tokens/s, loss 4.100, 26% MFU, 12s left"
    watch.look()
    assert capsys.readouterr().err == ""  # the same row is not told twice


def test_notes_are_told_and_checkpoints_kept_once(tmp_path: Path) -> None:
    context = Shown(console.Display())
    watch = Watch({"train": {"total_tokens": 10}}, tmp_path, context)  # type: ignore[arg-type]
    (tmp_path / NOTES).parent.mkdir()
    (tmp_path / NOTES).write_text("continuing\u2028after step 3\nhalf of a no", encoding="utf-8")
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    watch.look()
    watch.look()
    assert context.said == ["continuing\u2028after step 3"]
    assert context.kept == ["checkpoints/step-00000003", METRICS]


def test_a_record_that_a_resumed_run_has_cut_is_read_from_its_beginning(tmp_path: Path) -> None:
    watch = Watch({"train": {"total_tokens": 20480.0}}, tmp_path, Shown(console.Display()))  # type: ignore[arg-type]
    log = MetricsLog(tmp_path / METRICS, keep_steps=0)
    for step in range(1, 4):
        log(row(step))
    assert (watch._newest_record() or {})["step"] == 3
    log = MetricsLog(tmp_path / METRICS, keep_steps=1)
    assert (watch._newest_record() or {})["step"] == 1
    for step in range(2, 5):
        log({**row(step), "loss": 1 / 3})  # longer lines: where it stopped is within one now
    assert (watch._newest_record() or {})["step"] == 4
    log = MetricsLog(tmp_path / METRICS, keep_steps=2)
    log(row(3))
    log(row(4))
    log(row(5))
    assert (watch._newest_record() or {})["step"] == 5
