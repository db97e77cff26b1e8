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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pipelines import console
from pipelines.engine import runner
from pipelines.engine.step import EngineError
from pipelines.engine.store import open_store
from pipelines.execution import execute, make_backend, named
from pipelines.graph import build
from pipelines.settings import Settings, SettingsError, compose, hydra_overrides, multirun, points_of, resolved, typed

METRICS = (("evaluate", "bits_per_byte"), ("evaluate", "hidden_token_loss"), ("pretrain", "loss"))
"""(step, figure) a sweep is sorted by: the first that a trial has; smaller is better."""

LOST = "not finished: its process or that of another trial died, and the launcher gave up."

WATCH_SECONDS = 5.0
"""How often the store is asked how trials in other processes get on."""


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One point of the sweep: its overrides, and its settings or why it has none."""

    words: tuple[str, ...]
    settings: Settings | None
    mistake: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A line of the table: the metric and its name, or why there is none."""

    words: tuple[str, ...]
    value: float | None
    name: str
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
            execute(settings, [named(steps, self.until)] if self.until else list(steps.values()))
            return figure(settings)[0]
        except Exception as error:
            # One bad combination must not end the sweep.
            return str(error) if hasattr(error, "exit_code") else traceback.format_exc()


def sweep(overrides: Sequence[str], until: str | None = None) -> int:
    """Run every combination of the overrides and print the table. Returns 1 when a trial failed, else 0.

    Raises SettingsError when no combination is valid.
    """
    words = hydra_overrides(overrides)
    points = combinations(overrides)
    settings = [point.settings for point in points if point.settings is not None]
    if not settings:
        raise SettingsError(points[0].mistake)
    trial = Trial(until=until, group=group_name(settings[0].experiment, overrides))
    if "hydra/launcher=ray" in words:
        with ray_joined(settings[0]), watching(points):
            answers = launch(words, trial)
    else:
        answers = launch(words, trial)
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
    """What became of a point: its metric from the store, whatever the launcher brought back."""
    value, name = figure(point.settings) if point.settings is not None else (None, "")
    if point.mistake or isinstance(answer, str):
        failure = point.mistake or ("" if answer == LOST and value is not None else str(answer))
    else:
        failure = ""
    return Outcome(words=point.words, value=value, name=name, failure=failure)


def combinations(overrides: Sequence[str]) -> list[Combination]:
    """The points of the sweep in Hydra's own order."""
    return [_combination(point) for point in points_of(overrides)]


def _combination(words: tuple[str, ...]) -> Combination:
    try:
        settings = compose(words)
        build(settings)  # says at once that a corpus is not there
        return Combination(words=words, settings=settings)
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        return Combination(words=words, settings=None, mistake=str(error))


def launch(words: Sequence[str], trial: Trial) -> list[float | str | None] | None:
    """Hand the sweep to Hydra; what the trials answered, in order, or None when the launcher was lost on the way."""
    try:
        return multirun(words, trial)
    except Exception as error:
        if not type(error).__module__.startswith("ray."):
            raise
        tell(f"the launcher gave up: {str(error).strip().splitlines()[-1]}")
        return None


@contextmanager
def ray_joined(settings: Settings) -> Iterator[None]:
    """Ray started or joined through its one door, before Hydra's launcher would do it in its own way."""
    if settings.compute.backend != "ray":
        raise SettingsError(
            "hydra/launcher=ray with compute.backend=local: every trial would take all cores. Leave one out."
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
            except (OSError, EngineError) as error:
                tell(f"cannot look into the store: {error}")

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def figure(settings: Settings) -> tuple[float | None, str]:
    """(metric, its name) of a configuration from its artifacts; (None, '') where they are not there."""
    reports = {r.name: r for r in runner.plan(list(build(settings).values()), store=open_store(settings.store))}
    for step, name in METRICS:
        if step in reports and (value := reports[step].metrics.get(name)) is not None:
            return float(value), name
    return None, ""


def show(outcomes: Sequence[Outcome]) -> None:
    """The trials, best first, with only the overrides in which they differ."""
    words = _differing(outcomes)
    order = sorted(range(len(outcomes)), key=lambda i: (outcomes[i].value is None, outcomes[i].value or 0.0))
    name = next((outcome.name for outcome in outcomes if outcome.name), "metric")
    cells = []
    for place, index in enumerate(order, start=1):
        value, failure = outcomes[index].value, outcomes[index].failure
        cells.append((str(place), "failed" if failure else "-" if value is None else f"{value:.4f}", words[index]))
    out = console.console()
    out.print()
    out.print(console.table(None, ("", name, "overrides"), cells, right=(name,)))


def _differing(points: Sequence[Combination] | Sequence[Outcome]) -> list[str]:
    """Each point's overrides, without those that all of them have."""
    same = set.intersection(*(set(point.words) for point in points)) if len(points) > 1 else set()
    return [" ".join(word for word in point.words if word not in same) for point in points]


def tell(line: str) -> None:
    """To the person watching; the table is what stands on stdout."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
