"""How another package's checkpoint maps to ours: the form of the declarative tables in `families`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from model.config import ModelConfig
from model.positions.base import PositionConfig


@dataclass(frozen=True)
class Weight:
    """One tensor of theirs. `{layer}` stands for every layer number, `{expert}` for every expert of that layer; a
    tensor the model does not have is left out.

    ours: several names where theirs is their concatenation along the output axis, in this order.
    transposed: theirs is stored [in, out].
    groups: the field of ModelConfig that tells into how many equal groups theirs is cut, each of which holds its share
        of every one of ours (Falcon's key/value heads, each after the queries that use it).
    part: (i, n) where theirs is the i-th of n equal parts of ours along the output axis.
    expert: theirs is that expert's matrix of ours, which has all of them; set where `{expert}` is spelled out.
    lead: theirs has this many axes of 1 before ours (BART's offset of the logits).
    zero_if_missing: older checkpoints lack it, and it is zero there.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    groups: str | None = None
    part: tuple[int, int] = (0, 1)
    expert: int | None = None
    lead: int = 0
    zero_if_missing: bool = False

    def of(self, ours: torch.Tensor) -> torch.Tensor:
        """The part of our tensor that theirs is; a view."""
        whole = ours if self.expert is None else ours[self.expert]
        index, parts = self.part
        return whole if parts == 1 else whole.chunk(parts)[index]


@dataclass(frozen=True)
class Setting:
    """One key of their config.json and the dotted fields of ModelConfig that it sets.

    default: what their class takes where the key is missing. names: their word for each of ours, for enumerations;
        a value without one is the same in both.
    written: the field whose value is exported instead, or what computes it, where ours may be null and theirs may not.
    also: another spelling of the key, written beside it and read where it is missing.
    added: theirs counts so many more (RoBERTa's positions count unused rows of the table).
    """

    theirs: str
    ours: tuple[str, ...]
    default: Any = None
    names: Mapping[Any, Any] | None = None
    written: str | Callable[[ModelConfig], Any] | None = None
    also: str | None = None
    added: int = 0


@dataclass(frozen=True)
class LayerTable:
    """How a class says that its layers differ.

    faults: what keeps the class from computing this model's layers. write: its keys for them. read: the pattern that a
    config.json asks for, by the field that takes it (`pattern`, `encoder.pattern`), given our fields by dotted path;
    and what else of our fields follows from several of their keys.
    """

    faults: Callable[[ModelConfig], list[str]]
    write: Callable[[ModelConfig], dict[str, Any]]
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A Hugging Face model class, told as data; a class whose tensors have other names in other settings is several of
    these, told apart by their constants; a model type with several heads is one for each, told apart by architecture.

    base_prefix: what the tensors' names lose in a checkpoint of the headless class.
    fixed: what ModelConfig's fields must be for this class to compute the same function.
    required: fields of ModelConfig that may be neither null nor 0.
    constants: keys of theirs with one supported value: written on export, refused on import when different.
    only_written: keys of theirs that matter to their training only: written on export, not read.
    heads_divide_width: their class refuses a width that is no multiple of the number of heads, whatever head_dim is.
    computed: stored tensors that carry no weights but what the configuration says: written on export, on import
        compared and left.
    weight_norms: names of weights that theirs stores as length and direction, each with the axis that has a length for
        every entry.
    ignored: regular expressions of stored tensors that this class does not use: buffers, and other classes' heads;
        `{n_layers}` stands for the number of layers.
    renamed: (regular expression, replacement) of tensor names in older checkpoints.
    copies: tensors of theirs that are always another one of theirs under a second name, which not every file stores.
    token_ids: the special tokens that its published checkpoints have, written unless others are given.
    in_memory: the weights as the class itself holds them, where a saved checkpoint has them otherwise; read too.
    peft_task: what the peft package is to wrap the class as; null where it only needs the adapted layers.
    peft_refuses: last names of layers that peft does not adapt in this class. peft_parameters: of those that it takes for
        experts' and adapts by their weights only.
    caches_every_head: the class caches keys and values for every query head, whichever of them are the same.
    layers: how the class says that its layers differ; null where they are all alike.
    write_position, read_position: the positional keys, where they are too tangled for `settings`.
    faults: what else keeps the class from computing a model.
    modernised: rewrites the keys of older config.json files into those that `settings` and `constants` know.
    """

    model_type: str
    architecture: str
    base_prefix: str
    weights: tuple[Weight, ...]
    settings: tuple[Setting, ...]
    fixed: Mapping[str, Any]
    required: tuple[str, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    only_written: Mapping[str, Any] = field(default_factory=dict)
    heads_divide_width: bool = False
    computed: Mapping[str, Callable[[ModelConfig], torch.Tensor]] = field(default_factory=dict)
    weight_norms: Mapping[str, int] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    token_ids: Mapping[str, int | None] = field(default_factory=dict)
    in_memory: tuple[Weight, ...] = ()
    peft_task: Literal["CAUSAL_LM", "SEQ_2_SEQ_LM"] | None = None
    peft_refuses: tuple[str, ...] = ()
    peft_parameters: tuple[str, ...] = ()
    caches_every_head: bool = False
    layers: LayerTable | None = None
    write_position: Callable[[PositionConfig], dict[str, Any]] | None = None
    read_position: Callable[[Mapping[str, Any]], PositionConfig] | None = None
    faults: Callable[[ModelConfig], list[str]] = lambda _: []
    modernised: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict


def dotted(config: ModelConfig, path: str) -> Any:
    """The value of a field such as `mixer.n_heads`; None where another kind of part stands there, without that field."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def has_field(config: ModelConfig, path: str) -> bool:
    """Whether the parts that this model has know a field such as `mixer.n_heads`."""
    value: Any = config
    for name in path.split("."):
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True
