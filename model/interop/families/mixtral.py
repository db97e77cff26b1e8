"""Mixtral (Jiang et al. 2024, https://arxiv.org/abs/2401.04088) and Qwen3-MoE: LLaMA with experts.

A saved checkpoint has a tensor for each expert; the classes of transformers 5 hold them fused. Both are read, the
former is written.
"""

from collections.abc import Mapping
from typing import Any

from model.config import LayerChange, ModelConfig
from model.ffns.dense import FfnConfig
from model.ffns.experts.config import MoeConfig
from model.interop.families.common import OURS, read_rope, write_rope
from model.interop.families.llama import LLAMA_SETTINGS, LLAMA_WEIGHTS, QWEN3
from model.interop.tables import Family, LayerTable, Setting, Weight, dotted

_THEIRS = "model.layers.{layer}"
_EXPERTS = f"{OURS}.ffn.experts"

ROUTER_FIXED = {
    "ffn.kind": "moe",
    "ffn.gated": True,
    "ffn.shared_d_ff": 0,
    "ffn.router.scores": "softmax",
    "ffn.router.scale": 1.0,
    "ffn.router.groups": 1,
    "ffn.router.second_by_chance": False,
    "ffn.balance.bias_rate": None,
    "ffn.capacity": None,
}

IN_MEMORY = (
    Weight(f"{_THEIRS}.mlp.gate.weight", (f"{OURS}.ffn.router.weight",)),
    Weight(f"{_THEIRS}.mlp.experts.gate_up_proj", (f"{_EXPERTS}.gate_up",)),
    Weight(f"{_THEIRS}.mlp.experts.down_proj", (f"{_EXPERTS}.down",)),
)


def stored_experts(block: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """The same as three matrices for each expert."""
    each = f"{_THEIRS}.{block}.experts.{{expert}}"
    return (
        Weight(f"{_THEIRS}.{block}.gate.weight", (f"{OURS}.ffn.router.weight",)),
        Weight(f"{each}.{gate}.weight", (f"{_EXPERTS}.gate_up",), part=(0, 2)),
        Weight(f"{each}.{up}.weight", (f"{_EXPERTS}.gate_up",), part=(1, 2)),
        Weight(f"{each}.{down}.weight", (f"{_EXPERTS}.down",)),
    )


def _settings(experts: Setting, d_ff: Setting, *left_out: str) -> tuple[Setting, ...]:
    return (
        *(setting for setting in LLAMA_SETTINGS if setting.theirs not in ("intermediate_size", *left_out)),
        experts,
        d_ff,
        Setting("num_experts_per_tok", ("ffn.top_k",), 2),
        Setting("router_aux_loss_coef", ("ffn.balance.loss",), 0.001),
    )


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    peft_task="CAUSAL_LM",
    base_prefix="model.",
    weights=(*LLAMA_WEIGHTS, *stored_experts("block_sparse_moe", "w1", "w3", "w2")),
    in_memory=(*LLAMA_WEIGHTS, *IN_MEMORY),
    settings=(
        *_settings(
            Setting("num_local_experts", ("ffn.n_experts",), 8),
            Setting("intermediate_size", ("ffn.d_ff",), 14336),
            "attention_bias",
        ),
        Setting("router_jitter_noise", ("ffn.router.jitter",), 0.0),
    ),
    fixed={
        "layout": "pre",
        "pattern": (),
        "norm.kind": "rms",
        "position.kind": "rope",
        "mixer.kind": "attention",
        "mixer.qkv_bias": False,
        "mixer.out_bias": False,
        "mixer.qk_norm": False,
        "ffn.router.renormalize": True,
        "logit_soft_cap": None,
        **ROUTER_FIXED,
    },
    constants={"sliding_window": None},
    write_position=write_rope,
    read_position=read_rope,
)


def _faults(config: ModelConfig) -> list[str]:
    """Qwen3-MoE's layers have the experts, or one dense network that they share the shape of."""
    assert isinstance(config.ffn, MoeConfig)
    dense = {layer.ffn for layer in config.layers if layer.ffn != config.ffn}
    activation = config.ffn.activation
    wanted = {FfnConfig(d_ff=ffn.d_ff, activation=activation) for ffn in dense if isinstance(ffn, FfnConfig)}
    wrong = [] if len(dense) <= 1 and dense == wanted else ["layers without experts dense, gated, unbiased and alike"]
    return [*wrong, *({"one mixer"} if any(layer.mixer != config.mixer for layer in config.layers) else ())]


def _write_layers(config: ModelConfig) -> dict[str, Any]:
    dense = [number for number, layer in enumerate(config.layers) if layer.ffn != config.ffn]
    d_ff = dotted(config, "ffn.d_ff") if not dense else getattr(config.layers[dense[0]].ffn, "d_ff", None)
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1, "intermediate_size": d_ff}


def _read_layers(theirs: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, tuple[LayerChange, ...]]:
    n_layers, every = fields["n_layers"], theirs.get("decoder_sparse_step", 1)
    without = set(theirs.get("mlp_only_layers") or ())
    dense = [number for number in range(n_layers) if number in without or (number + 1) % every]
    ffn = FfnConfig(d_ff=theirs.get("intermediate_size", 6144), activation=fields["ffn.activation"])
    return {"pattern": tuple(LayerChange(every=n_layers, first=number, ffn=ffn) for number in dense)}


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    peft_task="CAUSAL_LM",
    peft_parameters=("gate_proj", "up_proj", "down_proj"),
    base_prefix="model.",
    weights=(*QWEN3.weights, *stored_experts("mlp", "gate_proj", "up_proj", "down_proj")),
    in_memory=(*QWEN3.weights, *IN_MEMORY),
    settings=(
        *_settings(
            Setting("num_local_experts", ("ffn.n_experts",), 128, also="num_experts"),
            Setting("moe_intermediate_size", ("ffn.d_ff",), 768),
        ),
        Setting("norm_topk_prob", ("ffn.router.renormalize",), False),
    ),
    fixed={
        **{path: value for path, value in QWEN3.fixed.items() if path != "pattern" and not path.startswith("ffn.")},
        **ROUTER_FIXED,
        "ffn.router.jitter": 0.0,
    },
    constants={"use_sliding_window": False},
    layers=LayerTable(faults=_faults, write=_write_layers, read=_read_layers),
    write_position=write_rope,
    read_position=read_rope,
)
