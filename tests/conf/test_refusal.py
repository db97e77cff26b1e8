"""The one error: its grammar, its place among settings, its way home from other processes."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conf.refusal import NO_VALUE, Refusal, field, refuse_below
from conf.typed import from_plain


def test_a_refusal_is_one_paragraph_of_place_value_rule_and_remedy() -> None:
    refusal = Refusal("optim.lr", 0, "a learning rate is above 0", "set optim.lr=3e-4")
    assert str(refusal) == "optim.lr = 0: a learning rate is above 0. Set optim.lr=3e-4."
    assert str(Refusal(Path("a.txt"), NO_VALUE, "no such file")) == "a.txt: no such file."
    assert str(Refusal("causal", True, "too long", "is it?")) == "causal = true: too long. Is it?"


def test_settings_that_refuse_learn_where_they_stand_from_whoever_holds_them() -> None:
    refusal = Refusal("head.kind", None, f"needed with {field('causal')}=true", f"set {field('head.kind')}=language")
    placed = refusal.under("encoder").under("model")
    assert str(placed) == (
        "model.encoder.head.kind = null: needed with model.encoder.causal=true. Set model.encoder.head.kind=language."
    )
    assert str(refusal) == "head.kind = null: needed with causal=true. Set head.kind=language."


def test_a_refusal_comes_home_from_another_process_as_it_was() -> None:
    refusal = Refusal("steps", object, "a number", f"set {field('steps')}=1").under("train")
    home = pickle.loads(pickle.dumps(refusal))
    assert str(home) == str(refusal) and type(home) is Refusal and home.where == "train.steps"


def test_a_long_value_is_cut() -> None:
    assert len(str(Refusal("text", "x" * 10_000, "too long"))) < 300


@dataclass(frozen=True, kw_only=True)
class Counts:
    rows: int = 4
    blocks: int | None = None
    share: float = 2

    def __post_init__(self) -> None:
        refuse_below(self, 1, "rows", "blocks", "share")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": 0}, "shards.rows = 0: must be at least 1. Set shards.rows=4."),
        ({"blocks": -1}, "shards.blocks = -1: must be at least 1. Set shards.blocks=null."),
        ({"share": float("nan")}, "share = nan: must be at least 1. Set share=2."),
    ],
)
def test_a_field_below_its_least_is_refused_with_its_default(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal) as refused:
        Counts(**changed) if "share" in changed else from_plain(Counts, changed, "shards")
    assert str(refused.value) == message
    assert Counts(rows=1).blocks is None
