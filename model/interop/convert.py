"""Configurations and weights to Hugging Face's and back, driven by the tables in `families`."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from conf.refusal import NO_VALUE, Refusal
from conf.typed import from_plain
from model.build import build_model
from model.config import LayerChange, ModelConfig
from model.interop.families import FAMILIES
from model.interop.families.common import GRANTED
from model.interop.tables import Family, Setting, Weight, dotted, has_field
from model.interop.weight_norm import folded, unfolded

State = dict[str, torch.Tensor]


def family_of(config: ModelConfig) -> Family:
    """The Hugging Face class that computes what `config` does; else Refusal, naming what the nearest needs."""
    config = as_exceptions(config)
    differences = [_differences(config, family) for family in FAMILIES]
    needs, nearest = min(zip(differences, FAMILIES, strict=True), key=lambda pair: len(pair[0]))
    if not needs:
        return nearest
    raise Refusal(
        "model",
        NO_VALUE,
        f"no Hugging Face class computes this model: {nearest.model_type} comes nearest but needs {', '.join(needs)}",
        "change these or keep the model in this package's own format",
    )


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of the matching class, but for token ids and precision. Raises Refusal where no class matches."""
    family, config = family_of(config), as_exceptions(config)
    theirs: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for setting in family.settings:
        value = dotted(config, setting.ours[0])
        if setting.written is not None:
            value = setting.written(config) if callable(setting.written) else dotted(config, setting.written)
        value = value + setting.added if setting.added else value
        theirs[setting.theirs] = value if setting.names is None else setting.names.get(value, value)
        if setting.also is not None:
            theirs[setting.also] = theirs[setting.theirs]
    if family.layers is not None:
        theirs |= family.layers.write(config)
    if family.write_position is not None:
        theirs |= family.write_position(config.position)
    ids = {"bos_token_id": None, "eos_token_id": None, **family.token_ids}
    return _nested({**theirs, **family.constants, **family.only_written, **ids})


