"""Every family is written as it was: who reads our exports reads them after the next release too."""

from __future__ import annotations

import json

import pytest

from tests.golden.exports import KEPT, PRESETS, exported
from tests.golden.identities import moved


@pytest.mark.parametrize("preset", PRESETS)
def test_a_family_is_written_as_it_was(preset: str) -> None:
    assert list(moved(json.loads(KEPT.read_text())[preset], exported(preset))) == []
