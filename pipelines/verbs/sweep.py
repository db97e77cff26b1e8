"""`athanor run -m`: one trial per combination through Hydra's launchers, then one table sorted by the metric.

    athanor run -m experiment=demo optim.lr=1e-3,3e-3 model=tiny,demo
    athanor run -m experiment=demo optim.lr=1e-3,3e-3 hydra/launcher=ray

Trials write into the same store, so they share every step that does not differ, and a sweep run again only does what is
missing. The table reads the artifacts and not what the launcher returned, so it is right after any interruption.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from conf.refusal import NO_VALUE, Refusal, Shown
from pipelines.console import display as console
from pipelines.engine import runner
from pipelines.engine.backends.search_path import portable
from pipelines.engine.store.open import open_store
from pipelines.execution import execute, get_step, make_backend
from pipelines.graph import build
from pipelines.settings.compose import compose, multirun, resolved, typed
from pipelines.settings.derive import Settings
from pipelines.settings.overrides import hydra_overrides, points_of

METRICS = (
    ("evaluation", "bits_per_byte"),
    ("evaluation", "hidden_token_loss"),
    ("evaluation", "finetuned_conversation_loss"),
    ("model", "loss"),
)
"""(kind of step, figure) a sweep is sorted by: the first in which the trials differ, the last training's first; smaller
is better."""

LOST = "not finished: its process or that of another trial died, and the launcher gave up."

WATCH_SECONDS = 5.0
"""How often the store is asked how trials in other processes get on."""


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One point of the sweep: its overrides, and its settings or why it has none."""

    words: tuple[str, ...]
    settings: Settings | None
    refusal: Refusal | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A row of the table: figures, with `_low` and `_high` for those with an interval; or the failure."""

    words: tuple[str, ...]
    figures: dict[str, float]
    failure: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What Hydra's launchers call, here or in a worker. Returns the metric, or in words why there is none."""

    until: str | None = None
    group: str | None = None
    """All trials of the sweep at Weights & Biases, unless the settings name one."""

    def __call__(self, config: Any) -> float | str | None:
        try:
            settings = typed(resolved(config))
            tracking = settings.tracking
            settings = replace(settings, tracking=replace(tracking, group=tracking.group or self.group))
            steps = build(settings)
            execute(settings, [get_step(steps, self.until)] if self.until else list(steps.values()))
            return next(iter(figures(settings).values()), None)
        except Exception as error:
            # One bad combination must not end the sweep.
            return str(error) if hasattr(error, "exit_code") else traceback.format_exc()


def sweep(overrides: Sequence[str], until: str | None = None) -> int:
    """Run every combination of the overrides and print the table. Returns 1 when a trial failed, else 0.

    Raises Refusal when no combination is valid.
    """
    arguments = hydra_overrides(overrides, Settings, sweep=True)
    points = combinations(overrides)
    settings = [point.settings for point in points if point.settings is not None]
    if not settings:
        raise points[0].refusal or Refusal("-m", NO_VALUE, "no combination is valid")
    trial = Trial(until=until, group=group_name(settings[0].experiment, overrides))
    if "hydra/launcher=ray" in arguments:
        with ray_joined(settings[0]), watching(points):
            answers = launch(arguments, portable(trial))
    else:
        answers = launch(arguments, trial)
    outcomes = [_outcome(point, answers[index] if answers else LOST) for index, point in enumerate(points)]
    show(outcomes)
    failures = [
        f"{words} failed: {outcome.failure}"
        for words, outcome in zip(_differing(points), outcomes, strict=True)
        if outcome.failure
    ]
    if failures:
        tell("\n".join([*failures, "The same command again runs only what is missing."]))
    return 1 if failures else 0


def group_name(experiment: str, overrides: Sequence[str]) -> str:
    """What a sweep is called: the same for the same overrides in any order, however it is launched."""
    what = sorted(word for word in overrides if not word.startswith("hydra"))
    return f"sweep-{experiment}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]}"


def _outcome(point: Combination, answer: float | str | None) -> Outcome:
    """Outcome of a point: its figures from the store, whatever the launcher returned."""
    stored = figures(point.settings) if point.settings is not None else {}
    if point.refusal is not None or isinstance(answer, str):
        failure = str(point.refusal or "") or ("" if answer == LOST and stored else str(answer))
    else:
        failure = ""
    return Outcome(words=point.words, figures=stored, failure=failure)


def combinations(overrides: Sequence[str]) -> list[Combination]:
    """The points of the sweep in Hydra's own order."""
    return [_combination(point) for point in points_of(overrides, Settings)]


def _combination(words: tuple[str, ...]) -> Combination:
    try:
        settings = compose(words)
        build(settings)  # says at once that a corpus is not there
        return Combination(words=words, settings=settings)
    except Refusal as refusal:
        return Combination(words=words, settings=None, refusal=refusal)


def launch(arguments: Sequence[str], trial: Callable[[Any], Any]) -> list[float | str | None] | None:
    """Hand the sweep to Hydra; what the trials answered, in order, or None when the launcher was lost on the way."""
    try:
        return multirun(arguments, trial)
    except Exception as error:
        if not type(error).__module__.startswith("ray."):
            raise
        tell(f"the launcher gave up: {str(error).strip().rpartition(chr(10))[2]}")
        return None


