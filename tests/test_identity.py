"""Settings that say where or how fast never move a digest; every other one moves its step and exactly what follows."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

import pytest

from data.mixture import MixturePhase
from model.config import LayerChange
from model.ffn import FfnConfig
from model.heads import TargetWeight
from model.norm import NormConfig
from model.peft import LoraConfig
from model.position import LinearScaling
from pipelines.engine.files import FileHashes
from pipelines.engine.resolve import resolve
from pipelines.engine.step import Step
from pipelines.graph import build
from pipelines.settings import SET_ELSEWHERE, Settings, compose

OWNER = {
    "corpus": {"corpus"},
    "tokenizer": {"tokenizer"},
    "shards": {"shards"},
    "mixture": {"pretrain"},
    "order": {"pretrain"},
    "model": {"pretrain"},
    "objective": {"pretrain"},
    "pretrain": {"pretrain"},
    "optim": {"pretrain"},
    "schedule": {"pretrain"},
    "finetune": {"finetune"},
    "shards.seq_len": {"shards", "instructions"},  # both lay rows of this length
    "finetune.data": {"instructions"},
    "finetune.too_long": {"instructions"},
    "evaluate": {"evaluate"},
    "export": {"export"},
    "report": {"report"},
}
"""The step that each part of the settings belongs to."""

DERIVED = {"seed", "sources"}
"""`seed` is a default that YAML copies to `order.seed` and `pretrain.seed`; `sources` replaces `corpus` (tested below)."""


@cache
def base() -> Settings:
    """The demo with AdamW (Muon allows one ZeRO stage only), over one small file: its digests are made 400 times here."""
    return compose(["experiment=demo", "optim=adamw", "corpus=text", f"corpus.paths=[{text_file()}]"])


def text_file() -> Path:
    path = Path(tempfile.mkdtemp()) / "a.txt"
    path.write_text("a tale")
    return path


@cache
def hashes() -> FileHashes:
    return FileHashes(Path(tempfile.mkdtemp()) / "hashes.json")


@cache
def base_digests() -> dict[str, str]:
    return graph_digests(build(base()))


def graph_digests(steps: dict[str, Step]) -> dict[str, str]:
    return {node.name: node.digest for node in resolve(list(steps.values()), hashes()).nodes}


def leaves(
    value: Any, hint: Any, path: tuple[str, ...], execution: bool
) -> Iterator[tuple[tuple[str, ...], Any, Any, bool]]:
    """(path, value, type, execution?) of every field that is not itself a dataclass."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        inner, here = getattr(value, field.name), (*path, field.name)
        is_execution = execution or bool(field.metadata.get("execution"))
        if dataclasses.is_dataclass(inner):
            yield from leaves(inner, hints[field.name], here, is_execution)
        else:
            yield here, inner, hints[field.name], is_execution


KNOWN = {
    "corpus.paths": (str(text_file()),),
    "corpus.reader.max_document_characters": 5000,
    "tokenizer.character_coverage": 0.9995,
    "mixture.phases": (MixturePhase(weights={"corpus": 2.0}),),
    "model.norm": NormConfig(kind="layer", bias=True),
    "model.pattern": (LayerChange(every=2, ffn=FfnConfig(d_ff=64)),),
    "model.head.weights": (TargetWeight(weight=0.5),),
    "model.position.scaling": LinearScaling(factor=4.0),
    "finetune.data.tasks": ("write",),
    "finetune.lora": LoraConfig(),
    "finetune.freeze": ("frontend.*",),
    "evaluate.compressors": ("gzip",),
    "evaluate.tasks": ("held_out_rolling",),
}
"""Other values of fields for which none can be guessed."""

ONE_VALUE = {
    *("corpus.kind", "model.tower", "finetune.data.kind", "model.norm.bias"),
    *("model.causal", "model.encoder"),  # another objective: tests/test_objective.py
    *("pretrain.init_from", "finetune.init_from"),  # a folder that has to be there: tests/test_start.py
}
"""Fields that cannot change alone: another kind needs other fields too. `…kind` of a union has one value for each class."""


