"""The harness's figures with intervals and chance levels: of tasks by metric, and of groups.

Every value is the harness's own. An interval is Wilson's for a share of right answers, and otherwise the bootstrap through
the harness's own aggregation, over whole documents where those gave several examples each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask

from pipelines.evaluation.intervals import (
    FEWEST,
    Interval,
    interval,
    resample_aggregate,
    resample_sums,
    share_interval,
    too_few,
    wilson,
)
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.task_files import TaskSet

SLOW_METRICS, SLOW_RESAMPLES = ("bleu", "chrf", "chrf++", "ter"), 100
"""Corpus-level metrics, for which the harness too takes at most a hundred draws."""
GUESSES = 400
"""Rounds of random answers where a metric's chance level has no closed form."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Aggregation:
    """A function of the harness from per-example values to one; infinite on overflow, NaN on a division by zero."""

    of: Callable[[list[Any]], float]

    def __call__(self, items: Sequence[Any]) -> float:
        try:
            return float(self.of(list(items)))
        except OverflowError:
            return math.inf
        except ZeroDivisionError:
            return math.nan


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One metric of one task: its interval, its bootstrap draws, and for accuracies the counts."""

    found: Interval
    chance: float | None = None
    draws_R: np.ndarray | None = None
    right: tuple[float, int] | None = None
    """(right, trials) where every example is an independent trial."""

    def shown(self) -> dict[str, Any]:
        """As in results.json; NaN becomes null."""
        plain = asdict(self.found) | {"chance": self.chance}
        if math.isfinite(self.found.value):
            return plain
        return plain | {"value": None, "missing": f"the harness's aggregation gives {self.found.value}"}


def task_figures(
    task: ConfigurableTask,
    found: Mapping[str, Any],
    answers: list[dict[str, Any]],
    settings: EvaluateSettings,
    *,
    is_made: bool,
) -> dict[str, Figure]:
    """Each metric with its interval over the examples, or over the held-out documents that they were made from."""
    keys = [tuple(key.split(",", 1)) for key in found if "," in key and not key.split(",", 1)[0].endswith("_stderr")]
    filters = {name for _, name in keys}
    figures = {}
    for metric, name in keys:
        rows = [answer for answer in answers if answer["filter"] == name and metric in answer]
        by_document: dict[Any, list[Any]] = {}
        for answer in rows:
            by_document.setdefault(answer["doc"]["document"] if is_made else answer["doc_id"], []).append(
                answer[metric]
            )
        aggregate = task.aggregation().get(metric, Aggregation(mean))
        value, groups = float(found[f"{metric},{name}"]), list(by_document.values())
        figure = _figure(value, metric, aggregate, groups, settings)
        chance = _chance(task, metric, aggregate, rows, settings.seed)
        figures[metric if len(filters) == 1 else f"{metric}_{name}"] = Figure(
            found=figure.found, draws_R=figure.draws_R, right=figure.right, chance=chance
        )
    return figures


def _figure(
    value: float, metric: str, aggregate: Aggregation, groups: list[list[Any]], settings: EvaluateSettings
) -> Figure:
    count, resamples, seed = len(groups), settings.bootstrap_resamples, settings.seed
    alone = all(len(group) == 1 for group in groups)
    of = "examples" if alone else "documents"
    if count < FEWEST:
        right = sum(item for [item] in groups) if alone and aggregate.of is mean and _is_share(groups) else None
        trials = None if right is None else (float(right), count)
        return Figure(found=Interval(value, None, None, too_few(count, of)), right=trials)
    if not math.isfinite(value):
        return Figure(found=Interval(value, None, None))
    if aggregate.of is not mean:
        resamples = min(resamples, SLOW_RESAMPLES) if metric in SLOW_METRICS else resamples
        draws_R = resample_aggregate(aggregate, groups, resamples=resamples, seed=seed)
        return Figure(found=interval(value, draws_R, count=count, of=of), draws_R=draws_R)
    sums_N2 = np.array([(sum(map(float, group)), len(group)) for group in groups])
    sums_R2 = resample_sums(sums_N2, resamples=resamples, seed=seed)
    draws_R, (right, trials) = sums_R2[:, 0] / sums_R2[:, 1], sums_N2.sum(0)
    if not _is_share(groups):
        return Figure(found=interval(value, draws_R, count=count, of=of), draws_R=draws_R)
    if alone:
        return Figure(found=wilson(right, count, of=of), draws_R=draws_R, right=(float(right), count))
    return Figure(found=share_interval(right, trials, draws_R, count=count, of=of), draws_R=draws_R)


def _is_share(groups: Sequence[Sequence[Any]]) -> bool:
    """Whether every value is 0 or 1."""
    return all(isinstance(item, int | float | np.number) and item in (0, 1) for group in groups for item in group)


def _chance(
    task: ConfigurableTask, metric: str, aggregate: Aggregation, rows: list[dict[str, Any]], seed: int
) -> float | None:
    """Score of uniformly random answers in a multiple-choice task; None for other tasks and metrics."""
    if task.OUTPUT_TYPE != "multiple_choice" or not rows:
        return None
    choices_N = np.array([len(task.doc_to_choice(answer["doc"])) for answer in rows])
    if metric in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info"):
        right_N = np.array([right_choices(task, answer["doc"]) for answer in rows])
        return float((right_N / choices_N).mean())
    if metric == "mcc":
        return 0.0
    if metric == "brier_score":  # of equal probabilities: (1 - 1/k)² + (k - 1)/k²
        return float((1 - 1 / choices_N).mean())
    if metric == "f1":
        rng = np.random.default_rng(seed)
        golds = [answer[metric][0] for answer in rows]
        rounds = [list(zip(golds, rng.integers(choices_N), strict=True)) for _ in range(GUESSES)]
        return float(np.mean([aggregate(items) for items in rounds]))
    return None


def right_choices(task: ConfigurableTask, doc: Mapping[str, Any]) -> int:
    """How many of a question's choices are right."""
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    golds = gold if isinstance(gold, list) else [gold]
    places = {choices.index(one) if isinstance(one, str) and one in choices else one for one in golds}
    return len([place for place in places if isinstance(place, int) and place < len(choices)])


