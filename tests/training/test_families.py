"""ZeRO cuts a model of any kind: whatever its frontend, mixers and head are, two ranks give what one process does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.family_ranks import FAMILIES, ROWS, STAGES, TUNED

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FP32_EPS, TARGETS = 2.0**-24, ROWS * 26


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All families and stages by one pair of processes: starting such a pair takes longer than a family does."""
    file = tmp_path_factory.mktemp("families") / "steps.json"
    command = [sys.executable, "-m", "tests.training.family_ranks", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", [*FAMILIES, *TUNED])
def test_two_ranks_of_a_stage_have_the_losses_and_gradients_of_one_process(
    steps: dict[str, Any], family: str, stage: int
) -> None:
    alone, shared = steps["alone"][family], steps["shared"][family][str(stage)]
    assert alone[-1][0] < alone[0][0]
    for (loss, norm), (expected_loss, expected_norm) in zip(shared, alone, strict=True):
        # Sums of as many fp32 terms as there are targets, in another order; a gradient is a sum of such sums.
        assert loss == pytest.approx(expected_loss, rel=TARGETS * FP32_EPS)
        assert norm == pytest.approx(expected_norm, rel=4 * TARGETS * FP32_EPS)
