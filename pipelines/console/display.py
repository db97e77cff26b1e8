"""What a person sees: progress while steps run, the table at the end, byte and duration words.

    with Display() as display:
        reports = run(steps, …, on_event=display.event)
    console().print(summary(reports))

On a terminal several steps share one live block (rich); in a pipe or a log every line stands alone and progress is told at
most every ten seconds, so that a cluster's log stays readable.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pipelines.engine.events import Event, StepReport

PACE_SECONDS = 60.0  # window of the rate and of the time left
QUIET_SECONDS = 10.0  # between progress lines of one step where there is no terminal
LONGEST_SILENCE_SECONDS = 60.0  # between two lines about a step without progress


def duration(seconds: float | None) -> str:
    """90 → '1m30s'; None → '-'."""
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def count(value: float) -> str:
    """1234567 → '1.23 M' (powers of 1000; B is a thousand million, as tokens and parameters are told)."""
    for unit in ("", "k", "M", "B", "T", "P", "E", "Z"):
        # 999.95 k is shown as 1 M: three digits of it would be 1e+03.
        if abs(value) < (999.5 if unit else 1000) or unit == "Z":
            return (f"{value:.0f}" if unit == "" else f"{value:.3g}") + (f" {unit}" if unit else "")
        value /= 1000
    raise AssertionError("unreachable")


def size(value: float) -> str:
    """Bytes in powers of 1024: 3 << 20 → '3.0 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < (1023.95 if unit != "B" else 1024) or unit == "PiB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def table(
    title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()
) -> Table:
    """A plain rich table; `right` names the columns of numbers."""
    out = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        out.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        out.add_row(*[Text(cell) for cell in row])
    return out


def console(*, to_stderr: bool = False) -> Console:
    """A console that never wraps a table to 80 columns because its output is a file."""
    stream = sys.stderr if to_stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 160, highlight=False, soft_wrap=not stream.isatty())


def print_json(value: Any) -> None:
    """Compact machine output on stdout, nothing else on the line."""
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=False, default=str) + "\n")


# What one line of the summary says of a step: the first of these figures that the step reports.
_FIGURES: tuple[tuple[str, str], ...] = (
    ("bits_per_byte", "{:.3f} bits/byte"),
    ("hidden_token_loss", "hidden tokens {:.3f} nats"),
    ("finetuned_conversation_loss", "answers {:.3f} nats"),
    ("max_logit_error", "logits agree to {:.1e}"),
    ("loss", "loss {:.3f}"),
    ("pairs", "{:,} pairs"),
    ("rows", "{:,} rows"),
    ("vocab_size", "{:,} pieces"),
    ("documents", "{:,} documents"),
)


def key_figure(metrics: Mapping[str, Any]) -> str:
    """The one figure of a step that a table has room for, '-' where it has none; (!) where there are warnings."""
    mark = " (!)" if metrics.get("warnings") else ""
    for name, template in _FIGURES:
        if metrics.get(name) is not None:
            return template.format(metrics[name]) + mark
    return "-" + mark


def warnings(reports: Sequence[StepReport]) -> list[str]:
    """Warnings in the steps' metrics, one line each."""
    return [f"{r.name}: WARNING {text}" for r in reports for text in (r.metrics or {}).get("warnings", ())]


def print_steps(reports: Sequence[StepReport]) -> None:
    """Print the summary, then the warnings."""
    out = console()
    out.print(summary(reports))
    for line in warnings(reports):
        out.print(Text(line))


def summary(reports: Sequence[StepReport]) -> Table:
    """The table at the end of a run: step, state, seconds, size, key figure, path."""
    rows = [
        (
            report.name,
            report.state,
            duration(report.seconds),
            "-" if report.bytes is None else size(report.bytes),
            key_figure(report.metrics or {}),
            shown_path(report.path),
        )
        for report in reports
    ]
    columns = ("step", "state", "seconds", "size", "key figure", "path")
    return table(None, columns, rows, right=("seconds", "size"))


def shown_path(path: str | None) -> str:
    """A path as a person here would type it."""
    if path is None or "://" in path:
        return path or "-"
    here = os.path.relpath(path)
    return path if here.startswith("..") else here


@dataclass
class _Activity:
    """What a step was doing at its last event, and when a line about it was last printed."""

    description: str = ""
    began: float = field(default_factory=time.monotonic)
    printed: float = field(default_factory=time.monotonic)
    pause: float = field(default_factory=lambda: QUIET_SECONDS)


