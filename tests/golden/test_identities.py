"""No digest moves unnoticed: artifacts that people have stay theirs.

After a change that is meant to move some: python -m tests.golden.identities, and a line in CHANGELOG for each step.
"""

from __future__ import annotations

import pytest

from tests.golden.identities import CASES, identities, kept, moved


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_made_from_what_it_was_made_from(case: str) -> None:
    assert list(moved(kept(case), identities(case))) == []


def test_a_moved_field_is_named_with_both_values() -> None:
    changed = kept("text")
    changed["pretrain"]["settings"]["order"]["seed"] = 7
    assert list(moved(kept("text"), changed)) == ["pretrain.settings.order.seed: 0 -> 7"]
