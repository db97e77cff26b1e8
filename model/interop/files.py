"""Checkpoint folders: safetensors and config.json, readable by this package and by transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from conf.refusal import NO_VALUE, Refusal
from model.build import build_model
from model.config import ModelConfig
from model.interop.convert import (
    Imported,
    State,
    check_tensors,
    config_from_hf,
    family_of,
    hf_config,
    import_checkpoint,
    to_hf,
)
from model.interop.native import MODEL_TYPE, config_from_native, native_config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def save_pretrained(
    state: Mapping[str, torch.Tensor],
    config: ModelConfig,
    directory: Path,
    *,
    extra: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config.json and safetensors of a model's state dict, each tensor in its own precision.

    The names and layout are those of the matching Hugging Face class, or ours where there is none (`family_of` tells).
    extra: further keys of config.json, such as bos_token_id and eos_token_id. Raises Refusal, and writes nothing, for
    a state dict that is not the model's: with adapters, quantized, or not whole.
    """
    _check_state(state, config)
    directory.mkdir(parents=True, exist_ok=True)
    if has_hf_class(config):
        described, tensors = hf_config(config), to_hf(state, config)
    else:
        tied = config.tied_weights
        described = native_config(config)
        tensors = {name: tensor.contiguous() for name, tensor in state.items() if name not in tied}
    precision = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    _write_json(directory / "config.json", {**described, "dtype": precision, "torch_dtype": precision, **(extra or {})})
    _write_tensors(tensors, directory, max_shard_bytes)


def _check_state(state: Mapping[str, torch.Tensor], config: ModelConfig) -> None:
    """Raise Refusal where a tensor would not be written, or is not there to be."""
    expected = build_model(config, device="meta").state_dict().keys()
    strange, missing = sorted(state.keys() - expected), sorted(expected - state.keys() - config.tied_weights.keys())
    told = [
        f"{len(names)} {what} ({', '.join(names[:4])}{', …' if names[4:] else ''})"
        for names, what in ((strange, "tensors that the model's configuration does not have"), (missing, "missing"))
        if names
    ]
    if told:
        raise Refusal(
            "model",
            NO_VALUE,
            (
                f"the state dict has {' and '.join(told)}: a checkpoint is the whole model and nothing "
                "else. With adapters save merged(state, lora), or the adapter alone by save_adapter"
            ),
            "save before quantize()",
        )


def load_pretrained(directory: Path) -> tuple[ModelConfig, State]:
    """(ModelConfig, state dict) of a folder written by `save_pretrained` or by transformers.

    Raises Refusal for a folder without safetensors (pickles are never opened), a damaged file, or tensors that do
    not fit the configuration.
    """
    checkpoint = load_imported(directory)
    return checkpoint.config, checkpoint.state


def load_imported(directory: Path, *, head_seed: int | None = None) -> Imported:
    """`load_pretrained`, with the names of new and unused tensors: see `import_checkpoint`."""
    described = _read_json(directory / "config.json")
    tensors = _read_tensors(directory)
    if described.get("model_type") != MODEL_TYPE:
        return import_checkpoint(described, tensors, head_seed=head_seed)
    config = config_from_native(described)
    expected = build_model(config, device="meta").state_dict()
    tensors |= {name: tensors[source] for name, source in config.tied_weights.items() if source in tensors}
    check_tensors({n: t.shape for n, t in tensors.items()}, {n: t.shape for n, t in expected.items()})
    return Imported(config, tensors)


def read_config(directory: Path) -> ModelConfig:
    """The ModelConfig of a checkpoint folder, from its config.json alone. Raises Refusal as `load_pretrained` does."""
    described = _read_json(directory / "config.json")
    return config_from_native(described) if described.get("model_type") == MODEL_TYPE else config_from_hf(described)


def checkpoint_files(directory: Path) -> list[Path]:
    """What `load_pretrained` reads: config.json, the index of shards if there is one, the safetensors.

    Raises Refusal where one is missing, or where there are pickles only.
    """
    files = [directory / "config.json", *([directory / INDEX] if (directory / INDEX).exists() else [])]
    files += [directory / name for name in _shards(directory)]
    for file in files:
        if not file.is_file():
            raise Refusal(
                file, NO_VALUE, "it does not exist, so the checkpoint is not complete", "copy or download it again"
            )
    return files


def has_hf_class(config: ModelConfig) -> bool:
    """Whether a Hugging Face class computes this model, so that `save_pretrained` writes what transformers loads."""
    try:
        family_of(config)
    except Refusal:
        return False
    return True


def _write_tensors(tensors: State, directory: Path, max_shard_bytes: int) -> None:
    shards: list[State] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor.detach().cpu()
        filled += size
    if len(shards) == 1:
        save_file(shards[0], directory / WEIGHTS, metadata={"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _shards(directory: Path) -> list[str]:
    """Names of the files with tensors."""
    if (directory / INDEX).exists():
        places = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(_is_name(file) for file in places.values()):
            raise Refusal(
                directory / INDEX,
                NO_VALUE,
                "it has no weight_map of names of files beside it",
                "copy or download it again",
            )
        return sorted(set(places.values()))
    if (directory / WEIGHTS).exists():
        return [WEIGHTS]
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    found = f"only {', '.join(pickles)}" if pickles else "no weights"
    raise Refusal(
        directory,
        NO_VALUE,
        (
            f"it holds {found}: weights are read from {WEIGHTS} (or its index of shards), "
            "because opening a pickle runs whatever code is in it"
        ),
        "convert the checkpoint with save_pretrained(safe_serialization=True)",
    )


def _is_name(file: Any) -> bool:
    return isinstance(file, str) and Path(file).name == file


def _read_tensors(directory: Path) -> State:
    tensors: State = {}
    for file in _shards(directory):
        try:
            tensors |= load_file(directory / file)
        except (SafetensorError, OSError) as error:
            raise Refusal(
                directory / file,
                NO_VALUE,
                f"it cannot be read as safetensors ({error}): missing, cut short or damaged",
                "copy or download it again",
            ) from error
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():  # opening a FIFO would block
        raise Refusal(path, NO_VALUE, "no plain file", "copy or download it again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Refusal(
            path,
            NO_VALUE,
            f"it does not exist: a checkpoint is a folder with config.json and {WEIGHTS}",
            "point at that folder",
        ) from error
    except (ValueError, RecursionError) as error:
        raise Refusal(path, NO_VALUE, f"not valid JSON ({error})", "copy or download it again") from error
    if not isinstance(content, dict):
        raise Refusal(
            path, NO_VALUE, f"it holds a {type(content).__name__}, and it should be a JSON object", "copy it again"
        )
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
