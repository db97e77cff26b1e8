"""Tasks of lm-evaluation-harness: built, dry-run without a model, and run, all without a network.

    try_tasks(settings, context_tokens=256)              # before training: builds and dry-runs every task of the user
    run_tasks(harness, documents, settings, out_dir)     # {"next_line": {"acc": {"value", "low", "high", "chance", …}, …}}

Every value is the harness's: each metric's per-example values, and the draws of its bootstrap, go through the harness's own
aggregation. Importing this module imports lm-evaluation-harness (about two seconds), so import it only where needed.
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

from conf.refusal import NO_VALUE, Refusal
from data.text.document import Document
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.task_data import make_examples
from pipelines.evaluation.task_files import TASKS, GroupFile, TaskFile, TaskSet, read_tasks

# Read when `datasets` is imported: a task's data are local files, and a machine without a network must not wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.api.registry import aggregation_registry, metric_registry
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs

from pipelines.evaluation.harness_figures import (
    Aggregation,
    Figure,
    Figures,
    group_figures,
    right_choices,
    task_figures,
)

MOST_NEW_TOKENS = 256
FEWEST_EXAMPLES = 4
TRIED_EXAMPLES = 2000
"""Examples per task in the dry run."""


def generation_options(options: Mapping[str, Any], context_tokens: int) -> dict[str, Any]:
    """A request's options with the harness's defaults filled in. Raises Refusal where no room is left for a prompt."""
    filled = dict(normalize_gen_kwargs(dict(options), MOST_NEW_TOKENS))
    if not isinstance(filled["until"], list) or not all(isinstance(text, str) for text in filled["until"]):
        raise Refusal("generation_kwargs.until", filled["until"], "texts to end before, in a list")
    if (new_tokens := int(filled["max_gen_toks"])) >= context_tokens:
        raise Refusal(
            "generation_kwargs.max_gen_toks",
            new_tokens,
            f"a window holds {context_tokens} tokens, so no room is left for a prompt",
            f"set generation_kwargs: {{max_gen_toks: …}} in the task's file to less than {context_tokens}",
        )
    return filled


def run_tasks(
    harness: LM, documents: Sequence[Document], settings: EvaluateSettings, out_dir: Path
) -> dict[str, Figures]:
    """Run `settings.tasks`; {task: {metric: {"value", "low", "high", "missing", "chance"}, "examples": n}}, or
    {"skipped": why} for a task that these documents give too few examples for. Groups come before their tasks.

    Each example and its answers go to `out_dir`/TASK.jsonl.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    chosen = read_tasks(settings.tasks, settings.task_folders)
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        built = build_tasks(chosen, documents, settings, Path(scratch))
        output = built.evaluate(harness)
        results = _results(chosen, built, output, settings)
    for name in built.tasks:
        lines = (json.dumps(_answered(answer), default=str) + "\n" for answer in output["samples"][name])
        (out_dir / f"{re.sub(r'[^a-zA-Z0-9_.:-]', '_', name)}.jsonl").write_text("".join(lines), encoding="utf-8")
    return results


def _results(
    chosen: TaskSet, built: BuiltTasks, output: Mapping[str, Any], settings: EvaluateSettings
) -> dict[str, Figures]:
    """The figures of every task, and of every group before its tasks."""
    results: dict[str, Figures] = {}
    figures_of: dict[str, dict[str, Figure]] = {}
    for name, task in built.tasks.items():
        answers = output["samples"][name]
        is_derived = chosen.tasks[name].made_from is not None
        figures_of[name] = task_figures(task, output["results"][name], answers, settings, is_made=is_derived)
        shown = {metric: figure.shown() for metric, figure in figures_of[name].items()}
        results[name] = shown | {"examples": len({answer["doc_id"] for answer in answers})}
    for name in built.groups:
        results[name] = group_figures(chosen, name, figures_of, output["results"])
    results |= {name: {"skipped": why, "examples": 0} for name, why in built.skipped.items()}
    return {name: results[name] for requested in chosen.names for name in _and_below(chosen, requested)}


def try_tasks(settings: EvaluateSettings, context_tokens: int) -> None:
    """Build every task that does not come with this program, and run it on a stub model.

    Raises Refusal for a task that could not be scored: its data, templates, filters, metrics or room for prompts.
    """
    chosen = read_tasks(settings.tasks, settings.task_folders)
    if not chosen.has_foreign():
        return
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        built = build_tasks(chosen, [SAMPLE] * FEWEST_EXAMPLES, settings, Path(scratch))
        for name, task in built.tasks.items():
            path = chosen.tasks[name].path
            if path.parent == TASKS:
                continue
            with _naming(path):
                _check_answers(task)
                output = evaluate(
                    _StubModel(context_tokens), {"tasks": {name: task}}, bootstrap_iters=0, limit=TRIED_EXAMPLES
                )
            _check_metrics(path, task, output["results"][name])
        if built.groups:
            stub = _StubModel(context_tokens)
            output = build_tasks(chosen, [SAMPLE] * FEWEST_EXAMPLES, settings, Path(scratch)).evaluate(stub, limit=1)
            for group in chosen.groups.values():
                _check_averages(group, output["results"][group.name])


SAMPLE = Document(
    text="".join(
        f"def value_{i}(first, other={i}):\n    return compute(first, {i * i}, (other + {i}))\n" for i in range(40)
    ),
    source="sample.py",
    position=0,
)
"""Stands in for held-out documents, of which there are none yet."""


@dataclass(kw_only=True)
class BuiltTasks:
    """The harness's task and group objects, and why others were skipped."""

    tasks: dict[str, ConfigurableTask] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def evaluate(self, model: LM, limit: int | None = None) -> dict[str, Any]:
        """The harness's output: per-example values in `samples`, aggregates of tasks and groups in `results`."""
        if not self.tasks:
            return {"results": {}, "samples": {}}
        loaded = {"tasks": self.tasks, "groups": self.groups}
        return dict(evaluate(model, loaded, bootstrap_iters=0, log_samples=True, limit=limit))


