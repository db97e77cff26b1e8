"""Every experiment that ships composes, builds on the meta device and tells what it would cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conf.refusal import Refusal
from model.build import build_model
from pipelines.engine import runner
from pipelines.engine.store.open import open_store
from pipelines.graph import build
from pipelines.settings.compose import compose
from pipelines.settings.overrides import options
from pipelines.training.expert_parallel import layers_with_experts
from pipelines.verbs.help import settings_help
from pipelines.verbs.plan import estimate, memory_per_rank
from tests.conftest import ROOT

PARAMETERS = {"gpt2-124m": 124.5e6, "llama-1b": 1.236e9, "llama-8b": 8.03e9}
"""Published sizes; GPT-2's vocabulary is rounded up to 50,304 here."""


@pytest.mark.parametrize("name", options("experiment"))
def test_an_experiment_can_be_planned_before_there_is_a_corpus(name: str, tmp_path: Path) -> None:
    settings = compose([f"experiment={name}"])
    steps = build(settings, corpus_may_be_missing=True)
    costs = estimate(settings, runner.plan(list(steps.values()), store=open_store(tmp_path)))
    assert costs["tokens"] == costs["steps"] * costs["tokens_per_step"] > 0
    assert costs["flops"] == pytest.approx(costs["flops_per_token"] * costs["tokens"])
    # Six FLOPs a parameter and token, embeddings looked up for nothing, attention on top.
    assert costs["flops_per_token"] > 6 * (costs["parameters"]["total"] - costs["parameters"]["embedding"])
    if name in PARAMETERS:
        assert costs["parameters"]["total"] == pytest.approx(PARAMETERS[name], rel=2e-3)


@pytest.mark.parametrize(("stage", "bytes_each"), [(0, 16), (1, 8 + 12 / 4), (2, 4 + 16 / 4), (3, 16 / 4)])
def test_a_zero_stage_divides_what_its_paper_says(stage: int, bytes_each: float) -> None:
    assert sum(memory_per_rank(1000, ranks=4, stage=stage).values()) == 1000 * bytes_each


def test_experts_that_ranks_share_are_divided_by_their_number() -> None:
    def memory(*overrides: str) -> dict[str, float]:
        asked = [
            "experiment=text",
            "corpus.paths=[none]",
            "model=mixtral-tiny",
            "optim=adamw",
            "compute.ranks=4",
            *overrides,
        ]
        return dict(estimate(compose(asked), [])["memory_per_rank"])

    whole, shared = memory("zero=0"), memory("zero=0", "zero.expert_parallel=2")
    config = compose(["experiment=text", "corpus.paths=[none]", "model=mixtral-tiny"]).resolved_model()
    layers = layers_with_experts(build_model(config, device="meta")).values()
    of_experts = sum(weight.numel() for layer in layers for weight in layer.parameters())
    assert whole["total"] - shared["total"] == 16 * of_experts / 2 > 0
    # What is shared so is its holder's alone: stage 2 divides only the rest over the four ranks.
    rest = memory("zero=2", "zero.expert_parallel=2")
    assert rest["gradients"] == shared["gradients"] - 3 / 4 * (whole["gradients"] - 4 * of_experts)
    with pytest.raises(Refusal, match="4 ranks do not divide into groups of 3"):
        memory("zero.expert_parallel=3")


def test_plan_loads_neither_the_compiler_nor_anything_that_runs() -> None:
    """What makes `plan` answer within three seconds (benchmarks/latency.py measures it)."""
    program = (
        "import sys; from pipelines.verbs.plan import estimate; from pipelines.settings.compose import compose;"
        "estimate(compose(['experiment=gpt2-124m', 'corpus.paths=[none]']), []);"
        "print([m for m in ('torch._dynamo', 'deepspeed', 'ray', 'transformers') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"


def test_help_beside_an_experiment_shows_its_values_and_the_kinds_it_chose() -> None:
    plain, demo = settings_help().splitlines(), settings_help(["experiment=demo", "optim=adamw"]).splitlines()
    assert any(line.startswith("  shards.seq_len = 1024 ") for line in plain)
    assert any(line.startswith("  shards.seq_len = 256 ") for line in demo)
    assert any("with optim.kind=muon" in line for line in plain) and not any("optim.kind=muon" in line for line in demo)
