"""wav2vec 2.0 (Baevski et al. 2020, https://arxiv.org/abs/2006.11477), fine-tuned to spell what it hears."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from model.interop.families.common import ACTIVATION_NAMES, OURS, pairs
from model.interop.tables import Family, Setting, Weight

_LAYER = "wav2vec2.encoder.layers.{layer}"
_CONV = "wav2vec2.feature_extractor.conv_layers"
_MOST_CONVOLUTIONS = 32


def _modernised(theirs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The mask token is there if frames or features are ever masked in their training."""
    masks = theirs.get("mask_time_prob", 0.05) > 0 or theirs.get("mask_feature_prob", 0.0) > 0
    return {**theirs, "mask_time_prob": 0.05 if masks else 0.0}


_WEIGHTS = (
    Weight("wav2vec2.masked_spec_embed", ("frontend.mask_token",)),
    *pairs(
        {
            "wav2vec2.feature_projection.layer_norm": "frontend.feature_norm",
            "wav2vec2.feature_projection.projection": "frontend.projection",
            "wav2vec2.encoder.pos_conv_embed.conv": "frontend.positional",
            f"{_LAYER}.attention.q_proj": f"{OURS}.mixer.q",
            f"{_LAYER}.attention.k_proj": f"{OURS}.mixer.k",
            f"{_LAYER}.attention.v_proj": f"{OURS}.mixer.v",
            f"{_LAYER}.attention.out_proj": f"{OURS}.mixer.out",
            f"{_LAYER}.layer_norm": f"{OURS}.mixer_norm",
            f"{_LAYER}.feed_forward.intermediate_dense": f"{OURS}.ffn.up",
            f"{_LAYER}.feed_forward.output_dense": f"{OURS}.ffn.down",
            f"{_LAYER}.final_layer_norm": f"{OURS}.ffn_norm",
        }
    ),
    *(
        weight
        for number in range(_MOST_CONVOLUTIONS)
        for weight in pairs(
            {
                f"{_CONV}.{number}.conv": f"frontend.convolutions.{number}",
                f"{_CONV}.{number}.layer_norm": f"frontend.convolutions.{number}.norm",
            }
        )
    ),
)

_CTC = pairs({"lm_head": "head"})
_BASE = pairs({"wav2vec2.encoder.layer_norm": "frontend.norm"})
_STABLE = pairs({"wav2vec2.encoder.layer_norm": "stack.final_norm"})
_CODEBOOK = (
    Weight("quantizer.codevectors", ("frontend.codebook.weight",), lead=1),
    *pairs(
        {"quantizer.weight_proj": "frontend.codebook.scores", "project_hid": "head.frames", "project_q": "head.codes"}
    ),
)

