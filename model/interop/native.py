"""A config.json for models that no Hugging Face class computes: ModelConfig as it is, our tensor names."""

from collections.abc import Mapping
from typing import Any

from conf.refusal import NO_VALUE, Refusal
from conf.typed import from_plain, to_plain
from model.config import ModelConfig

MODEL_TYPE = "athanor"


def native_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of a model that no Hugging Face class computes."""
    return {"model_type": MODEL_TYPE, "config": to_plain(config)}


def config_from_native(stored: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a native config.json. Raises Refusal where it is not one of this version's."""
    try:
        return from_plain(ModelConfig, stored.get("config", {}), "config")
    except Refusal as refusal:
        raise Refusal(
            "config.json",
            NO_VALUE,
            (
                f"it is marked {MODEL_TYPE} but cannot be read ({refusal}): it must have been "
                "written by the version of this package that reads it"
            ),
            "write it again with that version",
        ) from refusal
