"""DeepSeek-V3 (https://arxiv.org/abs/2412.19437): latent attention, dense layers first, then narrow experts chosen within
groups beside one that all tokens pass."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.config import LayerChange, ModelConfig
from model.ffns.dense import FfnConfig
from model.ffns.experts.config import MoeConfig
from model.interop.families.common import DECODER, OURS, read_rope, write_rope
from model.interop.families.llama import LLAMA_SETTINGS
from model.interop.families.mixtral import IN_MEMORY, stored_experts
from model.interop.tables import Family, LayerTable, Setting, Weight
from model.positions.base import PositionConfig
from model.positions.rope import RopeConfig

_THEIRS = "model.layers.{layer}"

_MATRICES = {
    "self_attn.q_a_proj": "mixer.q_down",
    "self_attn.q_b_proj": "mixer.q_up",
    "self_attn.q_proj": "mixer.q",
    "self_attn.kv_a_proj_with_mqa": "mixer.kv_down",
    "self_attn.kv_b_proj": "mixer.kv",
    "self_attn.o_proj": "mixer.out",
    "self_attn.q_a_layernorm": "mixer.q_norm",
    "self_attn.kv_a_layernorm": "mixer.kv_norm",
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn.gate",
    "mlp.up_proj": "ffn.up",
    "mlp.down_proj": "ffn.down",
    "mlp.shared_experts.gate_proj": "ffn.shared.gate",
    "mlp.shared_experts.up_proj": "ffn.shared.up",
    "mlp.shared_experts.down_proj": "ffn.shared.down",
}

_WEIGHTS = (
    Weight("model.embed_tokens.weight", ("frontend.tokens.weight",)),
    *(
        Weight(f"{_THEIRS}.{theirs}.{part}", (f"{OURS}.{ours}.{part}",))
        for theirs, ours in _MATRICES.items()
        for part in ("weight", "bias")
    ),
    Weight(f"{_THEIRS}.mlp.gate.e_score_correction_bias", (f"{OURS}.ffn.selection_bias",)),
    Weight("model.norm.weight", ("stack.final_norm.weight",)),
    Weight("lm_head.weight", ("head.weight",)),
)

_DEFAULTS = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "max_position_embeddings": 4096,
    "num_attention_heads": 128,
}


def _dense_first(config: ModelConfig) -> int:
    """How many layers come before those with experts."""
    return next(number for number, layer in enumerate(config.layers) if layer.ffn == config.ffn)


def _faults(config: ModelConfig) -> list[str]:
    experts, first = config.ffn, _dense_first(config)
    assert isinstance(experts, MoeConfig)
    dense = {layer.ffn for layer in config.layers[:first]}
    wrong = []
    if any(layer.ffn != experts for layer in config.layers[first:]):
        wrong.append("layers without experts before all others")
    if len(dense) > 1 or any(
        ffn != FfnConfig(d_ff=getattr(ffn, "d_ff", 0), activation=experts.activation) for ffn in dense
    ):
        wrong.append("layers without experts dense, gated, unbiased and alike")
    if not experts.shared_d_ff or experts.shared_d_ff % experts.d_ff:
        wrong.append("ffn.shared_d_ff a multiple of ffn.d_ff")
    return [*wrong, *({"one mixer"} if any(layer.mixer != config.mixer for layer in config.layers) else ())]


def _write_layers(config: ModelConfig) -> dict[str, Any]:
    experts, first = config.ffn, _dense_first(config)
    assert isinstance(experts, MoeConfig)
    return {
        "first_k_dense_replace": first,
        "intermediate_size": getattr(config.layers[0].ffn, "d_ff", None),
        "n_shared_experts": experts.shared_d_ff // experts.d_ff,
        "num_key_value_heads": getattr(config.mixer, "n_heads", None),
    }


def _read_layers(theirs: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The rates of balancing are the paper's; their class does not train."""
    first = min(theirs.get("first_k_dense_replace", 3), fields["n_layers"])
    ffn = FfnConfig(d_ff=theirs.get("intermediate_size", 18432), activation=fields["ffn.activation"])
    return {
        "pattern": tuple(LayerChange(every=fields["n_layers"], first=number, ffn=ffn) for number in range(first)),
        "ffn.shared_d_ff": theirs.get("n_shared_experts", 1) * fields["ffn.d_ff"],
        "ffn.balance.bias_rate": 0.001,
        "ffn.balance.loss": 0.0001,
    }


def _write_position(position: PositionConfig) -> dict[str, Any]:
    assert isinstance(position, RopeConfig)
    return {**write_rope(position), "rope_interleave": position.interleaved}


def _read_position(theirs: Mapping[str, Any]) -> PositionConfig:
    position = read_rope(theirs)
    assert isinstance(position, RopeConfig)
    return replace(position, interleaved=bool(theirs.get("rope_interleave", True)))


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    peft_task="CAUSAL_LM",
    peft_parameters=("gate_proj", "up_proj", "down_proj"),
    base_prefix="model.",
    weights=(*_WEIGHTS, *stored_experts("mlp", "gate_proj", "up_proj", "down_proj")),
    in_memory=(*_WEIGHTS, *IN_MEMORY),
    settings=(
        *(
            replace(setting, default=_DEFAULTS.get(setting.theirs, setting.default))
            for setting in LLAMA_SETTINGS
            if setting.theirs not in ("num_key_value_heads", "head_dim", "attention_bias", "intermediate_size")
        ),
        Setting("attention_bias", ("mixer.bias",), False),
        Setting("q_lora_rank", ("mixer.q_rank",), 1536),
        Setting("kv_lora_rank", ("mixer.kv_rank",), 512),
        Setting("qk_nope_head_dim", ("mixer.plain_dim",), 128),
        Setting("qk_rope_head_dim", ("mixer.rope_dim",), 64),
        Setting("v_head_dim", ("mixer.v_dim",), 128),
        Setting("n_routed_experts", ("ffn.n_experts",), 256),
        Setting("moe_intermediate_size", ("ffn.d_ff",), 2048),
        Setting("num_experts_per_tok", ("ffn.top_k",), 8),
        Setting("n_group", ("ffn.router.groups",), 8),
        Setting("topk_group", ("ffn.router.top_groups",), 4),
        Setting("norm_topk_prob", ("ffn.router.renormalize",), True),
        Setting("routed_scaling_factor", ("ffn.router.scale",), 2.5),
    ),
    fixed={
        **{path: value for path, value in DECODER.items() if path != "mixer.scaled"},
        "layout": "pre",
        "norm.kind": "rms",
        "position.kind": "rope",
        "position.channels": None,
        "mixer.kind": "latent",
        "mixer.eps": 1e-6,
        "ffn.kind": "moe",
        "ffn.gated": True,
        "ffn.router.scores": "sigmoid",
        "ffn.router.jitter": 0.0,
        "ffn.router.second_by_chance": False,
        "ffn.capacity": None,
        "logit_soft_cap": None,
    },
    required=("ffn.balance.bias_rate",),
    only_written={"num_nextn_predict_layers": 0},
    ignored=(r"rotary_emb\.inv_freq$", r"^model\.layers\.{n_layers}\."),  # the latter predicts one token further
    layers=LayerTable(faults=_faults, write=_write_layers, read=_read_layers),
    write_position=_write_position,
    read_position=_read_position,
)
