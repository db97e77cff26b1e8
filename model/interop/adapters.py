"""Adapters in the folder format of the peft package: LoRA, prompt tuning, prefix tuning."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from conf.refusal import NO_VALUE, Refusal
from model.adapt.lora import LORA_A, LORA_B, LoraConfig, adapted_layers
from model.config import ModelConfig
from model.interop.convert import State, family_of, side_by_side, spelled_weights
from model.interop.tables import Family, Weight, dotted
from model.mixers.attention import AttentionConfig

PROMPT = "frontend.tokens.prompt"


def save_adapter(state: Mapping[str, torch.Tensor], model: ModelConfig, config: LoraConfig, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json, which the `peft` package loads over the exported model.

    Where their layer is several of ours side by side (GPT-2's fused projection), its adapter is the block-diagonal one
    of all of them: rank times as many, scale the same. Raises Refusal where no Hugging Face class matches, and for
    adapted layers that peft could not load.
    """
    family, weights = family_of(model), adapted_weights(adapted_layers(state), model)
    tensors: State = {}
    ranks: dict[str, int] = {}
    transposed = False
    for weight in weights:
        ours, theirs = _layers(weight), weight.theirs.removesuffix(".weight")
        pairs = [_pair(state, name, config) for name in ours]
        blocks = torch.block_diag(*[b for _, b in pairs]).split([len(b) for _, b in pairs])
        tensors[f"base_model.model.{theirs}.{LORA_A}.weight"] = torch.cat([a for a, _ in pairs]).contiguous()
        tensors[f"base_model.model.{theirs}.{LORA_B}.weight"] = side_by_side(blocks, weight, model).contiguous()
        ranks[theirs] = config.rank * len(ours)
        transposed |= weight.transposed
    parameters = {name for name in ranks if name.rpartition(".")[2] in family.peft_parameters}
    dropout = 0.0 if parameters else config.dropout  # it matters in training only, and peft has none beside parameters
    described = {
        "peft_type": "LORA",
        "task_type": family.peft_task,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": sorted(ranks.keys() - parameters),
        **({"target_parameters": [f"{name}.weight" for name in sorted(parameters)]} if parameters else {}),
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != config.rank},
        "alpha_pattern": {name: config.scale * rank for name, rank in ranks.items() if rank != config.rank},
        "inference_mode": True,
    }
    _write(tensors, described, folder)


def adapted_weights(adapted: Sequence[str], model: ModelConfig) -> list[Weight]:
    """The weights of the Hugging Face class beside which adapters of these layers of ours stand.

    Raises Refusal where no class matches, and for layers that peft could not load: what `save_adapter` would raise
    after training, told before.
    """
    family = family_of(model)
    weights = [
        weight
        for weight in spelled_weights(family, model, in_memory=True)
        if weight.theirs.endswith(".weight")
        and weight.theirs.split(".")[-2] not in family.peft_refuses
        and not set(adapted).isdisjoint(_layers(weight))
    ]
    unwritten = set(adapted) - {name for weight in weights for name in _layers(weight)}
    if unwritten or not weights:
        raise Refusal(
            "model",
            NO_VALUE,
            (
                f"peft could not load the adapters of {', '.join(sorted(unwritten)) or 'no layer'} over "
                f"{family.architecture}"
            ),
            "leave these out of lora.targets, or write the whole model with save_pretrained(merged(state, config))",
        )
    return weights


def _layers(weight: Weight) -> list[str]:
    """Our layers whose weights are in that one."""
    return [name.removesuffix(".weight") for name in weight.ours]


def save_virtual_tokens(state: Mapping[str, torch.Tensor], model: ModelConfig, folder: Path) -> None:
    """Write a learned prompt or prefix, whichever the state dict has, as the `peft` package loads it.

    Raises Refusal where there is neither, no Hugging Face class matches, or peft has no task for it.
    """
    kinds = {PROMPT: "PROMPT_TUNING", f"encoder.{PROMPT}": "PROMPT_TUNING", "prefix.weight": "PREFIX_TUNING"}
    name = next((name for name in kinds if name in state), None)
    if name is None:
        raise Refusal(
            "model",
            NO_VALUE,
            f"the state dict has none of {', '.join(kinds)}",
            "attach a prompt or a prefix before saving it",
        )
    family = family_of(model)
    if family.peft_task is None:
        raise Refusal(
            "model",
            NO_VALUE,
            f"{kinds[name]} over {family.architecture}: peft puts virtual tokens before no text of this class",
            "adapt it with lora, or keep trained_state(model)",
        )
    learned, layers = state[name].detach().float().contiguous(), model.n_layers
    heads, width = dotted(model, "mixer.n_heads") or 1, model.d_model
    if kinds[name] == "PREFIX_TUNING":
        learned, layers, heads, width = _peft_prefix(learned, model, family)
    described = {
        "peft_type": kinds[name],
        "task_type": family.peft_task,
        "num_virtual_tokens": learned.shape[0],
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": width,
        "num_transformer_submodules": 2 if kinds[name] == "PREFIX_TUNING" and model.encoder is not None else 1,
        "inference_mode": True,
    }
    _write({"prompt_embeddings": learned}, described, folder)


def _peft_prefix(learned: torch.Tensor, model: ModelConfig, family: Family) -> tuple[torch.Tensor, int, int, int]:
    """A prefix as peft lays it out, and what it calls num_layers, num_attention_heads and token_dim.

    Before a decoder with an encoder peft lays the prefix out twice and gives layer i the keys and values of layer 2i,
    taking those of 2i + 1 for its attention to the encoder, where they are dropped: there ours have zeros between them.
    """
    mixer = model.layers[0].mixer
    assert isinstance(mixer, AttentionConfig)
    heads, channels, layers = mixer.kv_heads, mixer.channels(model.d_model), model.n_layers
    whole = learned.view(len(learned), layers, 2, heads, channels)
    if family.caches_every_head:
        whole = whole.repeat_interleave(mixer.n_heads // heads, dim=3)
        heads = mixer.n_heads
    if model.encoder is not None:
        whole = torch.stack((whole, torch.zeros_like(whole)), dim=2)
        layers *= 2
    return whole.reshape(len(learned), -1).contiguous(), layers, heads, heads * channels


def _write(tensors: State, described: Mapping[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def _pair(state: Mapping[str, torch.Tensor], name: str, config: LoraConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one of our layers; zeros where only others that share its layer of theirs have adapters."""
    if f"{name}.{LORA_A}" in state:
        return state[f"{name}.{LORA_A}"].float(), state[f"{name}.{LORA_B}"].float()
    rows, columns = state[f"{name}.weight"].shape
    return torch.zeros(config.rank, columns), torch.zeros(rows, config.rank)