def group_figures(
    chosen: TaskSet, name: str, made: Mapping[str, Mapping[str, Figure]], found: Mapping[str, Mapping[str, Any]]
) -> Figures:
    """A group's averages over its tasks, as the harness computes them, with intervals from draws within each task."""
    tasks, own = chosen.leaves(name), found[name]
    keys = [key for key in own if "," in key and not key.partition(",")[0].endswith("_stderr")]
    figures: Figures = {}
    for key in keys:
        metric, _, filtered = key.partition(",")
        entry = next(
            entry
            for entry in chosen.groups[name].config["aggregate_metric_list"]
            if entry["metric"] == metric and filtered in (entry.get("filter_list") or filtered)
        )
        parts, weights = [], []
        for task in tasks:
            part = made[task].get(metric) or made[task].get(f"{metric}_{filtered}")
            if part is not None:
                parts.append(part)
                weights.append(found[task]["sample_len"] if entry.get("weight_by_size", True) else 1)
        alone = sum(other.partition(",")[0] == metric for other in keys) == 1
        pooled = _pooled(
            float(own[key]), parts, np.array(weights) / sum(weights), by_size=entry.get("weight_by_size", True)
        )
        figures[metric if alone else f"{metric}_{filtered}"] = pooled.shown()
    return figures | {"examples": int(own.get("sample_len", 0)), "tasks": tasks}


def _pooled(value: float, parts: Sequence[Figure], weights: np.ndarray, *, by_size: bool) -> Figure:
    """A weighted mean of tasks. Shares of independent examples that are weighted by their number are one share."""
    chances = [part.chance for part in parts]
    chance = None if None in chances else float(np.dot(weights, np.array(chances, np.float64)))
    trials = [part.right for part in parts if part.right is not None]
    if by_size and len(trials) == len(parts):
        right, count = (sum(column) for column in zip(*trials, strict=True))
        return Figure(found=wilson(right, int(count), of="examples"), chance=chance)
    draws = [part.draws_R for part in parts if part.draws_R is not None]
    if len(draws) < len(parts):
        why = f"a task among them has fewer than {FEWEST} examples"
        return Figure(found=Interval(value, None, None, why), chance=chance)
    # Tasks are resampled independently: all used the same seed, so each one's draws are shifted against the next's.
    draws_R = sum(
        weight * np.roll(drawn_R, place) for place, (weight, drawn_R) in enumerate(zip(weights, draws, strict=True))
    )
    return Figure(found=interval(value, np.asarray(draws_R), count=FEWEST, of="examples"), chance=chance)
