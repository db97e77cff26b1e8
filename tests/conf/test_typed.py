"""Settings from plain mappings: strict, with errors that name the path, the value, the rule and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.refusal import Refusal, field
from conf.typed import from_plain, to_plain


@dataclass(frozen=True, kw_only=True)
class Adam:
    kind: Literal["adam", "adamw"] = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Muon:
    kind: Literal["muon"] = "muon"
    momentum: float = 0.95


@dataclass(frozen=True, kw_only=True)
class Training:
    steps: int
    optim: Adam | Muon = Adam()
    warmup: Adam | None = None
    names: tuple[str, ...] = ()
    weights: dict[str, float] | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    limit: int | float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise Refusal("steps", self.steps, "must be at least 1", f"set {field('steps')}=1")


def test_a_full_mapping_becomes_typed_settings() -> None:
    settings = from_plain(
        Training,
        {
            "steps": 1e3,
            "optim": {"kind": "adamw", "lr": "3e-4", "betas": [0.9, 1]},
            "warmup": None,
            "names": ["a", "b"],
            "weights": {"web": 1, "code": 0.5},
            "precision": "bf16",
            "limit": 3,
        },
    )
    assert settings == Training(
        steps=1000,
        optim=Adam(kind="adamw", lr=3e-4, betas=(0.9, 1.0)),
        names=("a", "b"),
        weights={"web": 1.0, "code": 0.5},
        precision="bf16",
        limit=3,
    )
    assert type(settings.steps) is int
    assert type(settings.limit) is int
    assert isinstance(settings.optim, Adam)
    assert type(settings.optim.betas[1]) is float


@pytest.mark.parametrize(
    ("plain", "says"),
    [
        ({"step": 1}, "train.step: no such key. Did you mean train.steps?"),
        ({"steps": 1, "lr": 1}, "train.lr: no such key. Did you mean train.optim.lr?"),
        ({"steps": 1, "zzz": 1}, "The keys here are steps, optim, warmup"),
        ({}, "train.steps: has no value and no default. Set it."),
        ({"steps": True}, "train.steps = true: expected a whole number"),
        ({"steps": 1.5}, "train.steps = 1.5: expected a whole number"),
        ({"steps": "many"}, "train.steps = 'many': expected a whole number"),
        ({"steps": 0}, "train.steps = 0: must be at least 1. Set train.steps=1."),
        ({"steps": 1, "compile": 1}, "train.compile = 1: expected true or false"),
        ({"steps": 1, "names": "a"}, "train.names = 'a': expected a list. Write 'train.names=[a]'."),
        ({"steps": 1, "names": [3]}, "train.names[0] = 3: expected text"),
        ({"steps": 1, "precision": "bf61"}, "must be one of fp32, bf16. Did you mean bf16?"),
        ({"steps": 1, "optim": {"lr": 1}}, "needs a kind, one of adam, adamw, muon"),
        ({"steps": 1, "optim": {"kind": "mun"}}, "train.optim.kind = 'mun': must be one of adam, adamw, muon"),
        ({"steps": 1, "optim": {"kind": "muon", "lr": 1}}, "train.optim.lr: no such key. The keys here are"),
        ({"steps": 1, "optim": {"kind": "adam", "lr": float("nan")}}, "train.optim.lr = nan: expected a finite number"),
        ({"steps": 1, "optim": {"kind": "adam", "betas": [1]}}, "expected exactly 2 values"),
        ({"steps": 1, "warmup": {"rl": 1}}, "train.warmup.rl: no such key. Did you mean train.warmup.lr?"),
        ({"steps": 1, "weights": {"web": "x"}}, "train.weights.web = 'x': expected a finite number"),
        ({"steps": 1, "limit": "x"}, "expected a whole number; or: expected a finite number"),
        ({"steps": 1, "names": ["a", "b\udcff"]}, r"train.names = 'b\udcff': holds bytes that are not UTF-8"),
        (3, "train = 3: expected a mapping with the keys steps"),
    ],
)
def test_each_mistake_is_answered_with_path_value_and_remedy(plain: dict, says: str) -> None:
    with pytest.raises(Refusal) as error:
        from_plain(Training, plain, "train")
    assert says in str(error.value)
    assert error.value.exit_code == 2


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        Training,
        steps=st.integers(1, 10**12),
        optim=st.one_of(
            st.builds(Adam, lr=st.floats(0, 1), betas=st.tuples(st.floats(0, 1), st.floats(0, 1))),
            st.builds(Muon, momentum=st.floats(-1e300, 1e300)),
        ),
        warmup=st.none() | st.builds(Adam),
        names=st.lists(st.text()).map(tuple),
        weights=st.none() | st.dictionaries(st.text(), st.floats(-1, 1)),
        precision=st.sampled_from(["fp32", "bf16"]),
        compile=st.booleans(),
        limit=st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    )
)
def test_plain_form_and_settings_are_inverse(training: Training) -> None:
    assert from_plain(Training, to_plain(training)) == training


def test_an_exception_with_an_exit_code_keeps_its_type() -> None:
    class RoomError(Exception):
        exit_code = 2

    @dataclass(frozen=True, kw_only=True)
    class Picky:
        x: int = 0

        def __post_init__(self) -> None:
            raise RoomError("no")

    with pytest.raises(RoomError):
        from_plain(Picky, {"x": 1})
