"""Tasks of lm-evaluation-harness: built, tried without a model, and run, all without a network.

    try_tasks(settings, context_tokens=256)              # before anything trains: every task of the user's is built and run
    run_tasks(harness, documents, settings, out_dir)     # {"next_line": {"acc": {"value", "low", "high", "chance", …}, …}}

Every value is the harness's own: each metric's per-example values go through the aggregation that the harness has for it,
and so do the draws of its bootstrap. Importing this module imports lm-evaluation-harness (about two seconds), so only what
needs it does.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.document import Document
from pipelines.engine.step import EngineError
from pipelines.stages.evaluate_settings import EvaluateSettings
from pipelines.stages.task_data import make_examples
from pipelines.stages.task_files import TASKS, GroupFile, TaskFile, TaskSet, read_tasks

# Read when `datasets` is imported: a task's data are local files, and a machine without a network must not wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.api.registry import aggregation_registry, metric_registry
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs

from pipelines.stages.harness_figures import Aggregation, Figure, Figures, group_figures, right_choices, task_figures

MOST_NEW_TOKENS = 256
FEWEST_EXAMPLES = 4
TRIED_EXAMPLES = 2000
"""Of a task's own data, tried before anything trains."""


def generation_options(options: Mapping[str, Any], context_tokens: int) -> dict[str, Any]:
    """A request's options with the harness's defaults filled in. Raises EngineError where no room is left for a prompt."""
    filled = dict(normalize_gen_kwargs(dict(options), MOST_NEW_TOKENS))
    if not isinstance(filled["until"], list) or not all(isinstance(text, str) for text in filled["until"]):
        raise EngineError(f"generation_kwargs: until {filled['until']!r}: texts to end before, in a list.")
    if (new_tokens := int(filled["max_gen_toks"])) >= context_tokens:
        raise EngineError(
            f"A task asks for {new_tokens} new tokens where a window holds {context_tokens}: no room is left for its prompt."
            f" Set generation_kwargs: {{max_gen_toks: …}} in the task's file to less than {context_tokens}."
        )
    return filled


