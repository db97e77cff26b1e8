"""Settings refuse what cannot be, and say how to mend it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.refusal import Refusal
from conf.typed import from_plain, to_plain
from model.config import ModelConfig
from model.costs import activation_bytes, row_and_once_bytes
from pipelines.training.settings import (
    BatchPlan,
    MuonSettings,
    ScheduleSettings,
    TrainSettings,
    ZeroSettings,
    largest_batch,
    largest_rows,
)


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"total_tokens": 8192, "global_batch_tokens": 1024, **changes})


@given(
    rows_per_rank=st.integers(1, 60), world_size=st.integers(1, 9), seq_len=st.integers(1, 500), most=st.integers(1, 70)
)
def test_a_derived_plan_shares_out_every_row_once(rows_per_rank: int, world_size: int, seq_len: int, most: int) -> None:
    tokens = rows_per_rank * world_size * seq_len
    plan = BatchPlan.derive(
        settings(total_tokens=3 * tokens, global_batch_tokens=tokens),
        seq_len=seq_len,
        world_size=world_size,
        largest_rows=most,
    )
    assert plan.micro_batch_rows * plan.accumulation * world_size == plan.rows_per_step
    assert plan.tokens_per_step == tokens
    assert plan.micro_batch_rows <= most
    larger = range(plan.micro_batch_rows + 1, min(most, rows_per_rank) + 1)
    assert not [rows for rows in larger if rows_per_rank % rows == 0]
    assert plan.total_steps == 3


@given(rows=st.integers(1, 60), world_size=st.integers(1, 5), micro_batch_rows=st.integers(1, 4) | st.none())
def test_the_largest_batch_of_some_rows_is_the_largest_that_divides(
    rows: int, world_size: int, micro_batch_rows: int | None
) -> None:
    def divides(batch_rows: int) -> bool:
        given = settings(total_tokens=9000, global_batch_tokens=batch_rows * 16, micro_batch_rows=micro_batch_rows)
        try:
            BatchPlan.derive(given, seq_len=16, world_size=world_size, largest_rows=1)
        except Refusal:
            return False
        return True

    most = largest_batch(settings(micro_batch_rows=micro_batch_rows), rows, seq_len=16, world_size=world_size)
    assert most == 16 * max((n for n in range(1, rows + 1) if divides(n)), default=0)


def test_a_last_partial_batch_is_not_trained_on() -> None:
    plan = BatchPlan.derive(settings(total_tokens=5000), seq_len=128, world_size=1, largest_rows=8)
    assert plan.total_steps == 4


@pytest.mark.parametrize(
    ("changes", "seq_len", "world_size", "said"),
    [
        ({}, 100, 1, ["global_batch_tokens = 1024", "seq_len = 100", "global_batch_tokens=1000 or 1100"]),
        ({}, 2048, 1, ["global_batch_tokens = 1024", "global_batch_tokens=2048 or 4096"]),
        ({}, 128, 3, ["8 rows", "3 ranks", "768"]),
        ({}, 128, 16, ["8 rows", "16 ranks", "global_batch_tokens=2048"]),
        ({"micro_batch_rows": 3}, 128, 2, ["micro_batch_rows = 3", "4 rows of a rank", "Use micro_batch_rows=2"]),
    ],
)
def test_what_does_not_divide_is_refused_with_numbers_that_do(
    changes: dict[str, Any], seq_len: int, world_size: int, said: list[str]
) -> None:
    with pytest.raises(Refusal) as caught:
        BatchPlan.derive(settings(**changes), seq_len=seq_len, world_size=world_size, largest_rows=8)
    for words in said:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"total_tokens": 0}, "total_tokens = 0"),
        ({"total_tokens": 1023}, "at least one global batch, which is 1,024 tokens"),
        ({"clip_norm": 0.0}, "clip_norm = 0.0"),
        ({"micro_batch_rows": 0}, "micro_batch_rows = 0"),
        ({"optim": MuonSettings(), "zero": ZeroSettings(stage=1)}, r"zero\.stage = 1: Muon"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        settings(**changes)


def test_a_schedule_longer_than_the_run_is_refused() -> None:
    with pytest.raises(
        Refusal,
        match=r"warmup_fraction = 0\.6: it must be at most 1 together with decay_fraction = 0\.6.*Set warmup_fraction=0\.4",
    ):
        ScheduleSettings(shape="wsd", warmup_fraction=0.6, decay_fraction=0.6)


def test_identity_changes_with_what_is_made_and_with_nothing_else() -> None:
    start = settings(optim=MuonSettings())
    others: dict[str, Any] = {
        "zero": ZeroSettings(bucket_elements=7),
        "micro_batch_rows": 2,
        "recompute": True,
        "device": "cpu",
        "threads": 3,
        "compile": "off",
        "checkpoint": dataclasses.replace(start.checkpoint, keep=9),
        "on_divergence": "warn",
        "tracking": dataclasses.replace(start.tracking, mode="offline"),
    }
    execution = {f.name for f in dataclasses.fields(TrainSettings) if f.metadata.get("execution")}
    assert others.keys() == execution
    for name, value in others.items():
        assert dataclasses.replace(start, **{name: value}).identity() == start.identity()
    for name, value in {"seed": 1, "precision": "fp32", "clip_norm": None, "total_tokens": 9000}.items():
        assert dataclasses.replace(start, **{name: value}).identity() != start.identity()


def test_settings_survive_the_trip_through_plain_data() -> None:
    start = settings(optim=MuonSettings(lr=1e-3), zero=ZeroSettings(stage=0))
    assert from_plain(TrainSettings, to_plain(start)) == start


def test_a_large_vocabulary_is_counted_once_and_not_for_each_row() -> None:
    config = ModelConfig(vocab_size=128_256, d_model=4096, n_layers=2, max_seq_len=2048)
    row, once = row_and_once_bytes(config, 2048, 2)
    rows = largest_rows(2048, row, once, gpu_bytes=24 * 10**9)
    assert rows * row + once <= 12 * 10**9 < (rows + 1) * row + once
    counted_for_each = largest_rows(2048, activation_bytes(config, 1, 2048, 2), gpu_bytes=24 * 10**9)
    assert rows >= 3 * counted_for_each
