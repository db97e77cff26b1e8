"""Checkpoints: the last few are kept, broken ones are passed over with a word, strangers are refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conf.refusal import Refusal
from pipelines.training.job import run_rank
from pipelines.training.metrics import read_metrics

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def finished(job: Make) -> Path:
    """A run of 6 steps with checkpoints after steps 2, 4 and 6."""
    done = job(out="finished", checkpoint={"every_steps": 2, "every_seconds": None, "keep": 9, "keep_finished": True})
    run_rank(done)
    return Path(done["out_dir"])


@pytest.fixture
def interrupted(finished: Path, job: Make) -> dict[str, Any]:
    """The same run, as it was when step 5 had been written to the log: a job that is to go on from step 4."""
    again = job(out="interrupted")
    out = Path(again["out_dir"])
    for step in (2, 4):
        name = f"step-{step:08d}"
        shutil.copytree(finished / "checkpoints" / name, out / "checkpoints" / name)
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:5]))
    return again


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl")]


def test_the_last_checkpoints_are_kept_until_the_run_has_ended(job: Make) -> None:
    seen: list[list[str]] = []
    kept = job(checkpoint={"every_steps": 1, "every_seconds": None, "keep": 2, "keep_finished": True})
    run_rank(kept)
    seen.append(sorted(path.name for path in (Path(kept["out_dir"]) / "checkpoints").iterdir()))
    assert seen == [["step-00000005", "step-00000006"]]
    dropped = job(out="dropped")
    run_rank(dropped)
    assert not (Path(dropped["out_dir"]) / "checkpoints").exists()


@pytest.mark.parametrize("damage", ["torn state", "a digit", "a key", "one bit", "cut file", "file gone"])
def test_a_broken_checkpoint_is_passed_over_for_the_one_before(
    interrupted: dict[str, Any], finished: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = Path(interrupted["out_dir"]) / "checkpoints" / "step-00000004"
    state, weights = newest / "state.json", newest / "rank-00000.safetensors"
    content, was = bytearray(weights.read_bytes()), state.read_text()
    if damage == "torn state":
        state.write_text(state.read_text()[:200])
    elif damage == "a digit":
        state.write_text(state.read_text().replace('"rows_consumed": 32', '"rows_consumed": 33'))
    elif damage == "a key":
        state.write_text(state.read_text().replace('"digests"', '"digestz"'))
    elif damage == "one bit":
        content[-1000] ^= 1
        weights.write_bytes(content)
    elif damage == "cut file":
        weights.write_bytes(content[:-8])
    else:
        weights.unlink()
    assert damage not in ("a digit", "a key") or state.read_text() != was
    figures = run_rank(interrupted)
    said = capsys.readouterr().out
    assert "checkpoint step-00000004 is passed over: its " in said
    assert "continuing after step 2" in said
    assert figures["resumed_at_step"] == 2
    assert losses(Path(interrupted["out_dir"])) == losses(finished)


def test_a_checkpoint_that_was_being_written_is_nobody_and_is_cleared(
    interrupted: dict[str, Any], finished: Path
) -> None:
    folder = Path(interrupted["out_dir"]) / "checkpoints"
    (folder / ".step-00000005.writing").mkdir()
    figures = run_rank({**interrupted, "train": {**interrupted["train"], "checkpoint": {"keep_finished": True}}})
    assert figures["resumed_at_step"] == 4
    assert losses(Path(interrupted["out_dir"])) == losses(finished)
    assert not list(folder.glob(".*"))


def test_a_checkpoint_of_another_tokenizer_is_refused_with_both_digests(interrupted: dict[str, Any]) -> None:
    with pytest.raises(Refusal, match=r"its tokenizer has the digest t0, and this run's is t1"):
        run_rank({**interrupted, "digests": {"tokenizer": "t1"}})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model", lambda job: {"model": {**job["model"], "ffn": {**job["model"]["ffn"], "d_ff": 64}}}),
        ("data", lambda job: {"order": {"seed": 1}}),
        ("settings", lambda job: {"train": {**job["train"], "seed": 1}}),
    ],
)
def test_a_checkpoint_of_other_things_is_refused_by_their_name(
    interrupted: dict[str, Any], name: str, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    saved = json.loads((Path(interrupted["out_dir"]) / "checkpoints/step-00000004/state.json").read_text())
    with pytest.raises(Refusal) as caught:
        run_rank({**interrupted, **change(interrupted)})
    assert f"its {name} has the digest {saved['digests'][name]}, and this run's is " in str(caught.value)


def test_the_state_says_what_it_is_of(finished: Path) -> None:
    state = json.loads((finished / "checkpoints/step-00000004/state.json").read_text())
    assert (state["step"], state["rows_consumed"], state["world_size"], state["zero_stage"]) == (4, 32, 1, 0)
    assert state["versions"]["torch"] == torch.__version__
    assert {group["weight_decay"] for group in state["groups"]} == {0.0, 0.1}
    assert state["digests"].keys() == {"tokenizer", "model", "settings", "data"}


def test_the_finished_weights_are_those_of_the_last_checkpoint(finished: Path) -> None:
    saved = load_file(finished / "checkpoints/step-00000006/rank-00000.safetensors")
    written = load_file(finished / "model/model.safetensors")
    embedding = saved["weight/frontend.tokens.weight"]
    assert torch.equal(written["model.embed_tokens.weight"].flatten(), embedding)
    assert sum(x.numel() for n, x in saved.items() if n.startswith("weight/")) == sum(
        x.numel() for x in written.values()
    )


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_paragraph_and_keeps_what_is_there(
    interrupted: dict[str, Any], finished: Path
) -> None:
    out = Path(interrupted["out_dir"])
    interrupted["train"]["checkpoint"] = {"every_steps": 1, "every_seconds": None, "keep": 9}
    (out / "run.json").write_text(json.dumps(interrupted))
    room = (out / "checkpoints/step-00000004/rank-00000.safetensors").stat().st_size // 2
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.training", str(out / "run.json")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2, done.stderr
    assert "could not write the checkpoint" in done.stderr
    assert "continues from step-00000004" in done.stderr
    assert "Traceback" not in done.stderr
    assert run_rank(interrupted)["resumed_at_step"] == 4
    assert losses(out) == losses(finished)
