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
from model.adapt import LoraConfig
from model.config import LayerChange
from model.ffns.dense import FfnConfig
from model.ffns.experts.config import CapacityConfig, RouterConfig
from model.heads.language import TargetWeight
from model.norms.norm import NormConfig
from model.positions.rope import YarnScaling
from pipelines.engine.files import FileHashes
from pipelines.engine.resolve import resolve
from pipelines.engine.step import Step
from pipelines.graph import build
from pipelines.settings.compose import compose
from pipelines.settings.derive import Settings
from pipelines.settings.schema import SET_ELSEWHERE

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


BASES = {
    # AdamW, as Muon allows one ZeRO stage only.
    "demo": ("optim=adamw",),
    "arms": (
        "optim=muon-small",
        "finetune=chat-lora",
        "finetune.data.paths=[CONVERSATIONS]",
        "model=mixtral-tiny",
        "model.ffn.capacity={factor: 2.0}",
        "model.position.scaling={kind: llama3, factor: 8.0}",
    ),
    "mamba": ("model=mamba-130m", "finetune=none"),
    "linear": ("model=linear-transformer", "finetune=none"),
    "favor": ("model=performer", "finetune=none"),
    "latent": ("model=deepseek-v3", "finetune=none"),
    "masked": ("model=bert-base", "objective=masked_token", "finetune=none"),
    "spans": ("model=t5-small", "objective=span_denoising", "finetune=none"),
    "infilling": ("model=bart-base", "objective=text_infilling", "finetune=none"),
}
"""Settings whose fields are changed one by one: the demo, and what other arms of its unions have that it has not."""


@cache
def base(name: str) -> Settings:
    """One of BASES over one small file: its digests are made hundreds of times here."""
    words = [word.replace("CONVERSATIONS", str(conversations())) for word in BASES[name]]
    return compose(["experiment=demo", "corpus=text", f"corpus.paths=[{text_file()}]", *words])


def conversations() -> Path:
    """A file of one conversation, another path each time."""
    path = Path(tempfile.mkdtemp()) / "chats.jsonl"
    path.write_text('{"prompt": "Say hello.", "completion": "Hello."}\n')
    return path


def text_file() -> Path:
    path = Path(tempfile.mkdtemp()) / "a.txt"
    path.write_text("a tale")
    return path


@cache
def hashes() -> FileHashes:
    return FileHashes(Path(tempfile.mkdtemp()) / "hashes.json")


@cache
def base_digests(name: str) -> dict[str, str]:
    return graph_digests(build(base(name)))


def graph_digests(steps: dict[str, Step]) -> dict[str, str]:
    return {node.name: node.digest for node in resolve(list(steps.values()), hashes()).nodes}


