"""A user's mistake gives one clear paragraph, exit code 2 and no traceback."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from conf.refusal import Refusal
from data.rows.instructions import InstructionSettings, instruction_files
from pipelines.engine.files import FileHashes
from pipelines.stages.start import Start
from pipelines.verbs.help import settings_help
from tests.conftest import LOCAL, answer, athanor, complaint, tiny


def test_a_misspelled_experiment_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean experiment=demo?" in complaint(capsys, "run", "experiment=dmeo")


def test_a_misspelled_setting_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean optim.lr?" in complaint(capsys, "plan", "experiment=demo", "optim.lrr=1")
    assert "Did you mean pretrain.total_tokens?" in complaint(
        capsys, "plan", "experiment=demo", "pretrain.total_tokns=1"
    )


def test_a_misspelled_verb_or_group_option_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean 'plan'?" in complaint(capsys, "plann")
    assert "Did you mean model=demo?" in complaint(capsys, "plan", "experiment=demo", "model=dem")


def test_a_word_that_is_no_override_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "overrides = 'demo': no override" in complaint(capsys, "plan", "demo")


def test_a_value_of_another_type_names_the_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert "model.n_layers = 'many'" in complaint(capsys, "plan", "experiment=demo", "model.n_layers=many")


def test_a_setting_that_belongs_elsewhere_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Set zero=0|1|2|3 instead" in complaint(capsys, "plan", "experiment=demo", "pretrain.zero.stage=1")


@pytest.mark.parametrize(
    ("word", "instead"),
    [
        ("finetune.train.zero.stage=1", "Set zero=0|1|2|3 instead"),
        ("finetune.train.device=cpu", "Set compute.device instead"),
        ("finetune.train.threads=1", "Set compute.cpus_per_rank instead"),
        ("finetune.train.tracking.mode=offline", "Set tracking.KEY instead"),
    ],
)
def test_what_holds_for_every_training_is_not_set_for_fine_tuning_alone(
    capsys: pytest.CaptureFixture[str], word: str, instead: str
) -> None:
    assert instead in complaint(capsys, "plan", "experiment=demo", word)
    assert word.partition("=")[0] not in settings_help()


def test_no_experiment_lists_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert "demo" in complaint(capsys, "run")


def test_an_unknown_step_lists_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert "corpus, tokenizer, shards" in complaint(capsys, "why", "pretain", "experiment=demo")


def test_a_missing_corpus(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert str(tmp_path / "none") in complaint(capsys, "run", *tiny(tmp_path / "none", tmp_path / "store"))


def test_a_folder_with_no_readable_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "picture.png").write_bytes(b"\x89PNG")
    assert "no readable text" in complaint(capsys, "run", *tiny(tmp_path / "text", tmp_path / "store"))


@pytest.mark.parametrize("target", [None, "/dev/zero"])
def test_a_special_file_is_refused_and_not_waited_for_wherever_files_are_read(
    tmp_path: Path, target: str | None
) -> None:
    for name in ("config.json", "task.yaml"):
        (tmp_path / name).symlink_to(target) if target else os.mkfifo(tmp_path / name)
    with pytest.raises(Refusal, match=r"task\.yaml: is no plain file"):
        FileHashes(tmp_path / "hashes").of([tmp_path / "task.yaml"])
    with pytest.raises(Refusal, match=r"config\.json: no plain file"):
        Start.open("pretrain.init_from", str(tmp_path))
    with pytest.raises(Refusal, match="a FIFO, a socket or a device"):
        instruction_files(InstructionSettings(kind="files", paths=(str(tmp_path / "config.json"),)))


def test_an_empty_corpus(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "empty.txt").write_text("")
    said = complaint(capsys, "run", *tiny(tmp_path / "text", tmp_path / "store", LOCAL))
    assert "empty" in said


@pytest.mark.slow
def test_malformed_lines_are_counted_and_too_many_are_an_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = (json.dumps({"text": text}) + "\n{broken\n" for text in texts())
    (tmp_path / "a.jsonl").write_text("".join(lines))
    overrides = tiny(tmp_path / "a.jsonl", tmp_path / "store", LOCAL)
    said = complaint(capsys, "run", *overrides, "--until", "corpus")
    assert f"{tmp_path / 'a.jsonl'}, line 22" in said and "max_malformed_lines_per_file" in said
    made = answer(capsys, "run", *overrides, "corpus.reader.max_malformed_lines_per_file=30", "--until", "corpus")
    assert "left out 30: malformed lines or rows, the first: " in made.err and "a.jsonl:2: not JSON" in made.err
    [card] = (tmp_path / "store").glob("corpus/*/card.json")
    assert json.loads(card.read_text())["malformed"][0].split("/")[-1].startswith("a.jsonl:2: not JSON")


@pytest.mark.slow
def test_invalid_utf8_is_read_on_and_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number, text in enumerate(texts()):
        (tmp_path / "text" / f"{number}.txt").write_bytes(f"Caf\u00e9 {number}\n{text}".encode("latin-1"))
    made = answer(capsys, "run", *tiny(tmp_path / "text", tmp_path / "store", LOCAL), "--until", "corpus")
    assert "30 files with invalid utf8" in made.err
    [card] = (tmp_path / "store").glob("corpus/*/card.json")
    assert json.loads(card.read_text())["train_documents"] > 20


def texts() -> list[str]:
    """Thirty short texts that pass the filters."""
    return [
        "\n".join(f"At {hour} of day {day} the clerk wrote {hour * day} letters to the town." for hour in range(24))
        for day in range(30)
    ]


@pytest.mark.slow
def test_a_corpus_too_small_for_the_vocabulary(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(12):
        (tmp_path / "text" / f"{number}.txt").write_text(
            f"The cat number {number} sat on the mat and looked at the moon.\n" * 2
        )
    overrides = tiny(
        tmp_path / "text",
        tmp_path / "store",
        LOCAL,
        "tokenizer.vocab_size=8192",
        "corpus.filters.max_repeated_line_fraction=null",
    )
    assert "tokenizer.vocab_size" in complaint(capsys, "run", *overrides)


@pytest.mark.slow
def test_a_corpus_too_small_for_one_batch_is_told_by_a_rank_under_ray_and_not_tried_again(
    corpus_dir: Path, tmp_path: Path
) -> None:
    more = ("pretrain.global_batch_tokens=1024000", "pretrain.total_tokens=1024000", "--until", "pretrain")
    refused = athanor("run", *tiny(corpus_dir, tmp_path / "store", *more), check=False)
    *_, said = refused.stderr.strip().splitlines()
    assert refused.returncode == 2 and "Traceback" not in refused.stderr and "again" not in said
    assert re.match(r"athanor: .*corpus: is too small for one batch: it packs into \d+ rows", said), refused.stderr


@pytest.mark.parametrize("verb", [("run",), ("plan",)])
def test_windows_of_evaluation_that_skip_tokens_are_refused_before_training(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    said = complaint(capsys, *verb, *tiny(corpus_dir, tmp_path / "store", LOCAL, "evaluate.stride_tokens=65"))
    assert "evaluate.stride_tokens = 65: windows of 64 tokens" in said
    assert not (tmp_path / "store").exists()


def test_what_is_not_made_yet_is_named_by_the_command_that_makes_it(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path
) -> None:
    overrides = tiny(corpus_dir, tmp_path / "a store", LOCAL)
    said = complaint(capsys, "generate", *overrides, "--prompt", "x")
    command = shlex.split(said.partition("Make it first: ")[2].removesuffix(".\n"))
    assert command == ["athanor", "run", *overrides, "--until", "pretrain"]


def test_a_global_batch_that_does_not_divide(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path
) -> None:
    said = complaint(capsys, "run", *tiny(corpus_dir, tmp_path / "store", LOCAL, "pretrain.global_batch_tokens=1000"))
    assert "global_batch_tokens = 1000" in said
    assert not list((tmp_path / "store").glob("pretrain/*"))


@pytest.mark.parametrize("verb", [("run",), ("run", "--until", "finetune"), ("plan",)])
def test_a_global_batch_of_fine_tuning_that_does_not_divide(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    more = (LOCAL, "finetune.train.global_batch_tokens=1000")
    said = complaint(capsys, *verb, *tiny(corpus_dir, tmp_path / "store", *more))
    assert "finetune.train.global_batch_tokens = 1000" in said
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("verb", [("run", "--until", "pretrain"), ("train",), ("certify", "resume")])
def test_every_verb_that_trains_looks_at_the_batch_first(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    more = (LOCAL, "pretrain.global_batch_tokens=1000", "pretrain.total_tokens=20000")
    said = complaint(capsys, *verb, *tiny(corpus_dir, tmp_path / "store", *more))
    assert "pretrain.global_batch_tokens = 1000" in said
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "words", [("--from", "/nowhere/model"), ("experiment=demo", "--from", "run/model"), ("--from", "pretrian")]
)
def test_a_model_that_is_not_there_is_named_and_no_experiment_is_asked_for(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert f"--from = {words[-1]}: no such folder" in complaint(capsys, "generate", *words, "--prompt", "x")


def test_a_secret_in_a_setting_that_enters_no_digest_is_refused_too(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "5ecre7" * 6 + "abcd"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    words = tiny(corpus_dir, tmp_path / "store", LOCAL, f"tracking.name=mine-{secret}")
    said = complaint(capsys, "run", *words, "--until", "pretrain")
    assert "tracking.name=…: contains the value of the environment variable WANDB_API_KEY" in said
    assert secret not in said
    assert not list((tmp_path / "store").glob("corpus/*"))


def test_conversations_that_are_not_there_are_named_by_their_own_key(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path
) -> None:
    words = [word for word in tiny(corpus_dir, tmp_path / "store", LOCAL) if not word.startswith("finetune")]
    said = complaint(capsys, "run", *words, "finetune=chat", f"finetune.data.paths=[{tmp_path / 'none.jsonl'}]")
    assert f"finetune.data.paths = '{tmp_path / 'none.jsonl'}': does not exist" in said
    assert "corpus.paths" not in said


def test_a_source_that_cannot_be_read_is_named_by_its_own_key(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path
) -> None:
    words = tiny(corpus_dir, tmp_path / "store", LOCAL)
    for setting, problem in (
        (
            f"sources.web.paths=[{tmp_path / 'none'}]",
            f"sources.web.paths = '{tmp_path / 'none'}': does not exist",
        ),
        ("sources.web.paths=[]", "sources.web.paths = []"),
        ("sources.web.shard_bytes=0", "sources.web.shard_bytes = 0"),
    ):
        said = complaint(capsys, "run", *words, setting)
        assert problem in said and "corpus" not in said
    excluded = (f"sources.web.paths=[{corpus_dir}]", "sources.web.exclude=['*']")
    assert "sources.web.exclude = ['*']: leaves none" in complaint(capsys, "run", *words, *excluded)
    sent = ("submit", "cluster=slurm", "store=/shared/runs", "--dry-run", "--", "run", "experiment=text")
    assert "sources.web.paths = []: there is nothing to read" in complaint(capsys, *sent, "sources.web.paths=[]")


def test_more_ranks_than_rows_in_a_batch(capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path) -> None:
    overrides = tiny(corpus_dir, tmp_path / "store", LOCAL, "compute.ranks=32", "compute.cpus_per_rank=1")
    assert "32 ranks" in complaint(capsys, "plan", *overrides)


def test_gpus_where_there_are_none(capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    said = complaint(capsys, "run", *tiny(corpus_dir, tmp_path / "store", LOCAL, "compute.device=cuda"))
    assert "GPU" in said


def test_a_ray_address_that_does_not_answer(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path
) -> None:
    said = complaint(capsys, "run", *tiny(corpus_dir, tmp_path / "store", "compute.address=127.0.0.1:1"))
    assert "127.0.0.1:1" in said


def test_a_store_that_cannot_be_written(capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, where the store should be")
    said = complaint(capsys, "run", *tiny(corpus_dir, tmp_path / "taken", LOCAL))
    assert str(tmp_path / "taken") in said and "another store" in said


def test_what_is_submitted_is_looked_at_first(capsys: pytest.CaptureFixture[str]) -> None:
    sent = ("submit", "cluster=slurm", "store=/shared/runs", "--dry-run", "--")
    assert "Did you mean 'run'" in complaint(capsys, *sent, "runn", "experiment=demo")
    assert "Did you mean experiment=demo" in complaint(capsys, *sent, "run", "experiment=demoo")
    assert "corpus.paths = []: there is nothing to read" in complaint(capsys, *sent, "run", "experiment=text")


@pytest.mark.slow
def test_what_is_there_and_cannot_be_used_is_named(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path
) -> None:
    overrides = tiny(corpus_dir, tmp_path, LOCAL)
    answer(capsys, "run", *overrides, "--until", "shards")
    (tmp_path / ".certify").write_text("a file, where certify keeps its records")
    assert "another store" in complaint(capsys, "certify", "resume", *overrides)
    [manifest] = tmp_path.glob("corpus/*/manifest.json")
    for damage in ("garbage", "{}"):
        manifest.write_text(damage)
        assert re.search(
            rf"{re.escape(str(manifest))}.* to have it made again", complaint(capsys, "status", *overrides)
        )
        assert re.search(
            rf"{re.escape(str(manifest))}.* to have it made again", complaint(capsys, "why", "corpus", *overrides)
        )


@pytest.mark.slow
def test_a_damaged_input_is_found_before_it_is_used(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path
) -> None:
    overrides = tiny(corpus_dir, tmp_path, LOCAL)
    answer(capsys, "run", *overrides, "--until", "corpus")
    damaged = min(tmp_path.glob("corpus/*/train/*.parquet"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-200] + bytes([whole[-200] ^ 1]) + whole[-199:])
    assert f"{damaged}: is not what was published" in complaint(capsys, "run", *overrides, "--until", "tokenizer")
    damaged.write_bytes(whole)
    answer(capsys, "run", *overrides, "--until", "tokenizer")


def test_a_jsonl_without_the_text_field_says_what_it_has(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"foo": 1}\n')
    said = complaint(capsys, "run", *tiny(tmp_path / "a.jsonl", tmp_path / "store", LOCAL), "--until", "corpus")
    assert "field 'text' is missing (here: foo; reader.text_field names it)" in said


def test_a_store_whose_folder_cannot_be_made(capsys: pytest.CaptureFixture[str], corpus_dir: Path) -> None:
    said = complaint(capsys, "run", *tiny(corpus_dir, Path("/proc/none"), LOCAL), "--until", "corpus")
    assert "cannot be written" in said


def test_submit_without_a_cluster_or_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cluster=KIND" in complaint(capsys, "submit", "--", "run", "experiment=demo")
    assert "there is no command to submit" in complaint(capsys, "submit", "cluster=ray")
