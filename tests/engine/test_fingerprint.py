"""What enters a digest, what never does, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.identity import identity
from conf.refusal import Refusal
from pipelines.engine.fingerprint import canonical, digest


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    fused: bool = field(default=True, metadata={"execution": True})


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = 10
    optim: Optim = Optim()
    stages: tuple[Optim, ...] = (Optim(), Optim(lr=0.5))
    named: dict[str, Optim] = field(default_factory=lambda: {"a": Optim()})
    text: str = "x"
    workers: int = field(default=1, metadata={"execution": True})
    cluster: Optim = field(default=Optim(), metadata={"execution": True})


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(plain)
def test_canonical_bytes_are_json_that_reads_back_equal(value: Any) -> None:
    assert json.loads(canonical(value)) == value


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), plain, min_size=2))
def test_the_order_of_keys_does_not_matter(value: dict[str, Any]) -> None:
    assert digest(dict(reversed(value.items()))) == digest(value)


@settings(max_examples=50, deadline=None)
@given(plain, plain)
def test_different_values_have_different_digests(one: Any, other: Any) -> None:
    same = json.dumps(identity(one), sort_keys=True) == json.dumps(identity(other), sort_keys=True)
    assert (digest(one) == digest(other)) == same


def test_a_number_is_itself_however_it_is_written() -> None:
    assert digest({"lr": 1}) == digest({"lr": 1.0})
    assert digest({"lr": True}) != digest({"lr": 1})
    assert digest({"lr": "1"}) != digest({"lr": 1})
    assert digest({"lr": 0.1 + 0.2}) != digest({"lr": 0.3})


def test_the_digest_of_a_known_payload_never_changes() -> None:
    assert canonical({"b": [1, 2.5, None], "a": "é"}) == b'{"a":"\\u00e9","b":[1,2.5,null]}'
    assert digest({"b": [1, 2.5, None], "a": "é"}) == (
        "84afbf1d4853005f9dd0c81cb1819b53ce86978340764c062160f6e8356665de"
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"workers": 7},
        {"cluster": Optim(lr=9.0)},
        {"optim": Optim(fused=False)},
        {"stages": (Optim(fused=False), Optim(lr=0.5, fused=False))},
        {"named": {"a": Optim(fused=False)}},
    ],
)
def test_execution_settings_never_enter_at_any_depth(changed: dict[str, Any]) -> None:
    assert canonical(replace(Settings(), **changed)) == canonical(Settings())


@pytest.mark.parametrize(
    "changed",
    [
        {"steps": 11},
        {"optim": Optim(lr=2e-3)},
        {"stages": (Optim(),)},
        {"stages": (Optim(lr=0.5), Optim())},
        {"named": {"b": Optim()}},
        {"text": "X"},
    ],
)
def test_every_identity_setting_enters(changed: dict[str, Any]) -> None:
    assert canonical(replace(Settings(), **changed)) != canonical(Settings())


def test_a_default_is_part_of_the_identity() -> None:
    assert identity(Settings())["steps"] == 10


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": {"b": [0, math.nan]}}, "settings.a.b[1]"),
        ({"a": math.inf}, "settings.a"),
        ({"f": print}, "settings.f"),
        ({"f": lambda: 0}, "settings.f"),
        ({"s": {1, 2}}, "settings.s"),
        ({"p": Path("x")}, "settings.p"),
        ({"b": b"x"}, "settings.b"),
        ({"o": object()}, "settings.o"),
        ({"c": Settings}, "settings.c"),
        ({1: 2}, "settings: the key 1"),
    ],
)
def test_what_has_no_stable_bytes_is_refused_by_its_path(value: Any, where: str) -> None:
    with pytest.raises(Refusal) as error:
        canonical(value)
    assert str(error.value).startswith(where)


def test_a_field_that_came_later_moves_no_digest_until_it_is_set() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Later(Optim):
        momentum: float = field(default=0.9, metadata={"absent_at_default": True})
        betas: tuple[float, ...] = field(default_factory=tuple, metadata={"absent_at_default": True})

    assert digest(identity(Later())) == digest(identity(Optim()))
    assert digest(identity(Later(momentum=0.8))) != digest(identity(Optim())) != digest(identity(Later(betas=(0.1,))))