WAV2VEC2 = Family(
    model_type="wav2vec2",
    architecture="Wav2Vec2ForCTC",
    base_prefix="wav2vec2.",
    weights=(*_WEIGHTS, *_CTC, *_BASE),
    weight_norms={"wav2vec2.encoder.pos_conv_embed.conv.weight": 2},
    settings=(
        Setting("vocab_size", ("vocab_size",), 32),
        Setting("pad_token_id", ("head.blank",), 0),
        Setting("hidden_size", ("d_model",), 768),
        Setting("num_hidden_layers", ("n_layers",), 12),
        Setting("num_attention_heads", ("mixer.n_heads",), 12),
        Setting("intermediate_size", ("ffn.d_ff",), 3072),
        Setting("hidden_act", ("ffn.activation",), "gelu", ACTIVATION_NAMES),
        Setting("layer_norm_eps", ("norm.eps",), 1e-5),
        Setting("hidden_dropout", ("dropout",), 0.1),
        Setting("conv_dim", ("frontend.channels",), (512,) * 7),
        Setting("conv_kernel", ("frontend.kernels",), (10, 3, 3, 3, 3, 2, 2)),
        Setting("conv_stride", ("frontend.strides",), (5, 2, 2, 2, 2, 2, 2)),
        Setting("conv_bias", ("frontend.bias",), False),
        Setting("feat_extract_norm", ("frontend.conv_norm",), "group"),
        Setting("num_conv_pos_embeddings", ("frontend.positional_kernel",), 128),
        Setting("num_conv_pos_embedding_groups", ("frontend.positional_groups",), 16),
        Setting("mask_time_prob", ("frontend.mask_token",), 0.05, {True: 0.05, False: 0.0}),
    ),
    fixed={
        "causal": False,
        "encoder": None,
        "layout": "post",
        "pattern": (),
        "frontend.kind": "waveform",
        "frontend.norm": True,
        "frontend.codebook": None,
        "norm.kind": "layer",
        "norm.bias": True,
        "position.kind": "none",
        "mixer.kind": "attention",
        "mixer.qkv_bias": True,
        "mixer.out_bias": True,
        "mixer.n_kv_heads": None,
        "mixer.head_dim": None,
        "mixer.qk_norm": False,
        "mixer.window": None,
        "ffn.kind": "dense",
        "ffn.gated": False,
        "ffn.bias": True,
        "head.kind": "ctc",
    },
    constants={
        "architectures": ["Wav2Vec2ForCTC"],
        "do_stable_layer_norm": False,
        "feat_extract_activation": "gelu",
        "add_adapter": False,
        "adapter_attn_dim": None,
    },
    only_written={
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "final_dropout": 0.0,
        "layerdrop": 0.0,
        "mask_feature_prob": 0.0,
        "ctc_loss_reduction": "sum",
    },
    modernised=_modernised,
)
"""Base models: norms after the sum, one more before the first layer."""

WAV2VEC2_STABLE = dataclasses.replace(
    WAV2VEC2,
    weights=(*_WEIGHTS, *_CTC, *_STABLE),
    fixed={**WAV2VEC2.fixed, "layout": "pre", "frontend.norm": False},
    constants={**WAV2VEC2.constants, "do_stable_layer_norm": True},
)
"""Large models: norms before each branch."""

WAV2VEC2_PRETRAINING = dataclasses.replace(
    WAV2VEC2,
    architecture="Wav2Vec2ForPreTraining",
    weights=(*_WEIGHTS, *_CODEBOOK, *_BASE),
    settings=(
        *(setting for setting in WAV2VEC2.settings if setting.theirs not in ("vocab_size", "pad_token_id")),
        Setting("num_codevector_groups", ("frontend.codebook.groups",), 2),
        Setting("num_codevectors_per_group", ("frontend.codebook.entries",), 320),
        Setting("codevector_dim", ("frontend.codebook.width", "head.codes"), 256),
        Setting("proj_codevector_dim", ("head.width",), 256),
        Setting("contrastive_logits_temperature", ("head.temperature",), 0.1),
        Setting("diversity_loss_weight", ("head.diversity",), 0.1),
    ),
    fixed={
        **{path: value for path, value in WAV2VEC2.fixed.items() if path != "frontend.codebook"},
        "head.kind": "distractors",
    },
    constants={**WAV2VEC2.constants, "architectures": ["Wav2Vec2ForPreTraining"]},
    only_written={**WAV2VEC2.only_written, "feat_quantizer_dropout": 0.0},
)

WAV2VEC2_PRETRAINING_STABLE = dataclasses.replace(
    WAV2VEC2_PRETRAINING,
    weights=(*_WEIGHTS, *_CODEBOOK, *_STABLE),
    fixed={**WAV2VEC2_PRETRAINING.fixed, "layout": "pre", "frontend.norm": False},
    constants={**WAV2VEC2_PRETRAINING.constants, "do_stable_layer_norm": True},
)

WAV2VEC2_KIN = (WAV2VEC2, WAV2VEC2_STABLE, WAV2VEC2_PRETRAINING, WAV2VEC2_PRETRAINING_STABLE)
