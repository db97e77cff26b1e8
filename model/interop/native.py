"""A config.json for models that no Hugging Face class computes: ModelConfig as it is, our tensor names."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.errors import ModelError

MODEL_TYPE = "athanor"


def native_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of a model that no Hugging Face class computes."""
    return {"model_type": MODEL_TYPE, "config": dataclasses.asdict(config)}


def config_from_native(stored: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a native config.json. Raises ModelError where it is not one of this version's."""
    try:
        return typing.cast(ModelConfig, revived(ModelConfig, stored["config"]))
    except (KeyError, TypeError, StopIteration) as error:
        raise ModelError(
            f"config.json is marked {MODEL_TYPE} but cannot be read ({error!r}): it must have been written by the "
            "version of this package that reads it; write it again with that version."
        ) from error


def revived(annotation: Any, value: Any) -> Any:
    """`value` of plain mappings as the dataclass that `annotation` asks for, a union's member told by its `kind`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        if value is None:
            return None
        classes = [member for member in typing.get_args(annotation) if dataclasses.is_dataclass(member)]
        if not classes or not isinstance(value, Mapping):
            return value
        if len(classes) > 1:
            classes = [member for member in classes if value["kind"] == getattr(member, "kind", None)]
        annotation = next(iter(classes))
    if typing.get_origin(annotation) is tuple and isinstance(value, list | tuple):
        return tuple(revived(typing.get_args(annotation)[0], item) for item in value)
    if not dataclasses.is_dataclass(annotation) or not isinstance(value, Mapping):
        return value
    hints = typing.get_type_hints(annotation)
    return annotation(**{name: revived(hints[name], item) for name, item in value.items()})  # type: ignore[operator]
