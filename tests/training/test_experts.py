"""Experts under the training loop: receipts in the metrics, one answer at every topology, biases that are saved."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.build import build_model
from model.config import LayerChange, ModelConfig
from model.mixers.attention import AttentionConfig
from model.moe.config import MoeConfig
from pipelines.training.metrics import read_metrics
from pipelines.training.optim import build_optimizer
from pipelines.training.settings import MuonSettings
from tests.training.expert_ranks import experts_job

Make = Callable[..., dict[str, Any]]
FP32_EPS, TARGETS = 2.0**-24, 8 * 32
BIAS = "stack.layers.1.ffn.selection_bias"
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_ranks_of_every_stage_give_what_one_process_gives(job: Make, shards: Path, tmp_path: Path) -> None:
    from pipelines.training.job import run_rank

    run_rank(experts_job(job, out="alone", micro_batch_rows=8))
    command = [sys.executable, "-m", "tests.training.expert_ranks", str(shards), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = read_metrics(tmp_path / "alone" / "metrics.jsonl")
    weights = load_file(tmp_path / "alone" / "model" / "model.safetensors")
    assert weights[BIAS].any()
    for stage in (1, 2, 3):
        shared_out = read_metrics(tmp_path / f"z{stage}" / "metrics.jsonl")
        for mine, theirs in zip(shared_out, alone, strict=True):
            for key in ("loss", "aux_loss", "grad_norm"):
                # Sums of n fp32 terms in another order; routing multiplies a token's rounding by its choices.
                assert mine[key] == pytest.approx(theirs[key], rel=4 * TARGETS * FP32_EPS), (stage, key)
            receipts = {key: value for key, value in mine.items() if key.startswith("routing/")}
            assert len(receipts) == 4
            assert receipts == {key: value for key, value in theirs.items() if key.startswith("routing/")}
        assert torch.equal(load_file(tmp_path / f"z{stage}/model/model.safetensors")[BIAS], weights[BIAS])


def test_a_run_tells_of_its_routing_and_resumes_with_its_biases(job: Make, tmp_path: Path) -> None:
    from pipelines.training.job import run_rank

    whole = experts_job(job, out="whole", checkpoint={"every_steps": 3, "every_seconds": None, "keep_finished": True})
    run_rank(whole)
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert all(0.5 < row["routing/1/load_entropy"] <= 1 for row in rows)
    assert all(0 < row["routing/1/drop_rate"] < 0.5 for row in rows)
    assert all(1 < row["routing/1/effective_k"] < 2 for row in rows)
    assert rows[0]["aux_loss"] > 0.1  # weight 0.1 of at least about 1, and the z-loss
    assert load_file(tmp_path / "whole/checkpoints/step-00000003/rank-00000.safetensors")[f"buffer/{BIAS}"].any()
    half = experts_job(job, out="half")
    (tmp_path / "half" / "checkpoints").mkdir(parents=True)
    os.rename(tmp_path / "whole/checkpoints/step-00000003", tmp_path / "half/checkpoints/step-00000003")
    assert run_rank(half)["resumed_at_step"] == 3
    again = read_metrics(tmp_path / "half" / "metrics.jsonl")
    assert [row["loss"] for row in again] == [row["loss"] for row in rows][3:]
    models = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "half")]
    assert models[0] == models[1]


def test_muon_leaves_fused_experts_and_the_router_to_adamw() -> None:
    config = ModelConfig(
        vocab_size=64,
        d_model=16,
        n_layers=2,
        mixer=AttentionConfig(n_heads=2),
        pattern=(LayerChange(every=2, ffn=MoeConfig(n_experts=4, d_ff=8, shared_d_ff=8)),),
    )
    model = build_model(config)
    optimizer = build_optimizer(model, MuonSettings(lr=1e-3, matrix_lr=2e-2))
    tokens_BT = torch.arange(32).view(2, 16)
    model(tokens_BT, targets_BT=tokens_BT)["loss_sum"].backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if ".ffn.router." in name or ".ffn.experts." in name:
            assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}, name
        elif ".ffn.shared." in name:
            assert set(optimizer.state[parameter]) == {"momentum_buffer"}, name
