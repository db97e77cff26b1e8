"""Experts under the training loop: receipts in the metrics, one answer at every topology, biases that are saved."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from conf.refusal import Refusal
from model.build import build_model
from model.config import LayerChange, ModelConfig
from model.ffns.experts.config import MoeConfig
from model.mixers.attention import AttentionConfig
from pipelines.training.expert_parallel import share_experts
from pipelines.training.job import run_rank
from pipelines.training.metrics import read_metrics
from pipelines.training.optim import build_optimizer
from pipelines.training.ranks import Ranks
from pipelines.training.settings import MuonSettings, TrainSettings, ZeroSettings
from tests.training.conftest import make_job
from tests.training.expert_ranks import CHECKPOINTS, copied, experts_job

Make = Callable[..., dict[str, Any]]
FP32_EPS, TARGETS = 2.0**-24, 8 * 32
BIAS = "stack.layers.1.ffn.selection_bias"
DOWN = "stack.layers.1.ffn.experts.down"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process alone, then two ranks in every way."""
    folder = tmp_path_factory.mktemp("experts")
    for out, precision in (("alone", "fp32"), ("alone-bf16", "bf16")):
        alone = experts_job(make_job, shards, folder / out, micro_batch_rows=8)
        run_rank({**alone, "train": {**alone["train"], "precision": precision, "checkpoint": CHECKPOINTS}})
    command = [sys.executable, "-m", "tests.training.expert_ranks", str(shards), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def assert_same_course(run: Path, alone: Path, within: float = 4 * TARGETS * FP32_EPS) -> None:
    """The same losses, norms and routing; sums of n fp32 terms in another order, and routing multiplies a token's
    rounding by its choices."""
    mine, theirs = read_metrics(run / "metrics.jsonl"), read_metrics(alone / "metrics.jsonl")
    assert len(mine) == len(theirs) == 5
    for here, there in zip(mine, theirs, strict=True):
        for key in ("loss", "aux_loss", "grad_norm"):
            assert here[key] == pytest.approx(there[key], rel=within), (run.name, key)
        routing = {key: value for key, value in there.items() if key.startswith("routing/")}
        assert len(routing) == 4
        assert within > 1e-3 or routing == {key: here[key] for key in routing}


@pytest.mark.slow
def test_two_ranks_of_every_stage_give_what_one_process_gives(runs: Path) -> None:
    weights = load_file(runs / "alone/model/model.safetensors")
    assert weights[BIAS].any()
    for stage in (1, 2, 3):
        assert_same_course(runs / f"z{stage}", runs / "alone")
        assert torch.equal(load_file(runs / f"z{stage}/model/model.safetensors")[BIAS], weights[BIAS])


@pytest.mark.slow
def test_experts_shared_out_over_two_ranks_give_what_one_process_gives(runs: Path) -> None:
    weights = load_file(runs / "alone/model/model.safetensors")
    for stage in (0, 1, 2):
        assert_same_course(runs / f"e{stage}-fp32", runs / "alone")
        found = load_file(runs / f"e{stage}-fp32/model/model.safetensors")
        assert found.keys() == weights.keys()
        assert torch.equal(found[BIAS], weights[BIAS])
        for name, weight in weights.items():  # five updates of at most 0.003; an expert's sign of gradient may waver
            assert (found[name] - weight).abs().mean() < 1e-5, name
    assert_same_course(runs / "e1-bf16", runs / "alone-bf16", within=5e-3)
    assert_same_course(runs / "four", runs / "alone")  # two that hold all experts, and their replica


@pytest.mark.slow
def test_a_checkpoint_is_read_at_any_size_of_expert_parallelism(runs: Path, shards: Path) -> None:
    for rank in (0, 1):  # each wrote its experts and nobody else's
        with safe_open(runs / f"e1-fp32/checkpoints/step-00000003/rank-0000{rank}.safetensors", "pt") as file:
            assert file.get_slice(f"weight/{DOWN}").get_shape() == [2 * 24 * 24]
            assert file.get_slice(f"exp_avg/{DOWN}").get_shape() == [2 * 24 * 24]
    for name in ("from-alone", "from-e1-fp32"):  # one process to two that share out, and these to two that do not
        assert_same_course(runs / name, runs / "alone")
    copied(runs / "e0-fp32", runs / "from-e0")
    job = experts_job(make_job, shards, runs / "from-e0", micro_batch_rows=8)
    assert run_rank({**job, "train": {**job["train"], "checkpoint": CHECKPOINTS}})["resumed_at_step"] == 3
    assert_same_course(runs / "from-e0", runs / "alone")


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"expert_parallel": 0}, "a number of ranks, at least 1"),
        ({"expert_parallel": 2, "stage": 3}, r"Set train\.zero\.stage=2"),
        ({"expert_parallel": 2}, "1 ranks do not divide into groups of 2"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(job: Make, zero: dict[str, int], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        run_rank(experts_job(job, zero=zero))


def test_sharing_out_needs_experts_that_divide_and_are_trained() -> None:
    config = ModelConfig(vocab_size=64, d_model=16, n_layers=1, mixer=AttentionConfig(n_heads=2))
    ranks, said = Ranks(0, 3, torch.device("cpu"), 1), list[str]()
    settings = TrainSettings(total_tokens=1, global_batch_tokens=1, zero=ZeroSettings(expert_parallel=3))
    with pytest.raises(Refusal, match="no layer with experts"):
        share_experts(build_model(config), settings, ranks, said.append)
    model = build_model(replace(config, ffn=MoeConfig(n_experts=4, d_ff=8)))
    with pytest.raises(Refusal, match="a layer has 4 experts, which 3 ranks cannot hold equally"):
        share_experts(model, settings, ranks, said.append)
    frozen = build_model(replace(config, ffn=MoeConfig(n_experts=6, d_ff=8))).requires_grad_(False)
    assert share_experts(frozen, settings, ranks, said.append) is None
    assert said == ["zero.expert_parallel = 3 is left: experts are frozen, so each rank keeps all of them"]


def test_a_run_tells_of_its_routing_and_resumes_with_its_biases(job: Make, tmp_path: Path) -> None:
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
