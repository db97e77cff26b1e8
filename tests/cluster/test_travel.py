"""What a command says when it is sent: settings as they are typed, paths that mean the same there, no idle GPUs unsaid."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest

from conf.refusal import Refusal
from conf.typed import arms, field_types
from pipelines.__main__ import _parse, main
from pipelines.settings.compose import compose
from pipelines.settings.derive import Settings
from pipelines.verbs.commands import cluster_settings
from pipelines.verbs.travel import paths_of, prepare_command

TEXT = ["run", "experiment=text", "corpus.paths=[/data]", "compute.device=cpu"]


def send(cluster: list[str], command: list[str]) -> tuple[list[str], list[str]]:
    return prepare_command(cluster_settings(cluster), command, _parse(command[0], command[1:]))


SLURM = ["cluster=slurm", "store=/shared/runs"]
KUBERAY = ["cluster=kuberay", "image=r.example.org/a:1", "store=s3://b/runs"]


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ([*KUBERAY, "secrets.WANDB_API_KEY=tracking/wandb"], "secrets", {"WANDB_API_KEY": "tracking/wandb"}),
        ([*KUBERAY, "node_selector.zone=a"], "node_selector", {"zone": "a"}),
        ([*KUBERAY, "node_selector={zone: 1}"], "node_selector", {"zone": "1"}),
        ([*SLURM, "memory=3000"], "memory", "3000"),
        ([*SLURM, "time_limit=30:00"], "time_limit", "30:00"),
        ([*SLURM, "time_limit='30:00'"], "time_limit", "30:00"),
        ([*SLURM, "account=1234"], "account", "1234"),
        ([*SLURM, "qos=yes"], "qos", "yes"),
        ([*SLURM, "partition=null"], "partition", None),
        ([*SLURM, "nodes=3"], "nodes", 3),
        ([*SLURM, "setup=[module load cuda/12.1,export A=1]"], "setup", ("module load cuda/12.1", "export A=1")),
        (["cluster=ray", "pip=[1.10]"], "pip", ("1.10",)),
    ],
)
def test_a_clusters_settings_are_taken_as_they_are_typed(words: list[str], field: str, value: Any) -> None:
    assert getattr(cluster_settings(words), field) == value


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*SLURM, "nodse=2"], r"^nodse: no such key\. Did you mean nodes\?"),
        ([*SLURM, "secrets.A=b/c"], "^secrets: no such key"),
        ([*SLURM, "nodes.x=1"], r"^nodes\.x = 1: nodes holds no settings"),
        ([*SLURM, "nodes=two"], "^nodes = 'two': expected a whole number"),
        ([*SLURM, "setup=[a"], r"^setup = \[a: it cannot be read"),
        ([*SLURM, "nodes"], "'nodes': no setting of a cluster. Write KEY=VALUE"),
        ([*KUBERAY, "secrets.A=hunter2"], r"^secrets\.A: must name a Kubernetes secret"),
    ],
)
def test_a_clusters_setting_that_cannot_be_is_named(words: list[str], says: str) -> None:
    with pytest.raises(Refusal, match=says):
        cluster_settings(words)


RELATIVE = {
    "corpus.paths=[books,/abs]": "corpus.paths=['{here}/books','/abs']",
    "corpus.paths=['a b/*.txt']": "corpus.paths=['{here}/a b/*.txt']",
    "sources.web.paths=[w.jsonl]": "sources.web.paths=['{here}/w.jsonl']",
    "finetune.data.paths=[chats.jsonl]": "finetune.data.paths=['{here}/chats.jsonl']",
    "pretrain.init_from=weights": "pretrain.init_from='{here}/weights'",
    "finetune.init_from=./weights": "finetune.init_from='{here}/weights'",
    "evaluate.task_folders=[tasks]": "evaluate.task_folders=['{here}/tasks']",
}


@pytest.mark.parametrize("word", RELATIVE)
@pytest.mark.parametrize("verb", ["run", "status"])
def test_relative_paths_are_absolute_under_slurm_and_refused_on_machines_without_our_disk(word: str, verb: str) -> None:
    command = [verb, *TEXT[1:], "finetune=chat", word]
    moved, _ = send(SLURM, command)
    assert RELATIVE[word].format(here=os.getcwd()) in moved[len(command) :]
    again = [value for key, value in paths_of(compose(moved[1:])) if word.startswith(f"{key}=")]
    assert all(path.startswith("/") for path in again[0])  # and reads back
    for cluster in (["cluster=ray"], KUBERAY):
        with pytest.raises(Refusal, match=rf"^{re.escape(word.partition('=')[0])} = .*: a relative path"):
            send(cluster, command)


@pytest.mark.parametrize("path", ["/data", "~/books", "s3://bucket/books"])
def test_paths_that_mean_the_same_everywhere_are_left_as_they_are(path: str) -> None:
    command = ["run", "experiment=text", "compute.device=cpu", f"corpus.paths=['{path}']"]
    for cluster in (["cluster=ray"], SLURM):
        assert send(cluster, command)[0] == command


def test_a_quote_in_a_path_reads_back_as_itself() -> None:
    moved, _ = send(SLURM, ["run", "experiment=text", "compute.device=cpu", 'corpus.paths=["it\'s here"]'])
    assert compose(moved[1:]).corpus.paths == (f"{os.getcwd()}/it's here",)


def test_a_sweep_with_a_relative_path_is_refused_everywhere() -> None:
    with pytest.raises(Refusal, match=r"corpus\.paths = books: a relative path"):
        send(SLURM, ["run", "-m", *TEXT[1:], "corpus.paths=[books]", "optim.lr=1e-3,2e-3"])


def test_a_folder_to_generate_from_is_no_relative_path() -> None:
    with pytest.raises(Refusal, match="--from = out/model: a relative path"):
        send(["cluster=ray"], ["generate", "--prompt", "a", "--from", "out/model"])


def test_every_setting_that_holds_paths_is_declared_as_one() -> None:
    """So that a new one cannot travel unseen: whatever is called like a place is marked."""
    unmarked = {
        key
        for key, marked in _all_fields(Settings, "", ())
        if re.search(r"(^|[.]|task_)(paths?|folders?|dirs?|files?|init_from|store)$", key) and not marked
    }
    assert unmarked == set()


def _all_fields(cls: type, above: str, seen: tuple[type, ...]) -> Iterator[tuple[str, bool]]:
    for field in dataclasses.fields(cls):
        yield above + field.name, bool(field.metadata.get("path"))
        hint = field_types(cls).get(field.name)
        inner = [
            arm for one in (hint, *getattr(hint, "__args__", ())) for arm in arms(one) if dataclasses.is_dataclass(arm)
        ]
        for each in inner:
            if each not in seen:
                yield from _all_fields(each, f"{above}{field.name}.", (*seen, each))


GPUS: list[tuple[list[str], list[str]]] = [
    ([*SLURM, "nodes=2", "gpus_per_node=8"], ["nodes=2 gpus_per_node=8", "compute.ranks=16"]),
    ([*KUBERAY, "workers=2", "gpus_per_worker=4"], ["workers=2 gpus_per_worker=4", "compute.ranks=8"]),
]


@pytest.mark.parametrize(("cluster", "says"), GPUS)
def test_gpus_that_nobody_said_may_idle_are_refused_with_the_ranks_that_use_them(
    cluster: list[str], says: list[str]
) -> None:
    command = ["run", "experiment=text", "corpus.paths=[/data]"]
    with pytest.raises(Refusal) as caught:
        send(cluster, command)
    assert all(word in str(caught.value) for word in says)
    moved, lines = send(cluster, [*command, says[1]])  # the remedy, typed
    assert lines == []
    assert compose(moved[1:]).compute.cpus_per_rank == 1 if cluster[0] == "cluster=slurm" else 2
    assert ("compute.device=cuda" in moved) == (cluster[0] == "cluster=kuberay")  # whose head sees no GPU
    with pytest.raises(Refusal, match=r"compute\.ranks = 99: each rank takes a GPU"):
        send(cluster, [*command, "compute.ranks=99"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["compute.ranks=1"], "idle: 15 of 16 GPUs (compute.ranks=1 takes one each)."),
        (["compute.device=cpu"], "idle: 16 of 16 GPUs (compute.device=cpu uses none)."),
    ],
)
def test_gpus_that_are_left_idle_on_purpose_are_said(words: list[str], line: str) -> None:
    _, lines = send(GPUS[0][0], ["run", "experiment=text", "corpus.paths=[/data]", *words])
    assert lines == [line]


def test_machines_without_gpus_that_train_nothing_are_said_and_ranks_fill_the_others_evenly() -> None:
    two = [*SLURM, "nodes=2", "cpus_per_node=6"]
    assert send(two, TEXT)[1] == [
        "idle while training: 1 of 2 machines (compute.ranks=1); compute.ranks=2 or more uses all."
    ]
    moved, lines = send(two, [*TEXT, "compute.ranks=4"])
    assert (lines, compose(moved[1:]).compute.cpus_per_rank) == ([], 3)
    with pytest.raises(Refusal, match="10 ranks on a machine of 6 CPUs"):
        send(two, [*TEXT, "compute.ranks=20"])


def test_one_machine_gets_the_command_word_for_word() -> None:
    assert send(SLURM, TEXT) == (TEXT, [])


def test_the_command_line_sends_what_is_said_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(
            [
                "submit",
                *GPUS[0][0],
                "--dry-run",
                "--",
                "run",
                "experiment=text",
                "corpus.paths=[books]",
                "compute.ranks=2",
            ]
        )
    out, err = capsys.readouterr()
    assert f"corpus.paths=['{os.getcwd()}/books']" in out.replace("'\"'\"'", "'")
    assert "idle: 14 of 16 GPUs" in err
