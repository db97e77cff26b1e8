"""A run that learns nothing, or nothing more, says so at once; what a person is told names what to type."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.refusal import Refusal
from pipelines.training.health import Health, few_steps
from pipelines.training.job import run_rank
from pipelines.training.loop import NOTES
from pipelines.training.metrics import read_metrics
from pipelines.training.settings import TrainSettings

UNIFORM = math.log(4096)
Make = Callable[..., dict[str, Any]]


def looked(losses: list[float], *, uniform: float | None = UNIFORM, warmup: int = 10, total: int = 200) -> Health:
    health = Health(uniform=uniform, warmup_steps=warmup, total_steps=total)
    for step, loss in enumerate(losses, start=1):
        health.look(step, loss)
    return health


def test_a_loss_that_falls_is_no_warning() -> None:
    assert looked([8.3 - step / 50 for step in range(200)]).warnings == []


def test_a_loss_far_above_its_start_has_diverged_though_warmup_is_not_over() -> None:
    [warning] = looked([8.3, *[27.0] * 30], warmup=100, total=20).warnings
    assert (warning.step, warning.diverged) == (2, True)
    assert warning.text == "diverged in step 2: the loss is 27.00, and it began at 8.30"


def test_where_a_fresh_model_began_is_not_what_its_first_updates_made_of_it() -> None:
    """As mixtral-tiny went with the demo's rates: the first ten losses rise already."""
    found = looked([8.33, 9.6, 11.0, 13.0, 15.0, 17.0, 19.0, 18.0, 17.0, 16.0, 16.0], warmup=100).diverged
    assert found is not None and found.step == 10 and found.text.endswith("and it began at 8.33")
    # Weights that know something began where their first steps are, not at one easy batch.
    assert looked([1.0, *[2.4] * 60], warmup=100).diverged is None


def test_a_loss_above_that_of_a_uniform_guess_after_warmup_has_diverged() -> None:
    losses = [*[8.3] * 10, *[8.9] * 60]
    found = looked(losses).diverged
    assert found is not None and 20 < found.step <= 30
    assert found.text.endswith(
        "the loss, the median of 10 steps, is 8.90 after warmup, above the 8.32 of a uniform guess"
    )
    assert looked(losses, warmup=100).diverged is None
    assert looked(losses, uniform=None).diverged is None


def test_a_model_that_begins_above_a_uniform_guess_has_until_the_middle_to_come_below() -> None:
    assert looked([*[30 - step / 5 for step in range(90)], *[8.0] * 110]).diverged is None
    found = looked([30 - step / 50 for step in range(200)]).diverged
    assert found is not None and found.step == 101


def test_a_run_of_a_few_steps_is_not_judged_by_a_uniform_guess() -> None:
    """Its first batch is all it has, and weights from outside may know another text."""
    assert looked([8.9], warmup=0, total=1).diverged is None
    assert looked([8.9] * 9, warmup=0, total=9).diverged is None


def test_one_hard_batch_is_no_divergence() -> None:
    losses = [8.3 - step / 50 for step in range(200)]
    losses[50] = 20.0
    assert looked(losses).diverged is None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_has_diverged(loss: float) -> None:
    found = looked([8.3, loss]).diverged
    assert found is not None and found.step == 2


def test_a_training_loss_of_nothing_is_remarked_once_and_ends_nothing() -> None:
    [warning] = looked([2.0] * 50 + [0.0] * 50).warnings
    assert "training loss 0.0000 by step 56: the training rows are memorized" in warning.text
    assert not warning.diverged


def test_too_few_steps_are_counted_and_enough_are_not() -> None:
    assert few_steps(2, 8192, "Set x=512") == (
        "only 2 steps of 8,192 tokens: below 20 a model hardly changes. Set x=512"
    )
    assert few_steps(20, 8192, "") is None


def test_a_diverging_run_stops_saved_says_what_to_type_and_goes_on_only_if_told_to(
    job: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = {"every_steps": None, "every_seconds": None, "keep_finished": True}
    wild = job(steps=30, lr=0.3, checkpoint=clock, optim={"kind": "adamw", "lr": 3.0, "weight_decay": 0.0})
    wild["label"] = "finetune"
    with pytest.raises(Refusal) as stopped:
        run_rank(wild)
    rows = read_metrics(tmp_path / "out/metrics.jsonl")
    assert 1 < len(rows) < 30
    said = str(stopped.value)
    assert said.startswith("finetune: diverged in step ") and f"checkpoints kept: step-{len(rows):08d}" in said
    assert "Lower finetune.train.optim.lr or take auto" in said and "finetune.train.on_divergence=warn goes on" in said
    assert "WARNING diverged in step" in (tmp_path / "out" / NOTES).read_text()
    with pytest.raises(Refusal, match="diverged in step"):  # at once: not one step further
        run_rank(wild)
    assert len(read_metrics(tmp_path / "out/metrics.jsonl")) == len(rows)
    wild["train"]["on_divergence"] = "warn"
    figures = run_rank(wild)
    assert (figures["steps"], figures["resumed_at_step"]) == (30, len(rows))
    assert any(text.startswith("diverged in step") for text in figures["warnings"])
    assert f"its loss ended at {figures['loss']:.2f}" in figures["warnings"][-1]


def test_a_run_of_few_steps_is_warned_of_before_its_first(job: Make, tmp_path: Path) -> None:
    figures = run_rank({**job(steps=2), "label": "pretrain"})
    [few] = figures["warnings"]
    assert few.startswith("only 2 steps of 256 tokens") and "pretrain.global_batch_tokens=32" in few
    assert f"WARNING {few}" in (tmp_path / "out" / NOTES).read_text()


def test_whether_a_diverged_run_stops_is_no_part_of_what_is_made() -> None:
    both = [TrainSettings(total_tokens=64, global_batch_tokens=32, on_divergence=way) for way in ("stop", "warn")]
    assert both[0].identity() == both[1].identity()
