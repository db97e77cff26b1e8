"""Training is one function of its settings at every number of ranks and ZeRO stage; resuming is exact."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("topologies.py")
STAGES, PRECISIONS = (0, 1, 2, 3), ("fp32", "bf16")
TARGETS = 8 * 32  # at most, in one batch
FP32_EPS, BF16_EPS = 2.0**-24, 2.0**-9


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(shards), str(folder)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def rows(runs: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]


def column(runs: Path, name: str, key: str) -> list[Any]:
    return [row[key] for row in rows(runs, name)]


def weights_digest(runs: Path, name: str) -> str:
    return hashlib.sha256((runs / name / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_fp32_losses_and_gradient_norms_are_those_of_plain_pytorch(runs: Path, world_size: int, stage: int) -> None:
    plain = json.loads((runs / "plain.json").read_text())
    ours = rows(runs, f"w{world_size}-z{stage}-fp32")
    # A sum of n fp32 terms in any order is off by at most n eps; the mean of losses and the norm are such sums.
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=TARGETS * FP32_EPS)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=TARGETS * FP32_EPS)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_bf16_losses_and_gradient_norms_agree_at_every_topology(runs: Path, world_size: int, stage: int) -> None:
    reference, ours = rows(runs, "w1-z0-bf16"), rows(runs, f"w{world_size}-z{stage}-bf16")
    # Rounding each of n terms to bf16 moves their mean by eps / sqrt(n) and the norm of a gradient by at most eps.
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=BF16_EPS / TARGETS**0.5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=BF16_EPS)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_continues_bit_for_bit(runs: Path, world_size: int, stage: int, precision: str) -> None:
    name = f"w{world_size}-z{stage}-{precision}"
    resumed = f"{name}-from-{name}"
    assert column(runs, resumed, "step") == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "lr", "batch_digest", "tokens"):
        assert column(runs, resumed, key) == column(runs, name, key), key
    assert weights_digest(runs, resumed) == weights_digest(runs, name)


@pytest.mark.parametrize(
    ("name", "begun"),
    [*((f"w2-z{stage}", "w1-z0") for stage in STAGES), ("w1-z0", "w2-z1"), ("w1-z0", "w2-z3")],
)
def test_a_checkpoint_goes_on_at_another_topology(runs: Path, name: str, begun: str) -> None:
    plain = json.loads((runs / "plain.json").read_text())
    resumed = rows(runs, f"{name}-fp32-from-{begun}-fp32")
    assert len(resumed) == 6
    for mine, theirs in zip(resumed, plain, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=TARGETS * FP32_EPS)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=TARGETS * FP32_EPS)


def test_every_topology_sees_the_same_batches(runs: Path) -> None:
    digests = {tuple(column(runs, path.parent.name, "batch_digest")) for path in runs.glob("*/metrics.jsonl")}
    assert len(digests) == 1
    assert len(set(*digests)) == 6  # and each step another


def test_what_deepspeed_was_told_is_written_down(runs: Path) -> None:
    config = json.loads((runs / "w2-z2-bf16" / "ds_config.json").read_text())
    assert config["zero_optimization"]["stage"] == 2
    assert config["train_batch_size"] == 8
    assert config["gradient_accumulation_steps"] == 2
    assert config["communication_data_type"] == "fp32"
    assert config["torch_autocast"]["lower_precision_safe_modules"] == []
