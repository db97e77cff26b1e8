"""Switch Transformers (Fedus et al. 2021, https://arxiv.org/abs/2101.03961): T5 with experts in every k-th layer of both
stacks."""

from collections.abc import Mapping
from typing import Any

from model.config import LayerChange, ModelConfig
from model.ffns.dense import FfnConfig
from model.ffns.experts.config import MoeConfig
from model.interop.families.common import ACTIVATION_NAMES
from model.interop.families.seq2seq import both, twice
from model.interop.families.t5 import T5_COPIES, T5_FIXED, T5_IDS, T5_IGNORED, T5_SETTINGS, t5_weights
from model.interop.tables import Family, LayerTable, Setting


def _is_sparse(layer: int, every: int) -> bool:
    """Whether the class has experts there: in layers 1, k + 1, 2k + 1 …, or in all."""
    return every == 1 or (every > 1 and layer % every == 1)


def _step(stack: ModelConfig) -> int | None:
    """The k for which the class has experts where this stack has; the largest, which it derives itself most often."""
    wanted = [layer.ffn.routes for layer in stack.layers]
    steps = (
        every
        for every in range(stack.n_layers, 0, -1)
        if [_is_sparse(number, every) for number in range(stack.n_layers)] == wanted
    )
    return next(steps, None)


def _stacks(config: ModelConfig) -> dict[str, ModelConfig]:
    assert config.encoder is not None
    return {"encoder": config.encoder, "decoder": config}


def _faults(config: ModelConfig) -> list[str]:
    wrong: list[str] = []
    for name, stack in _stacks(config).items():
        experts = stack.ffn
        assert isinstance(experts, MoeConfig)
        dense = FfnConfig(d_ff=experts.d_ff, activation=experts.activation, gated=False)
        if any(layer.ffn not in (experts, dense) for layer in stack.layers):
            wrong.append(
                f"layers of the {name} without experts dense, without gate or biases, and as wide as an expert"
            )
        elif _step(stack) is None:
            wrong.append(f"experts in layers 1, k + 1, 2k + 1 … of the {name} or in all of them")
        if any(layer.mixer != stack.mixer for layer in stack.layers):
            wrong.append(f"one mixer in the {name}")
    return wrong


def _write_layers(config: ModelConfig) -> dict[str, Any]:
    """The k of each stack, and how many layers have experts, of which the class derives a k of its own first."""
    keys: dict[str, Any] = {}
    for name, stack in _stacks(config).items():
        step = _step(stack)
        assert step is not None
        keys |= {f"{name}_sparse_step": step, f"num_sparse_{name}_layers": stack.n_layers // step}
    return keys


def _read_layers(theirs: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, tuple[LayerChange, ...]]:
    dense = FfnConfig(d_ff=fields["ffn.d_ff"], activation=fields["ffn.activation"], gated=False)
    patterns = {}
    for name, prefix in (("encoder", "encoder."), ("decoder", "")):
        n_layers = fields[f"{prefix}n_layers"]
        sparse = theirs.get(f"num_sparse_{name}_layers", 3)
        every = theirs.get(f"{name}_sparse_step", n_layers // sparse if sparse > 0 else n_layers)
        without = [number for number in range(n_layers) if not _is_sparse(number, every)]
        patterns[f"{prefix}pattern"] = tuple(LayerChange(every=n_layers, first=number, ffn=dense) for number in without)
    return patterns


def _modernised(theirs: Mapping[str, Any]) -> Mapping[str, Any]:
    """As many layers in the decoder, where it says null."""
    if theirs.get("num_decoder_layers", 12) is None:
        return {**theirs, "num_decoder_layers": theirs.get("num_layers", 12)}
    return theirs


_DEFAULTS = {"d_model": 768, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12}

SWITCH = Family(
    model_type="switch_transformers",
    architecture="SwitchTransformersForConditionalGeneration",
    peft_task="SEQ_2_SEQ_LM",
    base_prefix="",
    weights=t5_weights(
        {
            "mlp.wi.weight": "up.weight",
            "mlp.wo.weight": "down.weight",
            "mlp.router.classifier.weight": "router.weight",
            "mlp.experts.expert_{expert}.wi.weight": "experts.up",
            "mlp.experts.expert_{expert}.wo.weight": "experts.down",
        }
    ),
    settings=(
        *(
            Setting(known.theirs, known.ours, _DEFAULTS.get(known.theirs, known.default), written=known.written)
            for known in T5_SETTINGS
        ),
        Setting("dense_act_fn", twice("ffn.activation"), "relu", ACTIVATION_NAMES),
        Setting("num_experts", twice("ffn.n_experts"), 8),
        Setting("expert_capacity", twice("ffn.capacity.tokens"), 64),
        Setting("router_jitter_noise", twice("ffn.router.jitter"), 0.01),
        Setting("router_aux_loss_coef", twice("ffn.balance.loss"), 0.001),
        Setting("router_z_loss_coef", twice("ffn.balance.z_loss"), 0.001),
    ),
    fixed={
        **{path: value for path, value in T5_FIXED.items() if path not in twice("pattern")},
        "tie_embeddings": True,
        "head.scale_input": True,
        **both({"ffn.kind": "moe", "ffn.top_k": 1, "ffn.gated": False, "ffn.shared_d_ff": 0}),
        **both({"ffn.router.scores": "softmax", "ffn.router.renormalize": False, "ffn.router.scale": 1.0}),
        **both({"ffn.router.groups": 1, "ffn.router.second_by_chance": False, "ffn.balance.bias_rate": None}),
    },
    required=twice("ffn.capacity.tokens"),
    # Untied, the class has a table of its own in each stack.
    constants={"tie_word_embeddings": True, "router_bias": False, "router_dtype": "float32"},
    only_written={"is_encoder_decoder": True},
    ignored=T5_IGNORED,
    copies=T5_COPIES,
    token_ids=T5_IDS,
    layers=LayerTable(faults=_faults, write=_write_layers, read=_read_layers),
    modernised=_modernised,
)
