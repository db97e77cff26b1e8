"""Training computes what it computed before: losses of twenty steps beside those that are kept here.

After a change that is meant to move them: python -m tests.golden.curves, and say why in the commit.
"""

from __future__ import annotations

import pytest

from tests.golden.curves import MODELS, curve, golden

TOLERANCE = 1e-5
"""Relative. Another BLAS or CPU adds up fp32 in another order: weights moved by one rounding each (1.2e-7) move these
losses by 2e-7 at most, so a hundred roundings are room enough; AdamW's beta2 at 0.96 for 0.95 moves them by 1.8e-4."""


@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_have_the_losses_they_had(name: str) -> None:
    assert curve(*MODELS[name]) == pytest.approx(golden(name), rel=TOLERANCE, abs=0)


def test_a_slightly_other_optimizer_is_noticed() -> None:
    assert curve(*MODELS["llama"], beta2=0.96) != pytest.approx(golden("llama"), rel=TOLERANCE, abs=0)
