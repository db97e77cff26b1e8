"""The presets of conf/model with every size made small."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from conf.typed import from_plain
from model.config import ModelConfig
from tests.model.configurations import LIVELY, preset_values

SMALL = {
    "n_heads": 4,
    "d_ff": 48,
    "shared_d_ff": 24,
    "window": 8,
    "d_state": 4,
    "n_features": 16,
    "q_rank": 10,
    "kv_rank": 12,
    "plain_dim": 6,
    "rope_dim": 4,
    "v_dim": 7,
    "head_dim": 8,
    "channels": 4,
    "n_experts": 8,
    "groups": 2,
    "top_groups": 1,
    "image_size": 8,
    "patch_size": 4,
    "width": 4,
}


def shrunk(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a preset with every size made small, whatever it is a size of."""
    small: dict[str, Any] = {}
    for name, value in part.items():
        if isinstance(value, Mapping):
            small[name] = shrunk(value)
        elif name == "n_kv_heads" and value:
            small[name] = 1 if value == 1 else 2
        elif name == "text":
            small[name] = 8
        elif name == "height":
            small[name] = 12
        elif name == "top_k":
            small[name] = min(value, 2)
        else:
            small[name] = SMALL[name] if name in SMALL and value else value
    return small


def tiny(name: str) -> ModelConfig:
    """conf/model/NAME.yaml in small: all kinds of its layers, two of those that repeat."""
    values = shrunk(preset_values(name)) | {"vocab_size": 97, "d_model": 32}
    firsts = [change.get("first", 0) for change in values.get("pattern", ())]
    values["n_layers"] = min(values["n_layers"], max([2, *(first + 1 for first in firsts if first < 16)]))
    values["pattern"] = [
        {part: shrunk(value) if isinstance(value, Mapping) else value for part, value in change.items()}
        for change in values.get("pattern", ())
        if change.get("first", 0) < values["n_layers"]
    ]
    if isinstance(values.get("head"), Mapping):
        values["head"].pop("weights", None)
    values["max_seq_len"] = min(values["max_seq_len"], 56)
    if "encoder" in values:
        values["encoder"] |= {"d_model": 32, "n_layers": 2, "max_seq_len": 56}
    return replace(from_plain(ModelConfig, values, "model"), init=LIVELY)
