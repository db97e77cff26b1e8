"""Schema of a harness task file: its fields and their types, refused fields, and paths of its data.

Checked from the file alone, without importing lm-evaluation-harness; `harness_tasks.py` builds the tasks from their data.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from conf.refusal import NO_VALUE, Refusal

MAKERS = ("next_line", "close_bracket", "rolling_text")
"""Values of `made_from`; `task_data.py` makes these examples."""
FORMATS = ("json", "csv", "parquet", "text", "arrow")
"""Values of `dataset_path`: formats of local files."""
OUTPUTS = ("loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until")

FIELDS: Mapping[str, tuple[type, ...]] = {
    "made_from": (str,),
    "task": (str,),
    "task_alias": (str,),
    "tag": (str, list),
    "dataset_path": (str,),
    "dataset_name": (str,),
    "dataset_kwargs": (dict,),
    "training_split": (str,),
    "validation_split": (str,),
    "test_split": (str,),
    "fewshot_split": (str,),
    "doc_to_text": (str, int),
    "doc_to_target": (str, int, list),
    "doc_to_choice": (str, list, dict),
    "description": (str,),
    "target_delimiter": (str,),
    "fewshot_delimiter": (str,),
    "fewshot_config": (dict,),
    "num_fewshot": (int,),
    "metric_list": (list,),
    "output_type": (str,),
    "generation_kwargs": (dict,),
    "repeats": (int,),
    "filter_list": (list,),
    "should_decontaminate": (bool,),
    "doc_to_decontamination_query": (str,),
    "gen_prefix": (str,),
    "metadata": (object,),
    "unsafe_code": (bool,),
}
"""Fields of a task file and their types; null counts as unset."""
GROUP_FIELDS: Mapping[str, tuple[type, ...]] = {
    "group": (str,),
    "group_alias": (str,),
    "task": (str, list),
    "aggregate_metric_list": (list, dict),
    "metadata": (object,),
    "tag": (str, list),
}
NAMES = {str: "text", int: "a number", list: "a list", dict: "a mapping", bool: "true or false"}
CODE = "runs code, and only declarative tasks run here; write what it makes into the data file, and name the field"
REFUSED: Mapping[str, str] = {
    "class": CODE,
    "custom_dataset": CODE,
    "process_docs": CODE,
    "process_results": CODE,
    "use_prompt": "fetches a prompt from promptsource; write it out as doc_to_text, doc_to_target and doc_to_choice",
    "doc_to_image": "prompts with images, and these models read text",
    "doc_to_audio": "prompts with sound, and these models read text",
    "task_list": "is no part of the harness's guide; write a group with its tasks",
}
"""Refused fields of the harness, each with its reason and remedy."""


def check_fields(path: Path, config: Mapping[Any, Any], known: Mapping[str, tuple[type, ...]]) -> None:
    """Raise Refusal for an unknown field or a value of the wrong type."""
    for key, value in config.items():
        if key in REFUSED:
            refuse(path, key, REFUSED[key])
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            refuse(path, key, "the harness has no such field", hint)
        types = known[key]
        is_flag = isinstance(value, bool) and bool not in types  # bool is an int in Python
        if value is not None and object not in types and (is_flag or not isinstance(value, types)):
            refuse(path, key, f"expected {' or '.join(NAMES[kind] for kind in types)}", value=value)


def check_task(path: Path, config: dict[str, Any], maker: str | None) -> dict[str, Any]:
    """A task's configuration, checked as far as possible without its data. Raises Refusal."""
    if config.get("unsafe_code"):
        refuse(path, "unsafe_code", CODE)
    if maker is not None and maker not in MAKERS:
        refuse(path, "made_from", f"examples are made from held-out documents by {', '.join(MAKERS)}", value=maker)
    output = config.get("output_type", "generate_until")
    if output not in OUTPUTS:
        refuse(path, "output_type", f"known are {', '.join(OUTPUTS)}", value=output)
    if not (config.get("test_split") or config.get("validation_split")):
        refuse(path, "test_split", "missing", "name the split to evaluate (test_split: test, or validation_split: …)")
    for key in ("doc_to_text", "doc_to_target", *(("doc_to_choice",) if output == "multiple_choice" else ())):
        if key not in config:
            refuse(path, key, f"missing; a task of output_type {output} needs a prompt and a right answer")
    for key, least in (("num_fewshot", 0), ("repeats", 1)):
        if config.get(key, least) < least:
            refuse(path, key, f"must be at least {least}", value=config[key])
    choices = config.get("doc_to_choice")
    if isinstance(choices, list | dict) and not all(
        isinstance(choice, str) for choice in (choices.values() if isinstance(choices, dict) else choices)
    ):
        remedy = "put quotes around them (YAML takes yes for true)"
        refuse(path, "doc_to_choice", "choices are texts", remedy, value=choices)
    if config.get("metric_list") == []:
        refuse(path, "metric_list", "names no metric", "leave it out for those of its output_type")
    for metric in config.get("metric_list", ()):
        if not isinstance(metric, dict) or not isinstance(metric.get("metric"), str):
            refuse(path, "metric_list", "each entry is a mapping with metric: NAME", value=metric)
        if metric["metric"] == "bypass":
            refuse(path, "metric_list", "bypass measures nothing (the harness writes 999)", "leave it out")
        if metric.get("hf_evaluate"):
            remedy = "use a metric of the harness"
            refuse(path, "metric_list", "hf_evaluate fetches code from a network", remedy, value=metric["metric"])
    for rule in config.get("filter_list", ()):
        if not isinstance(rule, dict) or not isinstance(rule.get("filter"), list) or "name" not in rule:
            refuse(path, "filter_list", "each entry is a mapping with name: and filter: [{function: …}]", value=rule)
    return config