def config_from_hf(theirs: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a config.json. Raises Refusal for a class or a setting that we cannot compute."""
    try:
        return _config_from_hf(theirs)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise Refusal(
            "config.json",
            NO_VALUE,
            f"it has values that no model of type {theirs.get('model_type')!r} can have ({problem})",
            "copy or download it again",
        ) from error


def _config_from_hf(theirs: Mapping[str, Any]) -> ModelConfig:
    family = _family_for(theirs)
    theirs = family.modernised(theirs)
    for key, value in family.constants.items():
        if theirs.get(key, value) != value:
            raise Refusal(
                "config.json",
                NO_VALUE,
                f"it has {key}={theirs[key]!r}: a {family.model_type} checkpoint can be imported with {value!r} only",
                "this variant computes something else",
            )
    tangled = family.read_position is not None
    fields = {path: value for path, value in family.fixed.items() if not (tangled and path.startswith("position."))}
    for setting in family.settings:
        value = theirs.get(setting.theirs, theirs.get(setting.also or setting.theirs, setting.default))
        _check_type(setting, value)
        if setting.names is not None and (isinstance(value, str) or value in setting.names.values()):
            value = _our_word(setting.theirs, value, setting.names)
        value = value - setting.added if setting.added else value
        fields |= dict.fromkeys(setting.ours, value)
    if fields.get("ffn.d_ff", 0) is None:  # GPT-2's default
        fields["ffn.d_ff"] = 4 * fields["d_model"]
    for stack in ("", "encoder."):
        width, heads = fields.get(f"{stack}d_model", 0), fields.get(f"{stack}mixer.n_heads", 1)
        if fields.get(f"{stack}mixer.head_dim") == width // heads:
            fields[f"{stack}mixer.head_dim"] = None
    if "mixer.dt_rank" in fields and fields["mixer.dt_rank"] == -(-fields["d_model"] // 16):
        fields["mixer.dt_rank"] = None
    if "mixer.n_heads" in fields and fields.get("mixer.n_kv_heads") == fields["mixer.n_heads"]:
        fields["mixer.n_kv_heads"] = None
    if family.layers is not None:
        fields |= family.layers.read(theirs, fields)
    nested = _nested(fields)
    if family.read_position is not None:
        nested["position"] = family.read_position(theirs)
    return from_plain(ModelConfig, nested, "config.json")


def to_hf(state: Mapping[str, torch.Tensor], config: ModelConfig, *, in_memory: bool = False) -> State:
    """Our state dict under their names and in their layout, in its own precision; tied weights are stored once.

    in_memory: as the class itself holds its weights, where that differs from what it saves.
    """
    family = family_of(config)
    theirs = unfolded(_renamed(state, family, config, in_memory=in_memory), family.weight_norms)
    like = next(iter(state.values()))
    return theirs | {name: make(config).to(like.device, like.dtype) for name, make in family.computed.items()}


def _renamed(
    state: Mapping[str, torch.Tensor], family: Family, config: ModelConfig, *, in_memory: bool = False
) -> State:
    theirs: State = {}
    for weight in spelled_weights(family, config, in_memory=in_memory):
        if weight.ours[0] in config.tied_weights:
            continue
        parts = [state[name] for name in weight.ours if name in state]
        if len(parts) == len(weight.ours):
            joined = weight.of(parts[0]) if len(parts) == 1 else side_by_side(parts, weight, config)
            stored = joined.T if weight.transposed else joined
            theirs[weight.theirs] = stored[(None,) * weight.lead].contiguous()
    return theirs


@dataclasses.dataclass(frozen=True)
class Imported:
    """A checkpoint as ours: `state` is what `load_state_dict(strict=True)` takes, in the checkpoint's precision.

    new_head: names of the head's tensors that the checkpoint lacks, newly initialized. left: unused ones of the checkpoint.
    """

    config: ModelConfig
    state: State
    new_head: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def from_hf(theirs_config: Mapping[str, Any], theirs: Mapping[str, torch.Tensor]) -> tuple[ModelConfig, State]:
    """(ModelConfig, state dict) of a checkpoint. Raises Refusal as `import_checkpoint` does, for a missing head too."""
    checkpoint = import_checkpoint(theirs_config, theirs)
    return checkpoint.config, checkpoint.state


def import_checkpoint(
    theirs_config: Mapping[str, Any], theirs: Mapping[str, torch.Tensor], *, head_seed: int | None = None
) -> Imported:
    """A checkpoint as ours; with `head_seed`, a head that it lacks altogether (BertModel, LlamaModel) is initialized.

    Raises Refusal listing every tensor that is missing, not expected, or of another shape.
    """
    config = config_from_hf(theirs_config)
    family = _family_for(theirs_config)
    own = build_model(config, device="meta").state_dict()
    theirs = stored_tensors = folded(theirs)
    in_memory = _is_in_memory(family, config, theirs)
    expected = _renamed(own, family, config, in_memory=in_memory)
    theirs = _without_computed(family, config, _cleaned(family, config, theirs, expected))
    theirs = _without_tied(family, config, theirs)
    missing = sorted(expected.keys() - theirs.keys())
    head_tensors = {weight.theirs for weight in family.weights if weight.ours[0].startswith("head.")} & expected.keys()
    if missing and head_seed is not None and head_tensors == {*missing}:
        dtype = next(iter(theirs.values())).dtype if theirs else torch.float32
        new_tensors = _renamed(build_model(config, seed=head_seed).state_dict(), family, config, in_memory=in_memory)
        theirs = {**theirs, **{name: new_tensors[name].to(dtype) for name in missing}}
    else:
        missing = []
    check_tensors({name: tensor.shape for name, tensor in theirs.items()}, {n: t.shape for n, t in expected.items()})
    state: State = {}
    for weight in spelled_weights(family, config, in_memory=in_memory):
        if weight.theirs in expected:
            stored = theirs[weight.theirs][(0,) * weight.lead]
            stored = stored.T if weight.transposed else stored
            if weight.expert is not None:  # a tensor of ours is put together from many
                (name,) = weight.ours
                whole = state.setdefault(name, torch.empty(own[name].shape, dtype=stored.dtype))
                weight.of(whole).copy_(stored)
                continue
            parts = _parted(stored, [own[name].shape for name in weight.ours], weight, config)
            state |= {name: part.contiguous() for name, part in zip(weight.ours, parts, strict=True)}
    state |= {name: state[source] for name, source in config.tied_weights.items()}
    left = tuple(name for name in stored_tensors if _is_ignored(name, family, config))
    return Imported(config, state, tuple(missing), left)


def check_tensors(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> None:
    """Raises Refusal that lists missing, unexpected and misshapen tensors, if there are any."""
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
        raise Refusal(
            "model",
            NO_VALUE,
            "the checkpoint's tensors do not fit its configuration",
            f"{'; '.join(listed)}. Use the config.json that belongs to these weights",
        )


def spelled_weights(family: Family, config: ModelConfig, *, in_memory: bool = False) -> list[Weight]:
    """The table with every layer and expert spelled out, each tensor once."""
    spelled: dict[str, Weight] = {}
    for weight in family.in_memory if in_memory and family.in_memory else family.weights:
        inner = weight.ours[0].split(".")[0]
        owner = getattr(config, inner) if inner in ("encoder", "tower") else config
        layers = 0 if owner is None else owner.n_layers if "{layer}" in weight.theirs else 1
        for layer in range(layers):
            ours = tuple(name.format(layer=layer) for name in weight.ours)
            for expert in range(_experts(owner, layer)) if "{expert}" in weight.theirs else (None,):
                theirs = weight.theirs.format(layer=layer, expert=expert)
                spelled[theirs] = dataclasses.replace(weight, theirs=theirs, ours=ours, expert=expert)
    return list(spelled.values())


def side_by_side(parts: Sequence[torch.Tensor], weight: Weight, config: ModelConfig) -> torch.Tensor:
    """Theirs of ours, along the output axis: one after the other, or group by group."""
    groups = 1 if weight.groups is None else dotted(config, weight.groups)
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def _parted(stored: torch.Tensor, shapes: list[torch.Size], weight: Weight, config: ModelConfig) -> list[torch.Tensor]:
    """Ours of theirs, the inverse of `side_by_side`."""
    if len(shapes) == 1:
        return [stored]
    groups = 1 if weight.groups is None else dotted(config, weight.groups)
    parts = stored.unflatten(0, (groups, -1)).split([shape[0] // groups for shape in shapes], dim=1)
    return [part.flatten(0, 1) for part in parts]


def as_exceptions(config: ModelConfig) -> ModelConfig:
    """The same model spelled as one kind of layer, that with experts if there is one, and numbered exceptions; its
    encoder too."""
    rule = next((layer for layer in config.layers if layer.ffn.routes), config.layers[0])
    exceptions = [
        LayerChange(
            every=config.n_layers,
            first=number,
            mixer=None if layer.mixer == rule.mixer else layer.mixer,
            ffn=None if layer.ffn == rule.ffn else layer.ffn,
        )
        for number, layer in enumerate(config.layers)
        if layer != rule
    ]
    encoder = None if config.encoder is None else as_exceptions(config.encoder)
    return dataclasses.replace(config, mixer=rule.mixer, ffn=rule.ffn, pattern=tuple(exceptions), encoder=encoder)


def _experts(owner: ModelConfig | None, layer: int) -> int:
    return 0 if owner is None else owner.layers[layer].ffn.experts


def _is_in_memory(family: Family, config: ModelConfig, theirs: Mapping[str, torch.Tensor]) -> bool:
    """Whether the tensors have a name that only the class itself gives, with or without its prefix."""
    stored, held = ({w.theirs for w in spelled_weights(family, config, in_memory=m)} for m in (False, True))
    return any(name in theirs or name.removeprefix(family.base_prefix) in theirs for name in held - stored)


def _differences(config: ModelConfig, family: Family) -> list[str]:
    said = {path.split(".")[0] for path in family.fixed if path not in GRANTED}  # of a tower, its parts
    fixed = {path: value for path, value in GRANTED.items() if path not in said} | dict(family.fixed)
    absent = {path for path in GRANTED if path not in family.fixed and not has_field(config, path)}
    wrong = [
        f"{path}={value!r}" for path, value in fixed.items() if dotted(config, path) != value and path not in absent
    ]
    for setting in family.settings:
        values = {path: dotted(config, path) for path in setting.ours}
        if len(set(values.values())) > 1:
            wrong.append(f"{' and '.join(values)} equal")
    wrong += [f"{path} set" for path in family.required if not dotted(config, path)]
    wrong += family.faults(config)
    if family.layers is not None and not wrong:
        wrong += family.layers.faults(config)
    heads = dotted(config, "mixer.n_heads")
    if family.heads_divide_width and heads is not None and config.d_model % heads:
        wrong.append("d_model a multiple of mixer.n_heads")
    return wrong


def _family_for(theirs: Mapping[str, Any]) -> Family:
    """The table of a config.json's class; of several for one class, the one whose constants it has. A class that has
    none, but whose model type has, is read as the first of that type."""
    model_type, architectures = theirs.get("model_type"), theirs.get("architectures")
    if not isinstance(architectures, list | None):
        raise Refusal(
            "config.json",
            NO_VALUE,
            f"it has architectures={architectures!r}: it is a list of names",
            "copy it again",
        )
    tables = [family for family in FAMILIES if family.model_type == model_type]
    tables = [family for family in tables if family.architecture in (architectures or ())] or tables
    for family in tables:
        modern = family.modernised(theirs)
        if all(modern.get(key, value) == value for key, value in family.constants.items()):
            return family
    if tables:
        return tables[0]
    known = ", ".join(dict.fromkeys(family.model_type for family in FAMILIES))
    raise Refusal(
        "config.json", NO_VALUE, f"it has model_type {model_type!r}", f"checkpoints of {known} can be imported"
    )


def _our_word(key: str, theirs: Any, names: Mapping[Any, Any]) -> Any:
    aliases = {name: ours for ours, name in names.items()} | {"gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}
    if theirs not in aliases:
        raise Refusal(
            "config.json", NO_VALUE, f"it has {key}={theirs!r}", f"known here are {', '.join(sorted(aliases))}"
        )
    return aliases[theirs]


def _check_type(setting: Setting, value: Any) -> None:
    """Raises Refusal for a value of config.json that is not of its default's type."""
    like = setting.default
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None or setting.names is not None:
        fits, wanted = isinstance(value, str | bool | int | float | None), "a name"
    elif isinstance(like, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(like, int):
        fits, wanted = number and value == int(value), "a whole number"
    elif isinstance(like, str):
        fits, wanted = isinstance(value, str), "a name"
    elif isinstance(like, float):
        fits, wanted = number and abs(value) < float("inf"), "a number"
    elif isinstance(like, tuple):
        fits = isinstance(value, list | tuple) and all(isinstance(size, int) for size in value)
        wanted = "a list of whole numbers"
    else:
        fits, wanted = isinstance(value, bool | int | float), "a number"
    if not fits:
        raise Refusal(
            "config.json",
            NO_VALUE,
            f"it has {setting.theirs}={value!r}, and it has to be {wanted}",
            "copy or download it again",
        )


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
    family: Family, config: ModelConfig, theirs: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Under the names of today, without what is ignored, and with the prefix that checkpoints of the headless class
    lack."""
    kept = {name: tensor for name, tensor in theirs.items() if not _is_ignored(name, family, config)}
    for rule, replacement in family.renamed:
        kept = {re.sub(rule, replacement, name): tensor for name, tensor in kept.items()}
    if not any(name.startswith(family.base_prefix) for name in kept):
        kept = {name if name in expected else family.base_prefix + name: tensor for name, tensor in kept.items()}
    for weight in family.weights:
        if weight.zero_if_missing and weight.theirs in expected and weight.theirs not in kept and kept:
            dtype = next(iter(kept.values())).dtype
            kept[weight.theirs] = torch.zeros(expected[weight.theirs].shape, dtype=dtype)
    return kept


def _is_ignored(name: str, family: Family, config: ModelConfig) -> bool:
    """Whether a class does not use a stored tensor, with its prefix or as the headless class saves it."""
    rules = [rule.replace("{n_layers}", str(config.n_layers)) for rule in family.ignored]
    names = (name, name if name.startswith(family.base_prefix) else family.base_prefix + name)
    return any(re.search(rule, spelled) for rule in rules for spelled in names)


def _without_computed(
    family: Family, config: ModelConfig, theirs: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Without tensors that the configuration alone decides. Raises Refusal where one has been changed."""
    for name, make in family.computed.items():
        if name in theirs and not torch.allclose(theirs[name].float(), make(config), atol=1e-2):
            raise Refusal(
                "model",
                NO_VALUE,
                (
                    f"the checkpoint's {name} is not what its config.json implies: it was trained further, and"
                    " this package computes it"
                ),
                "use the original tensor",
            )
    return {name: tensor for name, tensor in theirs.items() if name not in family.computed}


def _without_tied(
    family: Family, config: ModelConfig, theirs: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Without the copies of a tied weight that some checkpoints store. Raises Refusal where one is no copy."""
    names = {weight.ours[0]: weight.theirs for weight in family.weights}
    copies = {names[name]: names[source] for name, source in config.tied_weights.items() if name in names}
    copies |= family.copies
    theirs = {**{source: theirs[copy] for copy, source in copies.items() if copy in theirs}, **theirs}
    for copy, source in copies.items():
        if copy in theirs and source in theirs and not torch.equal(theirs[copy], theirs[source]):
            raise Refusal(
                "config.json",
                NO_VALUE,
                f"it ties the embeddings, but {copy} differs from {source}",
                "set tie_word_embeddings to false to keep both, or remove the former tensor",
            )
    return {name: tensor for name, tensor in theirs.items() if name not in copies}