def others(value: Any, hint: Any) -> Iterator[Any]:
    """Other values of a field, tame ones first; some may break a rule of their class."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for arm in arguments:
            if arm is type(None):
                if value is not None:
                    yield None
            else:
                yield from others(value, arm)
    elif origin is Literal:
        yield from (choice for choice in arguments if choice != value)
    elif hint is bool:
        yield not value
    elif hint is int:
        yield from (value * 2, value + 1, value // 2) if isinstance(value, int) and value else (1, 2, 64)
    elif hint is float:
        yield from (value * 0.5, value * 2, value + 0.1) if isinstance(value, int | float) and value else (0.5, 1.0)
    elif hint is str:
        yield (value or "") + "x"
    elif origin is tuple and arguments[0] is str:
        yield (*(value or ()), "x")
    elif origin is tuple and arguments[0] is float:
        yield tuple(item * 0.5 for item in value)


def with_value(node: Any, path: tuple[str, ...], value: Any) -> Any:
    if not path:
        return value
    return dataclasses.replace(node, **{path[0]: with_value(getattr(node, path[0]), path[1:], value)})


def changed(path: tuple[str, ...], value: Any, hint: Any) -> Settings | None:
    """The settings with one field changed to a value that its class allows, or None where none was found."""
    known = KNOWN.get(".".join(path))
    for other in [known] if known is not None else itertools.islice(others(value, hint), 12):
        try:
            settings: Settings = with_value(base(), path, other)
            build(settings)
            return settings
        except Exception as error:
            if not (hasattr(error, "exit_code") or isinstance(error, ValueError)):
                raise
    return None


def followers(names: set[str]) -> set[str]:
    """The steps and everything made from them."""
    found = set(names)
    for step in build(base()).values():  # in order: inputs first
        if any(parent.name in found for parent in step.inputs.values()):
            found.add(step.name)
    return found


FIELDS = [field for field in leaves(base(), Settings, (), False) if field[0][:2] not in SET_ELSEWHERE]
FIELDS.append((("model", "norm"), base().model.norm, NormConfig, False))


@pytest.mark.parametrize(("path", "value", "hint", "execution"), FIELDS, ids=[".".join(field[0]) for field in FIELDS])
def test_a_setting_moves_exactly_what_it_changes(path: tuple[str, ...], value: Any, hint: Any, execution: bool) -> None:
    if path[0] in DERIVED:
        pytest.skip("copied into other settings, which have their own test")
    settings = changed(path, value, hint)
    if settings is None:
        assert ".".join(path) in ONE_VALUE or len(typing.get_args(hint)) == 1, "no other value of this field was found"
        pytest.skip("cannot change alone")
    before, after = base_digests(), graph_digests(build(settings))
    moved = {name for name in before if before[name] != after[name]}
    if execution:
        assert moved == set()
        return
    owner = OWNER.get(".".join(path[:2])) or OWNER[path[0]]
    assert moved == followers(owner)


def test_the_seed_reaches_order_and_initialization() -> None:
    settings = compose(["experiment=demo", "seed=7"])
    assert settings.order.seed == settings.pretrain.seed == 7


def test_where_a_corpus_lies_does_not_matter_but_its_text_does(tmp_path: Path) -> None:
    def steps(folder: str, text: str) -> dict[str, Step]:
        root = tmp_path / folder / "books"
        root.mkdir(parents=True)
        (root / "a.txt").write_text(text)
        return build(compose(["experiment=text", f"corpus.paths=[{root}]"]))

    one, moved, other = steps("one", "a tale"), steps("two", "a tale"), steps("three", "another")
    digests = [graph_digests({"corpus": graph["corpus"]})["corpus"] for graph in (one, moved, other)]
    assert digests[0] == digests[1] != digests[2]