def check_averages(path: Path, averaged: Sequence[Any]) -> list[dict[str, Any]]:
    """A group's checked `aggregate_metric_list`."""
    for entry in averaged:
        if not isinstance(entry, dict) or not isinstance(entry.get("metric"), str):
            refuse(path, "aggregate_metric_list", "each entry is a mapping with metric: NAME", value=entry)
        if unknown := set(entry) - {"metric", "filter_list", "aggregation", "weight_by_size"}:
            names = ", ".join(sorted(map(str, unknown)))
            refuse(path, "aggregate_metric_list", f"{names}: the harness has no such field", "leave it out")
        if entry.get("aggregation", "mean") != "mean":
            refuse(
                path,
                "aggregate_metric_list.aggregation",
                "the harness supports mean alone",
                value=entry["aggregation"],
            )
    return [dict(entry) for entry in averaged]


def data_files_of(path: Path, config: Mapping[str, Any]) -> dict[str, list[str]]:
    """A task's own data by split, absolute, relative paths being those beside its YAML file.

    A file without a split is the evaluated split's.
    """
    dataset_kwargs = dict(config.get("dataset_kwargs") or {})
    if config.get("dataset_path") not in FORMATS:
        refuse(
            path,
            "dataset_path",
            "would be fetched from a network, and its content could not enter a digest",
            f"put the data beside the file and write dataset_path: json (or {', '.join(FORMATS[1:])}) and dataset_kwargs: "
            "{data_files: NAME}",
            value=config.get("dataset_path"),
        )
    if dataset_kwargs.get("streaming") or "data_dir" in dataset_kwargs or not dataset_kwargs.get("data_files"):
        refuse(path, "dataset_kwargs", "name the task's own files, as in {data_files: {test: NAME.jsonl}}")
    evaluated = config.get("test_split") or config["validation_split"]
    data_files = dataset_kwargs["data_files"]
    by_split = data_files if isinstance(data_files, dict) else {evaluated: data_files}
    files_by_split = {str(split): _expanded(path, names) for split, names in by_split.items()}
    few_shot = (config.get("fewshot_config") or {}).get("split")
    for key, split in [(key, config.get(key)) for key in FIELDS if key.endswith("_split")] + [
        ("fewshot_config", few_shot)
    ]:
        if split is not None and split not in files_by_split:
            refuse(path, key, f"this split has no data; data_files gives {', '.join(files_by_split)}", value=split)
    return files_by_split


def _expanded(path: Path, names: Any) -> list[str]:
    """Files of a name, a glob or a list of them, sorted within each glob."""
    files: list[str] = []
    for name in [names] if isinstance(names, str) else names if isinstance(names, list) else [None]:
        if not isinstance(name, str):
            refuse(path, "data_files", "give a file's name, a list of them, or one a split", value=names)
        if "://" in name:
            rule = "data lie on this disk, so that they can enter a digest"
            refuse(path, "data_files", rule, "download the file", value=name)
        place = path.parent / Path(name).expanduser()
        matches = [place] if place.is_file() else [p for p in sorted(place.parent.glob(place.name)) if p.is_file()]
        if not matches:
            refuse(path, "data_files", "no such file beside it", value=name)
        files += [str(match.absolute()) for match in matches]
    return files


def refuse(path: Path, field: str, rule: str, remedy: str = "", *, value: object = NO_VALUE) -> NoReturn:
    """Raise Refusal about a field of a task file."""
    raise Refusal(f"{path}: {field}", value, rule, remedy)