def run_tasks(
    harness: LM, documents: Sequence[Document], settings: EvaluateSettings, out_dir: Path
) -> dict[str, Figures]:
    """Run `settings.tasks`; {task: {metric: {"value", "low", "high", "missing", "chance"}, "examples": n}}, or
    {"skipped": why} for a task that these documents give too few examples for. Groups stand before their tasks.

    Each example and its answers go to `out_dir`/TASK.jsonl.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    chosen = read_tasks(settings.tasks, settings.task_folders)
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        built = build_tasks(chosen, documents, settings, Path(scratch))
        found = built.evaluate(harness)
        results = _results(chosen, built, found, settings)
    for name in built.tasks:
        lines = (json.dumps(_answered(answer), default=str) + "\n" for answer in found["samples"][name])
        (out_dir / f"{re.sub(r'[^a-zA-Z0-9_.:-]', '_', name)}.jsonl").write_text("".join(lines), encoding="utf-8")
    return results


def _results(
    chosen: TaskSet, built: BuiltTasks, found: Mapping[str, Any], settings: EvaluateSettings
) -> dict[str, Figures]:
    """The figures of every task, and of every group before its tasks."""
    results: dict[str, Figures] = {}
    made: dict[str, dict[str, Figure]] = {}
    for name, task in built.tasks.items():
        answers = found["samples"][name]
        is_made = chosen.tasks[name].made_from is not None
        made[name] = task_figures(task, found["results"][name], answers, settings, is_made=is_made)
        shown = {metric: figure.shown() for metric, figure in made[name].items()}
        results[name] = shown | {"examples": len({answer["doc_id"] for answer in answers})}
    for name in built.groups:
        results[name] = group_figures(chosen, name, made, found["results"])
    results |= {name: {"skipped": why, "examples": 0} for name, why in built.skipped.items()}
    return {name: results[name] for asked in chosen.asked for name in _and_below(chosen, asked)}


def try_tasks(settings: EvaluateSettings, context_tokens: int) -> None:
    """Build every task that does not come with this program, and run it on a model that says nothing.

    Raises EngineError for a task that could not be scored: its data, templates, filters, metrics or room for prompts.
    """
    chosen = read_tasks(settings.tasks, settings.task_folders)
    if not chosen.is_own():
        return
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        built = build_tasks(chosen, [SAMPLE] * FEWEST_EXAMPLES, settings, Path(scratch))
        for name, task in built.tasks.items():
            path = chosen.tasks[name].path
            if path.parent == TASKS:
                continue
            with _named(path):
                _check_answers(task)
                found = evaluate(
                    _Silent(context_tokens), {"tasks": {name: task}}, bootstrap_iters=0, limit=TRIED_EXAMPLES
                )
            _check_metrics(path, task, found["results"][name])
        if built.groups:
            silent = _Silent(context_tokens)
            found = build_tasks(chosen, [SAMPLE] * FEWEST_EXAMPLES, settings, Path(scratch)).evaluate(silent, limit=1)
            for group in chosen.groups.values():
                _check_averages(group, found["results"][group.name])


SAMPLE = Document(
    text="".join(
        f"def value_{i}(first, other={i}):\n    return compute(first, {i * i}, (other + {i}))\n" for i in range(40)
    ),
    source="sample.py",
    position=0,
)
"""What examples are made of where there are no held-out documents yet."""


@dataclass(kw_only=True)
class BuiltTasks:
    """Tasks and groups as the harness has them, and why others were left out."""

    tasks: dict[str, ConfigurableTask] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def evaluate(self, model: LM, limit: int | None = None) -> dict[str, Any]:
        """What the harness finds: per-example values in `samples`, aggregates of tasks and groups in `results`."""
        if not self.tasks:
            return {"results": {}, "samples": {}}
        loaded = {"tasks": self.tasks, "groups": self.groups}
        return dict(evaluate(model, loaded, bootstrap_iters=0, log_samples=True, limit=limit))


def build_tasks(
    chosen: TaskSet, documents: Sequence[Document], settings: EvaluateSettings, scratch: Path
) -> BuiltTasks:
    """Every task of a set as the harness builds it, its data read. Raises EngineError for what it cannot build."""
    built = BuiltTasks()
    for name, task in chosen.tasks.items():
        config = json.loads(json.dumps(task.config, default=str))  # the harness changes what it is given
        if task.made_from is not None:
            examples = make_examples(task.made_from, documents, limit=settings.task_examples, seed=settings.seed)
            if len(examples) < FEWEST_EXAMPLES:
                built.skipped[name] = f"the held-out documents give {len(examples)} examples"
                continue
            path = scratch / f"{len(built.tasks)}.jsonl"
            path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
            config["dataset_kwargs"] = {"data_files": {task.split: str(path)}}
        config["dataset_kwargs"] = {**config["dataset_kwargs"], "cache_dir": str(scratch)}
        _check_known(task)
        with _named(task.path):
            made = ConfigurableTask(config=config)
        made._aggregation_list = {metric: Aggregation(of) for metric, of in made.aggregation().items()}
        made.set_fewshot_seed(settings.seed)
        built.tasks[name] = made
    for name in chosen.groups:  # the innermost first: whatever a group contains was read before it
        members = chosen.groups[name].members
        if missing := [m for m in members if m not in built.tasks and m not in built.groups]:
            built.skipped[name] = f"{', '.join(missing)} {'was' if len(missing) == 1 else 'were'} skipped"
            continue
        with _named(chosen.groups[name].path):
            built.groups[name] = Group.from_config(dict(chosen.groups[name].config))
        for member in members:
            built.groups[name].add(built.groups[member] if member in built.groups else built.tasks[member])
    return built


def _check_known(task: TaskFile) -> None:
    """Whether the harness knows each metric and aggregation; it looks for others on a network, and goes on without."""
    for metric in task.config.get("metric_list", ()):
        named = {"metric": (metric["metric"], metric_registry)}
        if "aggregation" in metric:
            named["aggregation"] = (metric["aggregation"], aggregation_registry)
        for kind, (name, registry) in named.items():
            if name not in registry:
                known = ", ".join(sorted(registry.keys()))
                raise EngineError(f"{task.path}: metric_list: the harness has no {kind} {name!r}; it has {known}.")


def _check_metrics(path: Path, task: ConfigurableTask, found: Mapping[str, Any]) -> None:
    """Whether every metric that was asked for came out; the harness leaves out what an output type does not give."""
    given = {key.partition(",")[0] for key in found if "," in key}
    missing, more = set(task._metric_fn_list) - given, given - set(task._metric_fn_list)
    if missing and not {key for key in more if not key.endswith("_stderr")}:
        raise EngineError(
            f"{path}: metric_list: {', '.join(sorted(missing))}: the harness does not compute it for output_type "
            f"{task.OUTPUT_TYPE}; leave it out, or ask in another way."
        )


def _check_answers(task: ConfigurableTask) -> None:
    """Whether each question's answer is among its choices; the harness counts one that is not as wrong, whatever is said."""
    if task.OUTPUT_TYPE == "multiple_choice":
        for _, doc in task.doc_iterator(limit=TRIED_EXAMPLES):
            if not right_choices(task, doc):
                raise EngineError(
                    f"doc_to_target: {task.doc_to_target(doc)!r} is none of the choices {task.doc_to_choice(doc)!r}, nor "
                    "the number of one from 0."
                )