@contextmanager
def ray_joined(settings: Settings) -> Iterator[None]:
    """Ray started or joined through its one door, before Hydra's launcher would do it in its own way."""
    if settings.compute.backend != "ray":
        raise Refusal(
            "hydra/launcher",
            Shown("ray"),
            "with compute.backend=local every trial would take all cores",
            "leave one of the two out",
        )
    backend = make_backend(settings)
    try:
        backend.resources()
        yield
    finally:
        backend.close()


@contextmanager
def watching(points: Sequence[Combination]) -> Iterator[None]:
    """Tell what the trials of other processes are at, as the store shows it."""
    over = threading.Event()
    seen: dict[tuple[tuple[str, ...], str], str] = {}
    differing = _differing(points)

    def look() -> None:
        """One round: whatever has changed since the last is told."""
        for number, point in enumerate(points):
            if point.settings is None:
                continue
            reports = runner.status(list(build(point.settings).values()), store=open_store(point.settings.store))
            for report in reports:
                before = seen.setdefault((point.words, report.name), report.state)
                if report.state != before and report.state in ("running", "cached"):
                    words = "made" if report.state == "cached" else "running"
                    tell(f"{differing[number]}  {report.name} {words}")
                seen[point.words, report.name] = report.state

    def watch() -> None:
        ended = False
        while not ended:
            ended = over.wait(WATCH_SECONDS)  # and once more after the end
            try:
                look()
            except (OSError, Refusal) as error:
                tell(f"cannot look into the store: {error}")

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def figures(settings: Settings) -> dict[str, float]:
    """METRICS that a configuration's artifacts have, in that order, each with the ends of its interval."""
    reports = runner.plan(list(build(settings).values()), store=open_store(settings.store))
    result: dict[str, float] = {}
    for kind, name in METRICS:
        for report in [r for r in reversed(reports) if r.kind == kind and r.metrics.get(name) is not None]:
            label = name if kind == "evaluation" else f"{report.name} {name}"
            ends = {f"{label}{end}": report.metrics.get(f"{name}{end}") for end in ENDS}
            result |= {label: float(report.metrics[name])}
            result |= {end: float(at) for end, at in ends.items() if at is not None}
    return result


ENDS = ("_low", "_high")
"""Behind a figure's name: the ends of its interval."""


def sorted_by(outcomes: Sequence[Outcome]) -> str:
    """The first metric in which the trials differ (trials of fine-tuning share bits per byte); else the first available."""
    available = list(dict.fromkeys(name for outcome in outcomes for name in outcome.figures if not name.endswith(ENDS)))
    differ = [
        name for name in available if len({outcome.figures.get(name) for outcome in outcomes if outcome.figures}) > 1
    ]
    return next(iter([*differ, *available]), "metric")


def show(outcomes: Sequence[Outcome]) -> None:
    """The trials, best first, with only the overrides in which they differ.

    An order is no verdict: trials whose interval overlaps the best one's are counted; a line is printed where there are no
    intervals.
    """
    differing, name = _differing(outcomes), sorted_by(outcomes)
    values = [outcome.figures.get(name) for outcome in outcomes]
    order = sorted(range(len(outcomes)), key=lambda i: (values[i] is None, values[i] or 0.0))
    ends = [(outcome.figures.get(f"{name}_low"), outcome.figures.get(f"{name}_high")) for outcome in outcomes]
    has_ends = any(low is not None for low, _ in ends)
    cells = []
    for place, index in enumerate(order, start=1):
        value, (low, high) = values[index], ends[index]
        shown = "failed" if outcomes[index].failure else "-" if value is None else f"{value:.4f}"
        between = ["-" if low is None or high is None else f"{low:.4f} to {high:.4f}"] if has_ends else []
        cells.append((str(place), shown, *between, differing[index]))
    out = console.console()
    out.print()
    columns = ("", name, *(["95 % interval"] if has_ends else []), "overrides")
    out.print(console.table(None, columns, cells, right=(name,)))
    if verdict := _verdict([ends[index] for index in order if values[index] is not None], name):
        out.print(verdict, markup=False)


def _verdict(ends: Sequence[tuple[float | None, float | None]], name: str) -> str:
    """A line on whether the intervals (best trial first) support the order; empty for a single trial."""
    if len(ends) < 2:
        return ""
    if any(low is None for low, _ in ends):
        return f"No intervals around {name}, so the order is no verdict."
    best_high = ends[0][1]
    overlapping = sum(1 for low, _ in ends[1:] if low is not None and best_high is not None and low <= best_high)
    if not overlapping:
        return ""
    return f"The first is not clearly better than {overlapping} of the others: their intervals overlap."


def _differing(points: Sequence[Combination] | Sequence[Outcome]) -> list[str]:
    """Each point's overrides, without those that all of them have."""
    same = set.intersection(*(set(point.words) for point in points)) if len(points) > 1 else set()
    return [" ".join(word for word in point.words if word not in same) for point in points]


def tell(line: str) -> None:
    """To the person watching; the table is what stands on stdout."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
