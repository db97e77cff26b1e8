"""What several tables share: their words for activations, and rotary positions in both of their spellings."""

from collections.abc import Mapping
from typing import Any

from conf.refusal import NO_VALUE, Refusal
from model.frontends.text import TokenFrontendConfig
from model.interop.tables import Weight
from model.positions.base import PositionConfig
from model.positions.rope import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling

OURS = "stack.layers.{layer}"
"""A layer of ours in a key map."""

DECODER = {
    "causal": True,
    "encoder": None,
    "frontend": TokenFrontendConfig(),
    "head.kind": "language",
    "head.bias": False,
    "head.transform": None,
    "head.scale_input": False,
    "mixer.scaled": True,
}
"""What `fixed` says of a plain decoder over tokens."""

GRANTED = {"tower": None, "mixer.k_bias": None, "mixer.scaled": True, "encoder.mixer.k_bias": None}
"""What `fixed` says of every class whose table does not say otherwise."""

ACTIVATION_NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "relu": "relu",
    "relu_squared": "relu2",
    "quick_gelu": "quick_gelu",
}


def pairs(names: Mapping[str, str]) -> tuple[Weight, ...]:
    """Weight and bias of every layer of theirs, which is ours under the other name."""
    return tuple(
        Weight(f"{theirs}.{part}", (f"{ours}.{part}",)) for theirs, ours in names.items() for part in ("weight", "bias")
    )


def write_rope(position: PositionConfig) -> dict[str, Any]:
    """Both spellings: `rope_parameters` of transformers 5 and the older `rope_theta` with `rope_scaling`."""
    assert isinstance(position, RopeConfig)
    scaling: dict[str, Any] | None = None
    if isinstance(position.scaling, LinearScaling):
        scaling = {"rope_type": "linear", "factor": position.scaling.factor}
    elif isinstance(position.scaling, Llama3Scaling):
        scaling = {
            "rope_type": "llama3",
            "factor": position.scaling.factor,
            "low_freq_factor": position.scaling.low_freq_factor,
            "high_freq_factor": position.scaling.high_freq_factor,
            "original_max_position_embeddings": position.scaling.original_max_seq_len,
        }
    elif isinstance(position.scaling, YarnScaling):
        chosen = position.scaling
        scaling = {
            "rope_type": "yarn",
            "factor": chosen.factor,
            "beta_fast": chosen.beta_fast,
            "beta_slow": chosen.beta_slow,
            "original_max_position_embeddings": chosen.original_max_seq_len,
            **({"mscale": chosen.mscale} if chosen.mscale else {}),
            **({"mscale_all_dim": chosen.mscale_all} if chosen.mscale_all else {}),
        }
    parameters = {"rope_theta": position.theta, **(scaling or {"rope_type": "default"})}
    return {"rope_parameters": parameters, "rope_theta": position.theta, "rope_scaling": scaling}


def read_rope(theirs: Mapping[str, Any]) -> PositionConfig:
    """The rotary positions that a config.json asks for. Raises Refusal for a scaling that is not known here."""
    parameters = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta", theirs.get("rope_theta") or 10000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling=LinearScaling(factor=float(parameters["factor"])))
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_seq_len=int(parameters["original_max_position_embeddings"]),
        )
        return RopeConfig(theta=theta, scaling=scaling)
    plain = parameters.get("attention_factor") is None and parameters.get("truncate") is not False
    if kind == "yarn" and plain and parameters.keys() >= {"factor", "original_max_position_embeddings"}:
        return RopeConfig(theta=theta, scaling=_read_yarn(parameters))
    raise Refusal(
        "config.json",
        NO_VALUE,
        (
            f"it has rope_type {kind!r} with {dict(parameters)}: rotary positions can be "
            "imported plain or scaled by `linear`, `llama3` or `yarn`, this with its factor, without "
            "attention_factor, truncated"
        ),
        "convert it first",
    )


def _read_yarn(parameters: Mapping[str, Any]) -> YarnScaling:
    return YarnScaling(
        factor=float(parameters["factor"]),
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        original_max_seq_len=int(parameters["original_max_position_embeddings"]),
        mscale=float(parameters.get("mscale") or 0),
        mscale_all=float(parameters.get("mscale_all_dim") or 0),
    )