def _check_averages(group: GroupFile, found: Mapping[str, Any]) -> None:
    """Whether everything that a group averages is a metric of its tasks; the harness goes on without."""
    for entry in group.config["aggregate_metric_list"]:
        given = {key.partition(",")[2] for key in found if key.partition(",")[0] == entry["metric"]}
        filters = entry.get("filter_list") or sorted(given)
        if not given or not set([filters] if isinstance(filters, str) else filters) <= given:
            raise EngineError(
                f"{group.path}: aggregate_metric_list: {entry['metric']}: no task of the group {group.name!r} has this "
                f"metric{f' under every filter of {filters}' if given else ''}; name one of theirs."
            )


class _Silent(LM):
    """A model that says nothing: longer texts are less likely, and nothing is written."""

    def __init__(self, context_tokens: int) -> None:
        super().__init__()
        self._context_tokens = context_tokens

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(-1.0 - len(request.args[1]), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return [-1.0 - len(request.args[0]) for request in requests]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            generation_options(request.args[1], self._context_tokens)
        return ["" for _ in requests]


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Whatever the harness, jinja or `datasets` raise about a task becomes one refusal that names its file."""
    try:
        yield
    except EngineError as error:
        raise EngineError(f"{path}: {error}") from error
    except Exception as error:
        cause = error.__cause__ or error  # `datasets` says what went wrong in the error below its own
        shown = " ".join(f"{type(cause).__name__}: {cause}".split())
        shown = shown if len(shown) <= 600 else shown[:600] + " …"
        raise EngineError(
            f"{path}: the harness cannot run this task ({shown}). Check its fields against its data: templates name columns,"
            " doc_to_target names a choice or its number, and every split has examples."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's bars and remarks: what matters of them is checked here."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in ("lm_eval", "datasets")}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # scikit-learn's, of every draw that lacks a class
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _and_below(chosen: TaskSet, name: str) -> Iterator[str]:
    """A task, or a group and everything in it."""
    yield name
    for member in chosen.groups[name].members if name in chosen.groups else ():
        yield from _and_below(chosen, member)


def _answered(answer: dict[str, Any]) -> dict[str, Any]:
    """One line of the answers' file: the example, what the model said, and what that scored."""
    scored = {
        "example": answer["doc"],
        "answers": answer["filtered_resps"],
        "scores": {name: answer[name] for name in answer["metrics"]},
    }
    return scored if answer["filter"] == "none" else scored | {"filter": answer["filter"]}
