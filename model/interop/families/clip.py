"""CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020): a text tower, an image tower, one space for both."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from model.config import ModelConfig
from model.frontends.text import TokenFrontendConfig
from model.interop.families.common import ACTIVATION_NAMES, OURS, pairs
from model.interop.tables import Family, Setting, Weight

LEGACY_END = 2
"""What older text configurations call the end token; there the token of the largest number is meant."""


def _modernised(theirs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Nested keys by dotted paths; published checkpoints leave most of them out."""
    flat = {"architectures": ["CLIPModel"], **dict(_flat(theirs, ""))}
    return {"text_config.eos_token_id": 49407, **{key: value for key, value in flat.items() if value is not None}}


def _flat(theirs: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in theirs.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _layers(theirs: str, ours: str) -> tuple[Weight, ...]:
    layer = f"{theirs}.encoder.layers.{{layer}}"
    return pairs(
        {
            f"{layer}.layer_norm1": f"{ours}{OURS}.mixer_norm",
            f"{layer}.self_attn.q_proj": f"{ours}{OURS}.mixer.q",
            f"{layer}.self_attn.k_proj": f"{ours}{OURS}.mixer.k",
            f"{layer}.self_attn.v_proj": f"{ours}{OURS}.mixer.v",
            f"{layer}.self_attn.out_proj": f"{ours}{OURS}.mixer.out",
            f"{layer}.layer_norm2": f"{ours}{OURS}.ffn_norm",
            f"{layer}.mlp.fc1": f"{ours}{OURS}.ffn.up",
            f"{layer}.mlp.fc2": f"{ours}{OURS}.ffn.down",
        }
    )


def _settings(theirs: str, ours: str, width: int, heads: int) -> tuple[Setting, ...]:
    return (
        Setting(f"{theirs}.hidden_size", (f"{ours}d_model",), width),
        Setting(f"{theirs}.num_hidden_layers", (f"{ours}n_layers",), 12),
        Setting(f"{theirs}.num_attention_heads", (f"{ours}mixer.n_heads",), heads),
        Setting(f"{theirs}.intermediate_size", (f"{ours}ffn.d_ff",), 4 * width),
        Setting(f"{theirs}.hidden_act", (f"{ours}ffn.activation",), "quick_gelu", ACTIVATION_NAMES),
        Setting(f"{theirs}.layer_norm_eps", (f"{ours}norm.eps",), 1e-5),
    )


_BLOCKS = {
    "encoder": None,
    "layout": "pre",
    "pattern": (),
    "dropout": 0.0,
    "norm.kind": "layer",
    "norm.bias": True,
    "position.kind": "learned",
    "position.offset": 0,
    "mixer.kind": "attention",
    "mixer.qkv_bias": True,
    "mixer.k_bias": None,
    "mixer.out_bias": True,
    "mixer.scaled": True,
    "mixer.n_kv_heads": None,
    "mixer.head_dim": None,
    "mixer.qk_norm": False,
    "mixer.window": None,
    "ffn.kind": "dense",
    "ffn.gated": False,
    "ffn.bias": True,
    "head.kind": "embedding",
}


def _faults(config: ModelConfig) -> list[str]:
    """Their class reads the end token 2 as the largest number."""
    return ["head.pool='largest' with end token 2"] if getattr(config.head, "end_token", None) == LEGACY_END else []


CLIP = Family(
    model_type="clip",
    architecture="CLIPModel",
    base_prefix="",
    weights=(
        Weight("logit_scale", ("head.log_scale",)),
        Weight("text_projection.weight", ("head.projection.weight",)),
        Weight("visual_projection.weight", ("tower.head.projection.weight",)),
        Weight("text_model.embeddings.token_embedding.weight", ("frontend.tokens.weight",)),
        Weight("text_model.embeddings.position_embedding.weight", ("frontend.positions.weight",)),
        Weight("vision_model.embeddings.class_embedding", ("tower.frontend.class_token",)),
        Weight("vision_model.embeddings.patch_embedding.weight", ("tower.frontend.weight",)),
        Weight("vision_model.embeddings.position_embedding.weight", ("tower.frontend.positions.weight",)),
        *_layers("text_model", ""),
        *_layers("vision_model", "tower."),
        *pairs(
            {
                "text_model.final_layer_norm": "stack.final_norm",
                "vision_model.pre_layrnorm": "tower.frontend.norm",
                "vision_model.post_layernorm": "tower.stack.final_norm",
            }
        ),
    ),
    settings=(
        *_settings("text_config", "", 512, 8),
        *_settings("vision_config", "tower.", 768, 12),
        Setting("text_config.vocab_size", ("vocab_size",), 49408),
        Setting("text_config.max_position_embeddings", ("max_seq_len",), 77),
        Setting("text_config.eos_token_id", ("head.end_token",), 49407),
        Setting("vision_config.image_size", ("tower.frontend.image_size",), 224),
        Setting("vision_config.patch_size", ("tower.frontend.patch_size",), 32),
        Setting("vision_config.num_channels", ("tower.frontend.planes",), 3),
        Setting("projection_dim", ("head.width", "tower.head.width"), 512),
    ),
    fixed={
        **_BLOCKS,
        **{f"tower.{path}": value for path, value in _BLOCKS.items()},
        "causal": True,
        "frontend": TokenFrontendConfig(),
        "head.pool": "end",
        "head.contrast": True,
        "tower.causal": False,
        "tower.frontend.kind": "patches",
        "tower.frontend.class_token": True,
        "tower.frontend.bias": False,
        "tower.frontend.norm": True,
        "tower.head.pool": "first",
    },
    constants={"architectures": ["CLIPModel"]},
    only_written={"text_config.attention_dropout": 0.0, "vision_config.attention_dropout": 0.0},
    ignored=(r"embeddings\.position_ids$",),
    modernised=_modernised,
    faults=_faults,
)

CLIP_LEGACY = dataclasses.replace(
    CLIP,
    settings=tuple(setting for setting in CLIP.settings if setting.theirs != "text_config.eos_token_id"),
    fixed={**CLIP.fixed, "head.pool": "largest", "head.end_token": None},
    constants={**CLIP.constants, "text_config.eos_token_id": LEGACY_END},
)
"""The first checkpoints, OpenAI's own among them."""
