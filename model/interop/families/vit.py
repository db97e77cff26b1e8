"""ViT (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929): a bidirectional stack over patches."""

from collections.abc import Mapping
from typing import Any

from conf.refusal import NO_VALUE, Refusal
from model.interop.families.common import ACTIVATION_NAMES, OURS, pairs
from model.interop.tables import Family, Setting, Weight


def _modernised(theirs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Classes are counted by their labels, and sides of a square may be written twice."""
    modern = {"num_labels": 2, **{key: value for key, value in theirs.items() if value is not None}}
    if "id2label" in modern:
        modern["num_labels"] = len(modern["id2label"])
    for key in ("image_size", "patch_size"):
        if isinstance(modern.get(key), list | tuple):
            height, width = modern[key]
            if height != width:
                raise Refusal(
                    "config.json",
                    NO_VALUE,
                    f"it has {key}={modern[key]!r}",
                    "images and patches must be square here",
                )
            modern[key] = height
    return modern


_STORED = {
    "encoder.layer.{layer}.layernorm_before": f"{OURS}.mixer_norm",
    "encoder.layer.{layer}.attention.attention.query": f"{OURS}.mixer.q",
    "encoder.layer.{layer}.attention.attention.key": f"{OURS}.mixer.k",
    "encoder.layer.{layer}.attention.attention.value": f"{OURS}.mixer.v",
    "encoder.layer.{layer}.attention.output.dense": f"{OURS}.mixer.out",
    "encoder.layer.{layer}.layernorm_after": f"{OURS}.ffn_norm",
    "encoder.layer.{layer}.intermediate.dense": f"{OURS}.ffn.up",
    "encoder.layer.{layer}.output.dense": f"{OURS}.ffn.down",
}
_IN_MEMORY = {
    "layers.{layer}.layernorm_before": f"{OURS}.mixer_norm",
    "layers.{layer}.attention.q_proj": f"{OURS}.mixer.q",
    "layers.{layer}.attention.k_proj": f"{OURS}.mixer.k",
    "layers.{layer}.attention.v_proj": f"{OURS}.mixer.v",
    "layers.{layer}.attention.o_proj": f"{OURS}.mixer.out",
    "layers.{layer}.layernorm_after": f"{OURS}.ffn_norm",
    "layers.{layer}.mlp.fc1": f"{OURS}.ffn.up",
    "layers.{layer}.mlp.fc2": f"{OURS}.ffn.down",
}


def _weights(prefix: str, layers: Mapping[str, str] = _STORED) -> tuple[Weight, ...]:
    return (
        Weight(f"{prefix}embeddings.cls_token", ("frontend.class_token",), lead=2),
        Weight(f"{prefix}embeddings.position_embeddings", ("frontend.positions.weight",), lead=1),
        *pairs(
            {
                f"{prefix}embeddings.patch_embeddings.projection": "frontend",
                **{f"{prefix}{theirs}": ours for theirs, ours in layers.items()},
                f"{prefix}layernorm": "stack.final_norm",
            }
        ),
    )


_SETTINGS = (
    Setting("hidden_size", ("d_model",), 768),
    Setting("num_hidden_layers", ("n_layers",), 12),
    Setting("num_attention_heads", ("mixer.n_heads",), 12),
    Setting("qkv_bias", ("mixer.qkv_bias",), True),
    Setting("intermediate_size", ("ffn.d_ff",), 3072),
    Setting("hidden_act", ("ffn.activation",), "gelu", ACTIVATION_NAMES),
    Setting("layer_norm_eps", ("norm.eps",), 1e-12),
    Setting("hidden_dropout_prob", ("dropout",), 0.0),
    Setting("image_size", ("frontend.image_size",), 224),
    Setting("patch_size", ("frontend.patch_size",), 16),
    Setting("num_channels", ("frontend.planes",), 3),
)

_FIXED = {
    "causal": False,
    "encoder": None,
    "layout": "pre",
    "pattern": (),
    "frontend.kind": "patches",
    "frontend.class_token": True,
    "frontend.bias": True,
    "frontend.norm": False,
    "norm.kind": "layer",
    "norm.bias": True,
    "position.kind": "learned",
    "position.offset": 0,
    "mixer.kind": "attention",
    "mixer.out_bias": True,
    "mixer.n_kv_heads": None,
    "mixer.head_dim": None,
    "mixer.qk_norm": False,
    "mixer.window": None,
    "ffn.kind": "dense",
    "ffn.gated": False,
    "ffn.bias": True,
}

VIT = Family(
    model_type="vit",
    architecture="ViTForImageClassification",
    base_prefix="vit.",
    weights=(*_weights("vit."), *pairs({"classifier": "head.out"})),
    in_memory=(*_weights("vit.", _IN_MEMORY), *pairs({"classifier": "head.out"})),
    settings=(*_SETTINGS, Setting("num_labels", ("head.classes",), 2)),
    fixed={**_FIXED, "head.kind": "classifier", "head.pool": "first", "head.hidden": None},
    constants={"architectures": ["ViTForImageClassification"]},
    only_written={"attention_probs_dropout_prob": 0.0},
    modernised=_modernised,
)

VIT_MODEL = Family(
    model_type="vit",
    architecture="ViTModel",
    base_prefix="",
    weights=_weights(""),
    in_memory=_weights("", _IN_MEMORY),
    settings=_SETTINGS,
    fixed={**_FIXED, "head.kind": "none"},
    constants={"architectures": ["ViTModel"]},
    only_written={"attention_probs_dropout_prob": 0.0},
    ignored=(r"^pooler\.",),
    modernised=_modernised,
)
"""Without its pooler, a dense layer on the class token: our headless model gives the features that it would read."""
