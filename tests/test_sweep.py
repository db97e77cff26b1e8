"""Sweeps: trials share what does not differ, a second time costs nothing, the table is sorted, one failure is only one."""

from __future__ import annotations

import re
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

from pipelines.__main__ import main
from pipelines.settings.compose import multirun
from pipelines.settings.derive import Settings
from pipelines.settings.overrides import hydra_overrides
from pipelines.verbs.sweep import Outcome, show
from tests.cluster.head import ray_head
from tests.conftest import LOCAL, athanor, complaint, tiny


def words(corpus_dir: Path, store: Path, *more: str) -> list[str]:
    """A sweep of pretraining alone, whose metric is the loss."""
    kept = [word for word in tiny(corpus_dir, store) if not word.startswith("finetune")]
    return ["-m", *kept, "finetune=none", "compute.cpus_per_rank=1", "--until", "pretrain", *more]


def sweep(corpus_dir: Path, store: Path, *more: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return athanor("run", *words(corpus_dir, store, *more), check=check)


def made(store: Path) -> dict[str, int]:
    """How many artifacts of each step there are."""
    count: dict[str, int] = {}
    for path in store.glob("*/*/manifest.json"):
        count[path.parts[-3]] = count.get(path.parts[-3], 0) + 1
    return count


def table(printed: str) -> list[tuple[str, str]]:
    """(metric, overrides) of each line of the table, in its order."""
    return re.findall(r"^\d+\s+(failed|[\d.]+)\s+(\S.*?)\s*$", printed, re.MULTILINE)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.mark.slow
def test_trials_share_steps_the_table_is_sorted_and_again_is_free(corpus_dir: Path, store: Path) -> None:
    first = sweep(corpus_dir, store, LOCAL, "optim.lr=1e-5,1e-2")
    assert [words for _, words in table(first.stdout)] == ["optim.lr=0.01", "optim.lr=1e-05"]
    assert [value for value, _ in table(first.stdout)] == sorted(value for value, _ in table(first.stdout))
    assert made(store) == {"corpus": 1, "tokenizer": 1, "shards": 1, "pretrain": 2}
    again = sweep(corpus_dir, store, LOCAL, "optim.lr=1e-5,1e-2")
    assert table(again.stdout) == table(first.stdout)
    assert "started" not in again.stderr
    assert made(store)["pretrain"] == 2


@pytest.mark.slow
def test_trials_side_by_side_on_a_local_ray_build_what_they_share_once(corpus_dir: Path, tmp_path: Path) -> None:
    result = sweep(corpus_dir, tmp_path, "optim.lr=1e-2,1e-3", "hydra/launcher=ray")
    assert {words for _, words in table(result.stdout)} == {"optim.lr=0.01", "optim.lr=0.001"}
    assert made(tmp_path) == {"corpus": 1, "tokenizer": 1, "shards": 1, "pretrain": 2}
    assert "optim.lr=0.001  pretrain made" in result.stderr
    assert "ConfigStore" not in result.stderr


@pytest.mark.prove
def test_a_cluster_that_runs_already_does_only_what_is_missing_and_a_failure_is_one_line(
    corpus_dir: Path, store: Path
) -> None:
    before = made(store)  # what the plain launcher left, if its test ran
    with ray_head() as head:
        more = (f"compute.address={head.address}", "optim.lr=1e-2", "pretrain.global_batch_tokens=2048,1000")
        result = sweep(corpus_dir, store, *more, "hydra/launcher=ray", check=False)
        workers = list(head.folder.glob("session_*/logs/worker-*"))
    assert result.returncode == 1, result.stderr
    [(value, good), failed] = table(result.stdout)
    assert (float(value) > 0, good) == (True, "pretrain.global_batch_tokens=2048")
    assert failed == ("failed", "pretrain.global_batch_tokens=1000")
    assert "global_batch_tokens = 1000" in result.stderr
    assert {**made(store), "pretrain": 0} == {"corpus": 1, "tokenizer": 1, "shards": 1, "pretrain": 0}
    assert made(store)["pretrain"] == before.get("pretrain", 0) + 1
    assert workers


def test_a_sweep_in_which_nothing_is_valid_is_one_clear_error(
    corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["run", *words(corpus_dir, tmp_path, "optim.lrr=1,2")])
    said = capsys.readouterr().err
    assert left.value.code == 2, said
    assert "Did you mean optim.lr?" in said
    assert "Traceback" not in said


def test_trials_of_one_sweep_are_one_group_which_the_person_may_name(
    corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[str | None] = []

    def execute(settings: Settings, *_: object) -> None:
        groups.append(settings.pretraining().train.tracking.group)

    monkeypatch.setattr("pipelines.verbs.sweep.execute", execute)

    def run(*more: str) -> set[str | None]:
        groups.clear()
        with pytest.raises(SystemExit):
            main(["run", *words(corpus_dir, tmp_path, LOCAL, *more)])
        assert len(groups) == 2
        return set(groups)

    [name] = run("optim.lr=1e-3,3e-3", "seed=1")
    assert name is not None and re.fullmatch("sweep-text-[0-9a-f]{8}", name)
    assert run("seed=1", "optim.lr=1e-3,3e-3") == {name}
    assert run("optim.lr=1e-3,4e-3", "seed=1") != {name}
    assert run("optim.lr=1e-3,3e-3", "tracking.group=mine") == {"mine"}


def test_a_sweep_is_sorted_by_what_its_trials_differ_in_and_says_what_intervals_do_not_tell(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def shown(*trials: dict[str, float]) -> str:
        show([Outcome(words=(f"x={n}", "same=1"), figures=figures, failure="") for n, figures in enumerate(trials)])
        return capsys.readouterr().out

    ends = {"bits_per_byte_low": 1.0, "bits_per_byte_high": 1.3}
    tuned = [{"bits_per_byte": 1.2, **ends, "finetuned_conversation_loss": loss} for loss in (2.0, 1.0)]
    out = shown(*tuned)  # tuning moves nothing in the pretrained model's bits per byte
    assert "finetuned_conversation_loss" in out and out.index("1.0000") < out.index("2.0000")
    assert "No intervals around finetuned_conversation_loss, so the order is no verdict." in out
    out = shown(
        {"bits_per_byte": 1.2, **ends}, {"bits_per_byte": 1.1, "bits_per_byte_low": 0.9, "bits_per_byte_high": 1.05}
    )
    assert "0.9000 to 1.0500" in out and "The first is not clearly better than 1 of the others" in out
    out = shown(
        {"bits_per_byte": 1.2, **ends}, {"bits_per_byte": 0.5, "bits_per_byte_low": 0.4, "bits_per_byte_high": 0.6}
    )
    assert "verdict" not in out and "not clearly" not in out


def test_a_trial_whose_batch_cannot_be_is_refused_before_its_corpus_is_made(
    corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = ("pretrain.global_batch_tokens=1000,1001", "pretrain.total_tokens=20000")
    with pytest.raises(SystemExit) as left:
        main(["run", *words(corpus_dir, tmp_path / "store", LOCAL, *batches)])
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert "pretrain.global_batch_tokens = 1000" in said and "pretrain.global_batch_tokens = 1001" in said
    assert made(tmp_path / "store") == {}


def test_the_ray_launcher_over_local_processes_is_refused(
    corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["run", *words(corpus_dir, tmp_path, "optim.lr=1e-2,1e-3", LOCAL, "hydra/launcher=ray")])
    assert left.value.code == 2
    assert "compute.backend=local" in capsys.readouterr().err


def test_hydras_notes_of_a_sweep_are_in_a_folder_of_this_user_alone_and_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(config: object) -> list[tuple[str, int]]:
        return [(path.name, stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.iterdir()]

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    [seen, _] = multirun(hydra_overrides(["experiment=demo", "optim.lr=1e-3,2e-3"], Settings, sweep=True), look)
    assert [mode for _, mode in seen] == [0o700]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "verb", [["run", "-m"], ["run"], ["plan"], ["submit", "cluster=ray", "address=http://x", "--"]]
)
def test_a_secret_on_the_command_line_is_refused_before_anything_is_written(
    verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SERVICE_PAT", "s3cr3t-word")
    command = verb if verb[-1] != "--" else [*verb, "run"]
    for secret in ("s3cr3t-word", "hf_" + "aB" * 17):
        said = complaint(capsys, *command, "experiment=demo", f"tracking.entity={secret}", "optim.lr=1e-3,2e-3")
        assert "Secrets are never written" in said and secret not in said
    said = complaint(capsys, "plan", "experiment=demo", "tracking.entity=${oc.env:SERVICE_PAT}")
    assert "SERVICE_PAT" in said and "Secrets are never written" in said
    assert list(tmp_path.iterdir()) == []