def leaves(
    value: Any, hint: Any, path: tuple[str, ...], execution: bool
) -> Iterator[tuple[type, tuple[str, ...], Any, Any, bool]]:
    """(its class, path, value, type, execution?) of every field that is not itself a dataclass."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        inner, here = getattr(value, field.name), (*path, field.name)
        is_execution = execution or bool(field.metadata.get("execution"))
        if dataclasses.is_dataclass(inner):
            yield from leaves(inner, hints[field.name], here, is_execution)
        else:
            yield type(value), here, inner, hints[field.name], is_execution


WHOLE = (
    ("demo", ("model", "norm"), NormConfig(kind="layer", bias=True)),
    ("arms", ("model", "ffn", "capacity"), CapacityConfig(tokens=64)),
    ("arms", ("model", "ffn", "router"), RouterConfig(groups=4, top_groups=2)),
    ("arms", ("model", "position", "scaling"), YarnScaling(factor=4.0)),
)
"""(base, path, value): classes of which several fields change at once."""

KNOWN = {
    "corpus.paths": (str(text_file()),),
    "tracking.about": {"team": "another"},
    "corpus.reader.max_document_characters": 5000,
    "tokenizer.character_coverage": 0.9995,
    "mixture.phases": (MixturePhase(weights={"corpus": 2.0}),),
    **{".".join(path): value for _, path, value in WHOLE},
    "model.pattern": (LayerChange(every=2, ffn=FfnConfig(d_ff=64)),),
    "model.encoder.pattern": (LayerChange(every=2, ffn=FfnConfig(d_ff=64)),),
    "model.head.weights": (TargetWeight(weight=0.5),),
    "finetune.data.tasks": ("write",),
    "finetune.lora": LoraConfig(),
    "finetune.freeze": ("frontend.*",),
    "finetune.data.paths": (str(conversations()),),
    "evaluate.compressors": ("gzip",),
    "evaluate.tasks": ("held_out_rolling",),
}
"""Other values of fields for which none can be guessed."""

ONE_VALUE = {
    *("corpus.kind", "model.tower", "finetune.data.kind", "model.norm.bias"),
    *("model.causal", "model.encoder"),  # another objective: tests/test_objective.py
    *("pretrain.init_from", "finetune.init_from"),  # a folder that has to be there: tests/test_start.py
    "finetune",  # null in some of BASES, and a group: whole in another
    *("model.encoder.encoder", "model.encoder.tower", "model.encoder.norm.bias"),
    *("model.encoder.d_model", "model.encoder.vocab_size"),  # those of the decoder, whose table it reads
    *("model.ffn.capacity.tokens", "model.ffn.router.top_groups"),  # with another of their class: WHOLE
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


def changed(name: str, path: tuple[str, ...], value: Any, hint: Any) -> Settings | None:
    """The settings with one field changed to a value that its class allows, or None where none was found."""
    known = KNOWN.get(".".join(path))
    for other in [known] if known is not None else itertools.islice(others(value, hint), 12):
        try:
            settings: Settings = with_value(base(name), path, other)
            build(settings)
            return settings
        except Exception as error:
            if not (hasattr(error, "exit_code") or isinstance(error, ValueError)):
                raise
    return None


def followers(name: str, names: set[str]) -> set[str]:
    """The steps and everything made from them."""
    found = set(names)
    for step in build(base(name)).values():  # in order: inputs first
        if any(parent.name in found for parent in step.sources.values()):
            found.add(step.name)
    return found


def set_elsewhere(path: tuple[str, ...]) -> bool:
    """Whether this field is one that is refused in favour of another, or lies in such a one."""
    return any(".".join(path[:length]) in SET_ELSEWHERE for length in range(1, len(path) + 1))


def fields() -> Iterator[tuple[str, tuple[str, ...], Any, Any, bool]]:
    """(base, path, value, type, execution?): each field of each class once for every place where it may stand."""
    seen = set()
    for name in BASES:
        for owner, path, *rest in leaves(base(name), Settings, (), False):
            if not set_elsewhere(path) and (owner, path) not in seen:
                seen.add((owner, path))
                yield (name, path, *rest)  # type: ignore[misc]
    for name, path, value in WHOLE:
        yield name, path, None, type(value), False


FIELDS = [field for field in fields() if field[1][0] not in DERIVED]


@pytest.mark.parametrize(
    ("name", "path", "value", "hint", "execution"), FIELDS, ids=[f"{field[0]}-{'.'.join(field[1])}" for field in FIELDS]
)
def test_a_setting_moves_exactly_what_it_changes(
    name: str, path: tuple[str, ...], value: Any, hint: Any, execution: bool
) -> None:
    settings = changed(name, path, value, hint)
    if settings is None:
        assert ".".join(path) in ONE_VALUE or len(typing.get_args(hint)) == 1, "no other value of this field was found"
        return
    before, after = base_digests(name), graph_digests(build(settings))
    moved = {step for step in before if before[step] != after[step]}
    if execution:
        assert moved == set()
        return
    owner = OWNER.get(".".join(path[:2])) or OWNER[path[0]]
    assert moved == followers(name, owner)


def test_the_seed_reaches_order_and_initialization() -> None:
    settings = compose(["experiment=demo", "seed=7"])
    assert settings.order.seed == settings.pretrain.seed == 7


def test_where_conversations_lie_does_not_matter_but_their_text_does() -> None:
    def digest(path: Path) -> str:
        words = ("finetune=chat", f"finetune.data.paths=[{path}]", "corpus=text", f"corpus.paths=[{text_file()}]")
        return graph_digests(build(compose(["experiment=demo", *words])))["instructions"]

    one, moved, other = conversations(), conversations(), conversations()
    other.write_text(other.read_text().replace("Hello", "Hi"))
    assert digest(one) == digest(moved) != digest(other)


def test_where_a_corpus_lies_does_not_matter_but_its_text_does(tmp_path: Path) -> None:
    def steps(folder: str, text: str) -> dict[str, Step]:
        root = tmp_path / folder / "books"
        root.mkdir(parents=True)
        (root / "a.txt").write_text(text)
        return build(compose(["experiment=text", f"corpus.paths=[{root}]"]))

    one, moved, other = steps("one", "a tale"), steps("two", "a tale"), steps("three", "another")
    digests = [graph_digests({"corpus": graph["corpus"]})["corpus"] for graph in (one, moved, other)]
    assert digests[0] == digests[1] != digests[2]