def build_tasks(
    chosen: TaskSet, documents: Sequence[Document], settings: EvaluateSettings, scratch: Path
) -> BuiltTasks:
    """Build every task of a set, with its data. Raises Refusal for what the harness cannot build."""
    built = BuiltTasks()
    for name, task in chosen.tasks.items():
        config = json.loads(json.dumps(task.config, default=str))  # a copy: the harness modifies its configuration
        if task.made_from is not None:
            examples = make_examples(task.made_from, documents, limit=settings.task_examples, seed=settings.seed)
            if len(examples) < FEWEST_EXAMPLES:
                built.skipped[name] = f"the held-out documents give {len(examples)} examples"
                continue
            path = scratch / f"{len(built.tasks)}.jsonl"
            path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
            config["dataset_kwargs"] = {"data_files": {task.split: str(path)}}
        config["dataset_kwargs"] = {**config["dataset_kwargs"], "cache_dir": str(scratch)}
        _check_registered(task)
        with _naming(task.path):
            built_task = ConfigurableTask(config=config)
        built_task._aggregation_list = {metric: Aggregation(of) for metric, of in built_task.aggregation().items()}
        built_task.set_fewshot_seed(settings.seed)
        built.tasks[name] = built_task
    for name in chosen.groups:  # innermost first: members are read before their group
        members = chosen.groups[name].members
        if missing := [m for m in members if m not in built.tasks and m not in built.groups]:
            built.skipped[name] = f"{', '.join(missing)} {'was' if len(missing) == 1 else 'were'} skipped"
            continue
        with _naming(chosen.groups[name].path):
            built.groups[name] = Group.from_config(dict(chosen.groups[name].config))
        for member in members:
            built.groups[name].add(built.groups[member] if member in built.groups else built.tasks[member])
    return built


def _check_registered(task: TaskFile) -> None:
    """Raise Refusal for a metric or aggregation unknown to the harness, which would look for it on a network."""
    for metric in task.config.get("metric_list", ()):
        registered = {"metric": (metric["metric"], metric_registry)}
        if "aggregation" in metric:
            registered["aggregation"] = (metric["aggregation"], aggregation_registry)
        for kind, (name, registry) in registered.items():
            if name not in registry:
                known = ", ".join(sorted(registry.keys()))
                raise Refusal(f"{task.path}: metric_list", name, f"the harness has no such {kind}; it has {known}")


def _check_metrics(path: Path, task: ConfigurableTask, output: Mapping[str, Any]) -> None:
    """Raise Refusal for a requested metric without a result: the harness drops those of other output types."""
    computed = {key.partition(",")[0] for key in output if "," in key}
    missing, more = set(task._metric_fn_list) - computed, computed - set(task._metric_fn_list)
    if missing and not {key for key in more if not key.endswith("_stderr")}:
        raise Refusal(
            f"{path}: metric_list",
            ", ".join(sorted(missing)),
            f"the harness does not compute it for output_type {task.OUTPUT_TYPE}",
            "leave it out, or use another output_type",
        )


def _check_answers(task: ConfigurableTask) -> None:
    """Raise Refusal for a target that is none of the choices: the harness would count every answer as wrong."""
    if task.OUTPUT_TYPE == "multiple_choice":
        for _, doc in task.doc_iterator(limit=TRIED_EXAMPLES):
            if not right_choices(task, doc):
                raise Refusal(
                    "doc_to_target",
                    task.doc_to_target(doc),
                    f"none of the choices {task.doc_to_choice(doc)!r}, nor the number of one from 0",
                )


def _check_averages(group: GroupFile, output: Mapping[str, Any]) -> None:
    """Raise Refusal for an averaged metric that no task of the group has; the harness silently drops it."""
    for entry in group.config["aggregate_metric_list"]:
        computed = {key.partition(",")[2] for key in output if key.partition(",")[0] == entry["metric"]}
        filters = entry.get("filter_list") or sorted(computed)
        if not computed or not set([filters] if isinstance(filters, str) else filters) <= computed:
            raise Refusal(
                f"{group.path}: aggregate_metric_list",
                entry["metric"],
                f"no task of the group {group.name!r} has this metric"
                f"{f' under every filter of {filters}' if computed else ''}",
                "name one of theirs",
            )


class _StubModel(LM):
    """A stub model: longer texts are less likely, and nothing is generated."""

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
def _naming(path: Path) -> Iterator[None]:
    """Turn any error of the harness, jinja or `datasets` into one Refusal with the file's path."""
    try:
        yield
    except Refusal as refusal:
        raise Refusal(f"{path}: {refusal.where}", refusal.value, refusal.rule, refusal.remedy) from refusal
    except Exception as error:
        cause = error.__cause__ or error  # `datasets` hides the reason in its error's cause
        shown = " ".join(f"{type(cause).__name__}: {cause}".split())
        shown = shown if len(shown) <= 600 else shown[:600] + " …"
        raise Refusal(
            path,
            NO_VALUE,
            f"the harness cannot run this task ({shown})",
            "check its fields against its data: templates name columns, doc_to_target names a choice or its number, and "
            "every split has examples",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the harness's progress bars and warnings: the relevant conditions are checked here."""
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
    """One line of the answers' file: the example, the model's answers, and their scores."""
    scored = {
        "example": answer["doc"],
        "answers": answer["filtered_resps"],
        "scores": {name: answer[name] for name in answer["metrics"]},
    }
    return scored if answer["filter"] == "none" else scored | {"filter": answer["filter"]}
