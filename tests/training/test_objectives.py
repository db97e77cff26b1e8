"""Encoders and encoder-decoders train in the same loop as decoders, each with an objective that suits it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.refusal import Refusal
from model.interop import load_pretrained
from pipelines.training.job import run_rank
from tests.training.conftest import MODEL, VOCAB_SIZE

pytestmark = pytest.mark.slow

ENCODER: dict[str, Any] = {**MODEL, "causal": False}
SEQ2SEQ: dict[str, Any] = {**MODEL, "encoder": {**ENCODER, "vocab_size": None, "head": {"kind": "none"}}}
MASKED = {"kind": "masked_token", "mask_id": 1, "random_ids": [8, VOCAB_SIZE], "kept_ids": [2, 3], "rate": 0.3}
DENOISING = {"kind": "span_denoising", "sentinel_id": 7, "start_id": 0, "end_id": 3}
INFILLING = {"kind": "text_infilling", "mask_id": 1, "start_id": 3}


@pytest.mark.parametrize(
    ("model", "objective", "steps"),
    [(ENCODER, MASKED, 120), (SEQ2SEQ, DENOISING, 30), (SEQ2SEQ, INFILLING, 30)],
    ids=["masked", "denoising", "infilling"],
)
def test_a_model_learns_what_its_objective_asks(
    job: Callable[..., dict[str, Any]], model: dict[str, Any], objective: dict[str, Any], steps: int
) -> None:
    made = {**job(steps=steps, lr=1e-2, precision="fp32"), "model": model, "objective": objective}
    run_rank(made)
    folder = Path(made["out_dir"])
    losses = [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in line
    ]
    assert sum(losses[-5:]) / 5 < sum(losses[:3]) / 3 - 0.3
    config, state = load_pretrained(folder / "model")
    assert config.causal is model.get("causal", True)
    assert ("encoder.stack.layers.0.mixer.q.weight" in state) == ("encoder" in model)


@pytest.mark.parametrize(
    ("model", "objective", "said"),
    [
        (ENCODER, None, "objective.kind = 'next_token': it trains a causal model, and this model is an encoder"),
        (MODEL, MASKED, "objective.kind = 'masked_token': it trains an encoder"),
        (SEQ2SEQ, None, "this model is an encoder-decoder"),
        (MODEL, INFILLING, "objective.kind = 'text_infilling': it trains an encoder-decoder"),
    ],
)
def test_an_objective_that_does_not_suit_the_model_is_refused(
    job: Callable[..., dict[str, Any]], model: dict[str, Any], objective: dict[str, Any] | None, said: str
) -> None:
    with pytest.raises(Refusal, match=said):
        run_rank({**job(), "model": model, "objective": objective})
