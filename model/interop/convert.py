"""Configurations and weights to Hugging Face's and back, driven by the tables in `families`."""

import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Any

import torch

from model.build import build_model
from model.config import ModelConfig
from model.errors import ModelError
from model.interop.families import FAMILIES
from model.interop.native import revived
from model.interop.tables import ABSENT, Family, Weight, dotted

State = dict[str, torch.Tensor]


def family_of(config: ModelConfig) -> Family:
    """The Hugging Face class that computes what `config` does; else ModelError, naming what the nearest needs."""
    differences = {family.model_type: _differences(config, family) for family in FAMILIES}
    for family in FAMILIES:
        if not differences[family.model_type]:
            return family
    nearest, needs = min(differences.items(), key=lambda item: len(item[1]))
    raise ModelError(
        f"no Hugging Face class computes this model: {nearest} comes nearest but needs {', '.join(needs)}; "
        "change these or keep the model in this package's own format."
    )


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of the matching class, but for token ids and precision. Raises ModelError where no class matches."""
    family = family_of(config)
    theirs: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for setting in family.settings:
        value = dotted(config, setting.ours[0])
        if setting.written is not None:
            value = setting.written(config) if callable(setting.written) else dotted(config, setting.written)
        theirs[setting.theirs] = value if setting.names is None else setting.names.get(value, value)
    ids = {"bos_token_id": None, "eos_token_id": None}
    return {**theirs, **family.write_position(config.position), **family.constants, **family.only_written, **ids}


def config_from_hf(theirs: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a config.json. Raises ModelError for a class or a setting that we cannot compute."""
    family = _family_named(theirs.get("model_type"))
    for key, value in family.constants.items():
        if theirs.get(key, value) != value:
            raise ModelError(
                f"config.json has {key}={theirs[key]!r}: a {family.model_type} checkpoint can be imported with "
                f"{value!r} only; this variant computes something else."
            )
    fields = {path: value for path, value in family.fixed.items() if path != "position.kind"}
    for setting in family.settings:
        value = theirs.get(setting.theirs, setting.default)
        if setting.names is not None and isinstance(value, str):
            value = _our_word(setting.theirs, value, setting.names)
        fields |= dict.fromkeys(setting.ours, value)
    if fields.get("ffn.d_ff", 0) is None:  # GPT-2's default
        fields["ffn.d_ff"] = 4 * fields["d_model"]
    if "mixer.head_dim" in fields and fields["mixer.head_dim"] == fields["d_model"] // fields["mixer.n_heads"]:
        fields["mixer.head_dim"] = None
    if "mixer.n_kv_heads" in fields and fields["mixer.n_kv_heads"] == fields["mixer.n_heads"]:
        fields["mixer.n_kv_heads"] = None
    if "mixer.dt_rank" in fields and fields["mixer.dt_rank"] == -(-fields["d_model"] // 16):
        fields["mixer.dt_rank"] = None
    return typing.cast(ModelConfig, revived(ModelConfig, _nested(fields) | {"position": family.read_position(theirs)}))


def to_hf(state: Mapping[str, torch.Tensor], config: ModelConfig) -> State:
    """Our state dict under their names and in their layout, in its own precision; a tied head is left out."""
    theirs: State = {}
    for weight in spelled_weights(family_of(config), config):
        if weight.ours == ("head.weight",) and config.tie_embeddings:
            continue
        parts = [state[name] for name in weight.ours if name in state]
        if len(parts) == len(weight.ours):
            joined = parts[0] if len(parts) == 1 else torch.cat(parts)
            theirs[weight.theirs] = (joined.T if weight.transposed else joined).contiguous()
    return theirs


def from_hf(theirs_config: Mapping[str, Any], theirs: Mapping[str, torch.Tensor]) -> tuple[ModelConfig, State]:
    """(ModelConfig, state dict that `load_state_dict(strict=True)` takes), in the precision of the checkpoint.

    Raises ModelError listing every tensor that is missing, not expected, or of another shape.
    """
    config = config_from_hf(theirs_config)
    family = _family_named(theirs_config.get("model_type"))
    own = build_model(config, device="meta").state_dict()
    expected = to_hf(own, config)
    theirs = _cleaned(family, theirs, expected)
    if config.tie_embeddings:
        theirs = _without_tied_head(family, theirs)
    check_tensors({name: tensor.shape for name, tensor in theirs.items()}, {n: t.shape for n, t in expected.items()})
    state: State = {}
    for weight in spelled_weights(family, config):
        if weight.theirs in expected:
            stored = theirs[weight.theirs].T if weight.transposed else theirs[weight.theirs]
            parts = stored.split([own[name].shape[0] for name in weight.ours])
            state |= {name: part.contiguous() for name, part in zip(weight.ours, parts, strict=True)}
    if config.tie_embeddings:
        state["head.weight"] = state["frontend.tokens.weight"]
    return config, state


def check_tensors(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> None:
    """Raises ModelError that lists missing, unexpected and misshapen tensors, if there are any."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "not expected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} (found {list(found[name])}, expected {list(expected[name])})"
            for name in sorted(expected.keys() & found.keys())
            if found[name] != expected[name]
        ],
    }
    listed = [f"{len(names)} {what}: {', '.join(names)}" for what, names in problems.items() if names]
    if listed:
        raise ModelError(
            f"the checkpoint's tensors do not fit its configuration; {'; '.join(listed)}. Use the config.json that "
            "belongs to these weights."
        )


def spelled_weights(family: Family, config: ModelConfig) -> list[Weight]:
    """The table with every layer spelled out, each tensor once."""
    spelled: dict[str, Weight] = {}
    for weight in family.weights:
        for layer in range(config.n_layers) if "{layer}" in weight.theirs else (0,):
            ours = tuple(name.format(layer=layer) for name in weight.ours)
            theirs = weight.theirs.format(layer=layer)
            spelled[theirs] = dataclasses.replace(weight, theirs=theirs, ours=ours)
    return list(spelled.values())


def _differences(config: ModelConfig, family: Family) -> list[str]:
    wrong = [f"{path}={value!r}" for path, value in family.fixed.items() if dotted(config, path) != value]
    for setting in family.settings:
        values = {path: dotted(config, path) for path in setting.ours}
        if len(set(values.values())) > 1:
            wrong.append(f"{' and '.join(values)} equal")
    heads = dotted(config, "mixer.n_heads")
    if family.heads_divide_width and heads is not ABSENT and config.d_model % heads:
        wrong.append("d_model a multiple of mixer.n_heads")
    return wrong


def _family_named(model_type: Any) -> Family:
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise ModelError(f"config.json has model_type {model_type!r}: checkpoints of {known} can be imported.")


def _our_word(key: str, theirs: str, names: Mapping[Any, str]) -> Any:
    aliases = {name: ours for ours, name in names.items()} | {"gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}
    if theirs not in aliases:
        raise ModelError(f"config.json has {key}={theirs!r}: known here are {', '.join(sorted(aliases))}.")
    return aliases[theirs]


def _nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths as mappings within mappings."""
    nested: dict[str, Any] = {}
    for path, value in fields.items():
        *groups, name = path.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return nested


def _cleaned(
    family: Family, theirs: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Without stored buffers, and with the prefix that checkpoints of the headless class lack."""
    kept = {name: t for name, t in theirs.items() if not any(re.search(rule, name) for rule in family.ignored)}
    if not any(name.startswith(family.base_prefix) for name in kept):
        kept = {name if name in expected else family.base_prefix + name: tensor for name, tensor in kept.items()}
    return kept


def _without_tied_head(family: Family, theirs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    names = {weight.ours: weight.theirs for weight in family.weights}
    head, tokens = names[("head.weight",)], names[("frontend.tokens.weight",)]
    if head in theirs and tokens in theirs and not torch.equal(theirs[head], theirs[tokens]):
        raise ModelError(
            f"config.json ties the embeddings, but {head} differs from {tokens}: set tie_word_embeddings to false to "
            "keep both, or remove the head's tensor."
        )
    return {name: tensor for name, tensor in theirs.items() if name != head}
