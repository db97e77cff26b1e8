"""Adapters in the folder format of the peft package: LoRA, prompt tuning, prefix tuning."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.config import ModelConfig
from model.errors import ModelError
from model.interop.convert import State, family_of, spelled_weights
from model.interop.tables import dotted
from model.peft.lora import LORA_A, LORA_B, LoraConfig, adapted_layers


def save_adapter(state: Mapping[str, torch.Tensor], model: ModelConfig, config: LoraConfig, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json, which the `peft` package loads over the exported model.

    Where their layer is several of ours side by side (GPT-2's fused projection), its adapter is the block-diagonal one
    of all of them: rank times as many, scale the same. Raises ModelError where no Hugging Face class matches.
    """
    adapted = set(adapted_layers(state))
    tensors: State = {}
    ranks: dict[str, int] = {}
    transposed = False
    for weight in spelled_weights(family_of(model), model):
        ours = [name.removesuffix(".weight") for name in weight.ours]
        if not weight.theirs.endswith(".weight") or not adapted & set(ours):
            continue
        theirs = weight.theirs.removesuffix(".weight")
        pairs = [_pair(state, name, config) for name in ours]
        tensors[f"base_model.model.{theirs}.{LORA_A}.weight"] = torch.cat([a for a, _ in pairs]).contiguous()
        tensors[f"base_model.model.{theirs}.{LORA_B}.weight"] = torch.block_diag(*[b for _, b in pairs]).contiguous()
        ranks[theirs] = config.rank * len(ours)
        transposed |= weight.transposed
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": sorted(ranks),
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != config.rank},
        "alpha_pattern": {name: config.scale * rank for name, rank in ranks.items() if rank != config.rank},
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def save_virtual_tokens(state: Mapping[str, torch.Tensor], model: ModelConfig, folder: Path) -> None:
    """Write a learned prompt or prefix, whichever the state dict has, as the `peft` package loads it.

    Raises ModelError where there is neither.
    """
    kinds = {"frontend.tokens.prompt": "PROMPT_TUNING", "prefix.weight": "PREFIX_TUNING"}
    name = next((name for name in kinds if name in state), None)
    if name is None:
        raise ModelError(
            f"the state dict has none of {', '.join(kinds)}: attach a prompt or a prefix before saving it."
        )
    learned = state[name].detach().float().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"prompt_embeddings": learned}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    described = {
        "peft_type": kinds[name],
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": learned.shape[0],
        "num_layers": model.n_layers,
        "num_attention_heads": dotted(model, "mixer.n_heads"),
        "token_dim": model.d_model,
        "num_transformer_submodules": 1,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def _pair(state: Mapping[str, torch.Tensor], name: str, config: LoraConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one of our layers; zeros where only others that share its layer of theirs have adapters."""
    if f"{name}.{LORA_A}" in state:
        return state[f"{name}.{LORA_A}"].float(), state[f"{name}.{LORA_B}"].float()
    rows, columns = state[f"{name}.weight"].shape
    return torch.zeros(config.rank, columns), torch.zeros(rows, config.rank)