class Display:
    """Turns the engine's events into lines, or into live bars on a terminal.

    Use as a context manager; `event` is what `engine.runner.run` calls, from several threads.
    """

    def __init__(self) -> None:
        self._console = console(to_stderr=True)
        self._live = self._console.is_terminal
        self._bars = Progress(
            TextColumn("{task.fields[step]:<12}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._last_line: dict[str, float] = {}
        self._paces: dict[tuple[str, str], Pace] = {}
        self._failures = 0
        self._activities: dict[str, _Activity] = {}
        self._lock, self._over = threading.Lock(), threading.Event()
        self._reminder = threading.Thread(target=self._remind, name="display", daemon=True)

    def __enter__(self) -> Display:
        if self._live:
            self._bars.start()
        self._reminder.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._reminder.join()
        if self._live:
            self._bars.stop()

    def event(self, event: Event) -> None:
        """One event of the runner."""
        with self._lock:
            if event.kind == "progress":
                self._progress(event)
                return
            if event.kind in ("started", "waiting"):
                self._activities[event.step] = _Activity(description=event.line)
            if event.kind in ("finished", "failed", "cached"):
                self._forget(event.step)
            self._failures += event.kind == "failed"
            for line in _event_lines(event, is_raised=self._failures == 1):
                self._console.print(Text(f"{event.step:<12} {line}"))

    def _progress(self, event: Event) -> None:
        key = (event.step, event.label)
        rate = self._paces.setdefault(key, Pace()).after(event.done, time.monotonic())
        left = f"{duration((event.total - event.done) / rate)} left" if event.total and rate > 0 else ""
        description = f"{event.label} {_amount(event.done, event.unit)}"
        if event.total:
            description = f"{event.label} {count(event.done)} of {_amount(event.total, event.unit)}"
        description += f", {_rate(rate, event.unit)}" if rate > 0 else ""
        description += f", {event.line}" if event.line else ""
        self._activities.setdefault(event.step, _Activity()).description = description
        if self._live:
            if key not in self._tasks:
                self._tasks[key] = self._bars.add_task(description, total=event.total, step=event.step, left=left)
            self._bars.update(
                self._tasks[key], completed=event.done, total=event.total, description=description, left=left
            )
            return
        now = time.monotonic()
        if now - self._last_line.setdefault(event.step, now - max(0.0, QUIET_SECONDS - 3)) >= QUIET_SECONDS:
            self._last_line[event.step] = now
            self._activities[event.step] = _Activity(description=description)
            self._console.print(Text(f"{event.step:<12} {description}{', ' if left else ''}{left}"))

    def _remind(self) -> None:
        """Print what steps without recent events are doing, at least every LONGEST_SILENCE_SECONDS."""
        while not self._over.wait(QUIET_SECONDS / 10):
            with self._lock:
                shown = {step for step, _ in self._tasks}
                for step, activity in self._activities.items():
                    if step not in shown and time.monotonic() - activity.printed >= activity.pause:
                        activity.printed = time.monotonic()
                        activity.pause = min(2 * activity.pause, LONGEST_SILENCE_SECONDS)
                        since = duration(activity.printed - activity.began)
                        about = f": {activity.description}" if activity.description else ""
                        self._console.print(Text(f"{step:<12} still at it, {since}{about}"))

    def _forget(self, step: str) -> None:
        self._activities.pop(step, None)
        for key in [key for key in self._tasks if key[0] == step]:
            self._bars.remove_task(self._tasks.pop(key))


class Pace:
    """Recent rate of a growing count.

    The count at the first event may be an earlier attempt's, and the time until the first change is startup: the clock
    starts at that change. A count that decreases resets the rate.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._seen: deque[tuple[float, float]] = deque()

    def after(self, done: float, now: float) -> float:
        """Rate per second, 0 while unknown; `now` in seconds of any clock."""
        if self._first is None or done < max(self._first, self._seen[-1][1] if self._seen else done):
            self._first = done
            self._seen.clear()
        if done != self._first or self._seen:
            self._seen.append((now, done))
        while len(self._seen) > 2 and self._seen[1][0] < now - PACE_SECONDS:
            self._seen.popleft()
        then, before = self._seen[0] if self._seen else (now, done)
        return (done - before) / (now - then) if now - then > 0.5 else 0.0


def _rate(rate: float, unit: str) -> str:
    """`12 shards/s`, or `8.3s a shard` for what takes longer than a second each."""
    one = unit.removesuffix("s")
    return f"{_amount(rate, unit)}/s" if rate >= 1 or not one else f"{duration(1 / rate)} a {one}"


def _amount(value: float, unit: str) -> str:
    return f"{count(value)} {unit}".rstrip() if unit else count(value)


_DETAIL = re.compile(r" \(|; |, the first")
"""Where the details of a reason begin; they are printed only once."""


def _event_lines(event: Event, *, is_raised: bool) -> list[str]:
    """`is_raised`: a failure that ends the run, whose words are its last ones."""
    left_out = event.metrics.get("left_out") or {}
    if event.kind == "cached":
        short = [f"{times:,} {_DETAIL.split(reason)[0]}" for reason, times in left_out.items()]
        return [f"cached; left out {', '.join(short)}" if short else "cached"]
    if event.kind == "started" or (event.kind == "failed" and is_raised):
        return [event.kind]
    if event.kind == "finished":
        reasons = [f"left out {times:,}: {reason}" for reason, times in left_out.items()]
        return [*reasons, f"done in {duration(event.seconds)}"]
    return [event.line] if event.line else []
