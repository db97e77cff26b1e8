"""Claims about harness task files: every form of the harness's guide is read, and what cannot be run is one refusal."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from conf.refusal import Refusal
from pipelines.evaluation import harness_tasks
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.task_files import TASKS, read_tasks
from pipelines.evaluation.task_schema import FIELDS, MAKERS, REFUSED
from pipelines.stages import evaluate

CHOICE = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": "capitals.jsonl"},
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}",
    "doc_to_choice": "{{c}}",
    "doc_to_target": "{{a}}",
    "test_split": "test",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [{"q": "Paris is in", "c": ["France", "Peru"], "a": number % 2, "b": "France"} for number in range(6)]
    (tmp_path / "capitals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def write(folder: Path, name: str, **config: object) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path


def read(folder: Path, *names: str):
    return read_tasks(names, (str(folder),))


def test_the_fields_are_those_of_the_harness():
    from lm_eval.config.task import TaskConfig

    from pipelines.evaluation import task_data

    theirs = {field.name for field in fields(TaskConfig)}
    assert theirs <= FIELDS.keys() | REFUSED.keys()
    assert FIELDS.keys() - theirs == {"made_from"}
    assert set(MAKERS) == set(task_data.MAKERS)


def test_a_file_includes_others_whose_data_lie_beside_them(folder: Path):
    base = folder / "shared"
    base.mkdir()
    (folder / "capitals.jsonl").rename(base / "capitals.jsonl")
    write(base, "base", **CHOICE)
    write(base, "few", num_fewshot=2, description="Capitals.")
    write(folder, "mine", include=["shared/base.yaml", "shared/few.yaml"], task="mine", num_fewshot=1)
    tasks = read(folder, "mine")
    config = tasks.tasks["mine"].config
    assert (config["num_fewshot"], config["description"], config["doc_to_text"]) == (1, "Capitals.", "{{q}}")
    assert config["dataset_kwargs"]["data_files"] == {"test": [str(base / "capitals.jsonl")]}
    names = {file.name for file in tasks.files}
    assert names == {"mine.yaml", "base.yaml", "few.yaml", "capitals.jsonl"}  # all of them enter the digest


@pytest.mark.parametrize(
    ("data_files", "splits", "expected"),
    [
        ("capitals.jsonl", {"test_split": None, "validation_split": "validation"}, {"validation": 1}),
        ("capitals.jsonl", {"test_split": "train"}, {"train": 1}),
        (["capitals.jsonl", "more.jsonl"], {}, {"test": 2}),
        ("*.jsonl", {}, {"test": 2}),
        ({"test": "capitals.jsonl", "train": ["more.jsonl"]}, {"training_split": "train"}, {"test": 1, "train": 1}),
    ],
)
def test_data_may_be_one_file_several_a_glob_or_one_a_split(folder: Path, data_files, splits, expected):
    (folder / "more.jsonl").write_text((folder / "capitals.jsonl").read_text())
    write(folder, "mine", task="mine", **{**CHOICE, "dataset_kwargs": {"data_files": data_files}, **splits})
    found = read(folder, "mine").tasks["mine"].config["dataset_kwargs"]["data_files"]
    assert {split: len(files) for split, files in found.items()} == expected


def test_groups_hold_names_tags_overrides_and_tasks_and_groups_of_their_own(folder: Path):
    write(folder, "one", task="one", **CHOICE)
    write(folder, "file-of-two", task="two", tag=["cities"], **CHOICE)
    write(
        folder,
        "all",
        group="all",
        num_fewshot=1,
        aggregate_metric_list={"metric": "acc", "weight_by_size": False},
        task=[
            "one",
            "cities",
            {"task": "three", **CHOICE, "num_fewshot": 3},
            {"group": "inner", "task": [{"task": "four", **CHOICE}], "aggregate_metric_list": [{"metric": "acc"}]},
        ],
    )
    tasks = read(folder, "all")
    assert tasks.names == ("all",)
    assert tasks.groups["all"].members == ("one", "two", "all::three", "all::inner")
    assert tasks.leaves("all") == ["one", "two", "all::three", "all::inner::four"]
    shots = {name: task.config["num_fewshot"] for name, task in tasks.tasks.items()}
    assert shots == {"one": 1, "two": 1, "all::three": 3, "all::inner::four": 1}
    assert read(folder, "cities").names == ("two",)


def test_a_task_asked_for_alone_and_with_a_groups_settings_is_refused(folder: Path):
    write(folder, "one", task="one", **CHOICE)
    write(folder, "all", group="all", task=["one"], num_fewshot=1)
    with pytest.raises(Refusal, match="'one': requested twice with different settings"):
        read(folder, "all", "one")


REFUSALS = {
    "the file is empty": "",
    "the file holds a list": "- a\n- b\n",
    "not plain YAML": "task: [a\n",
    "!function utils.prepare runs code": "task: x\nprocess_docs: !function utils.prepare\n",
    "include = 'no.yaml': there is no such file": {"include": "no.yaml"},
    "include: the file includes itself": {"include": "bad.yaml"},
    "Did you mean 'doc_to_text'": {"doc_to_txt": "x"},
    "num_fewshot = 'two': expected a number": {"num_fewshot": "two"},
    "repeats = true: expected a number": {"repeats": True},
    "metric_list = 'acc': expected a list": {"metric_list": "acc"},
    "each entry is a mapping with metric": {"metric_list": ["acc"]},
    "num_fewshot = -1: must be at least 0": {"num_fewshot": -1},
    "names no metric": {"metric_list": []},
    "choices are texts. Put quotes around them": {"doc_to_choice": [True, False]},
    "bypass measures nothing": {"metric_list": [{"metric": "bypass"}]},
    "hf_evaluate fetches code": {"metric_list": [{"metric": "rouge", "hf_evaluate": True}]},
    "output_type = 'choices'": {"output_type": "choices"},
    "test_split: missing. Name the split": {"test_split": None},
    "training_split = 'train': this split has no data; data_files gives test": {"training_split": "train"},
    "fewshot_config = 'dev': this split has no data": {"fewshot_config": {"split": "dev"}},
    "doc_to_choice: missing": {"doc_to_choice": None},
    "data_files = .*none.jsonl': no such file": {"dataset_kwargs": {"data_files": "none.jsonl"}},
    "data lie on this disk": {"dataset_kwargs": {"data_files": "https://example.org/x.jsonl"}},
    "would be fetched from a network": {"dataset_path": "Rowan/hellaswag"},
    "name the task's own files": {"dataset_kwargs": {"data_dir": "."}},
    "process_results: runs code": {"process_results": "x"},
    "doc_to_image: prompts with images": {"doc_to_image": "x"},
    "unsafe_code: runs code": {"unsafe_code": True},
    "made_from = 'poems'": {"made_from": "poems"},
    "the old spelling of tag": {"group": "bad", "task": "x"},
    "this one has none": "group: bad\ntask: []\n",
    "'bad': this group contains itself": "group: bad\ntask: [bad]\n",
    "'next_line': stands twice": "group: bad\ntask: [next_line, next_line]\n",
    "no member of a group": "group: bad\ntask: [3]\n",
    "the harness supports mean alone": "group: bad\ntask: [next_line]\n"
    "aggregate_metric_list: [{metric: acc, aggregation: max}]\n",
}


@pytest.mark.parametrize(("said", "config"), REFUSALS.items(), ids=list(REFUSALS))
def test_what_cannot_be_run_is_refused_in_a_sentence_that_names_the_file(folder: Path, said: str, config):
    if isinstance(config, str):
        (folder / "bad.yaml").write_text(config)
    else:
        write(folder, "bad", **{"task": "bad", **CHOICE, **config})
    with pytest.raises(Refusal, match=said) as refused:
        read(folder, "bad")
    assert "bad" in str(refused.value) and "\n" not in str(refused.value)


def test_an_unknown_task_is_answered_with_those_there_are_and_with_what_could_not_be_read(folder: Path):
    with pytest.raises(Refusal, match=r"did you mean 'next_line'.*close_bracket, held_out_rolling, next_line"):
        read_tasks(["next_lin"], ())
    (folder / "broken.yaml").write_text("")
    (folder / "latin.yaml").write_bytes(b"task: caf\xe9\n")
    with pytest.raises(Refusal, match=r"broken.yaml could not be read: .*latin.yaml could not be read"):
        read(folder, "mine")


@pytest.mark.parametrize(
    ("said", "config"),
    [
        ("'accuracy': the harness has no such metric; it has acc, ", {"metric_list": [{"metric": "accuracy"}]}),
        (
            "'average': the harness has no such aggregation; it has bits_per",
            {"metric_list": [{"metric": "acc", "aggregation": "average"}]},
        ),
        ("does not compute it for output_type", {"metric_list": [{"metric": "acc"}, {"metric": "word_perplexity"}]}),
        ("TypeError", {"metric_list": [{"metric": "likelihood"}]}),
        ("'nothing' is undefined", {"doc_to_text": "{{nothing}}"}),
        ("Sample larger than population|sample", {"num_fewshot": 100}),
        (r"doc_to_target = 'Rome': none of the choices \['France', 'Peru'\]", {"doc_to_target": "Rome"}),
        ("JSON parse error", {"dataset_kwargs": {"data_files": "broken.jsonl"}}),
        (
            "until .* texts to end before",
            {"output_type": "generate_until", "metric_list": None, "generation_kwargs": {"until": [3]}},
        ),
        ("no task of the group 'bad' has this metric", {"group": "bad", "task": ["good"]}),
        ("cannot run this task", {"doc_to_choice": "{{q}}"}),
        ("extract", {"filter_list": [{"name": "f", "filter": [{"function": "extract"}]}]}),
        ("cannot run this task", {"dataset_kwargs": {"data_files": "empty.jsonl"}}),
        ("= 256: a window holds 128 tokens", {"output_type": "generate_until", "metric_list": None}),
    ],
)
def test_every_task_is_built_and_tried_before_anything_trains(folder: Path, said: str, config):
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"q": 1\n{')
    write(folder, "good", task="good", **CHOICE)
    rest = {"aggregate_metric_list": [{"metric": "f1"}]} if "group" in config else {"task": "bad", **CHOICE}
    path = write(folder, "bad", **{**rest, **config})
    settings = EvaluateSettings(tasks=("bad",), task_folders=(str(folder),))
    with pytest.raises(Refusal, match=said) as refused:
        evaluate.check_tasks(settings, (128, 64))
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_plan_and_run_refuse_a_task_that_cannot_be_built_before_any_step(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    from pipelines.__main__ import main

    write(folder, "bad", task="bad", **{**CHOICE, "doc_to_text": "{{nothing}}"})
    (folder / "text.txt").write_text("Once upon a time.\n" * 200)
    words = ["experiment=text", f"corpus.paths=[{folder / 'text.txt'}]", f"store={folder / 'store'}"]
    words += ["compute.backend=local", "evaluate.tasks=[bad]", f"evaluate.task_folders=[{folder}]"]
    for verb in ("plan", "run"):
        with pytest.raises(SystemExit) as left:
            main([verb, *words])
        assert left.value.code == 2
        assert "'nothing' is undefined" in capsys.readouterr().err
    assert not list((folder / "store").glob("*/*/manifest.json"))


def test_the_tasks_that_come_with_this_program_are_built_too(folder: Path):
    names = tuple(sorted(path.stem for path in TASKS.glob("*.yaml")))
    write(folder, "all", group="all", task=list(names))
    settings = EvaluateSettings(tasks=("all",), task_folders=(str(folder),))
    chosen = read(folder, "all")
    chosen_alone = read_tasks(names, ())
    assert chosen.has_foreign() and not chosen_alone.has_foreign()
    built = harness_tasks.build_tasks(chosen, [harness_tasks.SAMPLE] * 4, settings, folder)
    assert set(built.tasks) == set(names) and built.skipped == {}
