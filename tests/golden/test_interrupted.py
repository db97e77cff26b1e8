"""No release strands a running job: what an earlier Athanor began goes on and ends as it would have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import answer
from tests.golden.interrupted import LOSSES, losses, overrides, unpack

TOLERANCE = 1e-4
"""Relative: another CPU adds up fp32 in another order, and four hundred steps carry that on."""


@pytest.mark.slow
def test_a_training_that_an_earlier_athanor_began_goes_on_and_older_artifacts_are_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    unpack(tmp_path)
    store = tmp_path / "store"
    before = {path: path.stat().st_mtime_ns for path in store.glob("*/*/manifest.json")}
    assert {path.parts[-3] for path in before} == {"corpus", "tokenizer", "shards"}
    answer(capsys, "run", *overrides(tmp_path, store), "--until", "pretrain")
    made = {path: path.stat().st_mtime_ns for path in store.glob("*/*/manifest.json")}
    [pretrain] = made.keys() - before.keys()
    assert {path: made[path] for path in before} == before
    assert "continuing after step 2" in (pretrain.parent / "logs" / "notes.txt").read_text()
    assert losses(pretrain.parent) == pytest.approx(json.loads(LOSSES.read_text()), rel=TOLERANCE)
