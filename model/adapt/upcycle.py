"""From a dense model to one with experts that computes the same (Komatsuzaki et al. 2022,
https://arxiv.org/abs/2212.05055)."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from conf.refusal import NO_VALUE, Refusal
from model.build import build_model
from model.config import ModelConfig
from model.ffns.dense import FfnConfig
from model.ffns.experts.config import MoeConfig
from model.init import declarations, initial_value


def upcycled(
    state: Mapping[str, torch.Tensor], config: ModelConfig, target: ModelConfig, *, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The state dict of `target`, whose experts are all copies of the dense network that `config` has in their place.

    The weights of a token's experts sum to one and `Gather` adds equal copies without rounding, so in evaluation a logit
    changes by no more than the rounding of products: a row times a matrix is summed in an order that depends on how many
    rows and columns are multiplied at once. On one thread, in fp32 with MKL, every logit is what it was to the last bit
    (tested) where d_model and d_ff are multiples of 64 and every expert of every layer is chosen by none or by at least
    4 of a pass's tokens, of which there are at least 4; products of 1, 2 or 3 rows, and the last columns at other
    widths, are summed in another order. So many experts for few tokens, or decoding token by token, differ by rounding
    (about 1e-7 of the largest logit). Routers are drawn from `seed`, and shared experts start with a last matrix of
    zeros. An encoder may have experts too. Raises Refusal where `target` differs from `config` in more than its
    experts, or could not compute the same.
    """
    _check(config, target)
    if config.encoder is not None and target.encoder is not None:
        _check(config.encoder, target.encoder, "encoder ")
    model = build_model(target, device="meta")
    out: dict[str, torch.Tensor] = {}
    for name, parameter, declared in declarations(model):
        layer, slash, part = name.partition(".ffn.")
        if name in state:
            out[name] = state[name]
        elif part in ("experts.gate_up", "experts.up", "experts.down"):
            sources = {"gate_up": ("gate", "up"), "up": ("up",), "down": ("down",)}[part.removeprefix("experts.")]
            dense = torch.cat([state[f"{layer}{slash}{source}.weight"] for source in sources])
            out[name] = dense.expand(parameter.shape).contiguous()
        else:
            draw = "zeros" if part == "shared.down.weight" else declared.draw
            of = target.encoder if target.encoder is not None and name.startswith("encoder.") else target
            value = initial_value(
                name=name, shape=parameter.shape, draw=draw, config=of.init, n_layers=of.n_layers, seed=seed
            )
            out[name] = value.to(next(iter(state.values())).dtype)
    out |= {name: state.get(name, torch.zeros(buffer.shape)) for name, buffer in model.named_buffers()}
    out |= {name: out[source] for name, source in target.tied_weights.items()}
    return out


def _check(config: ModelConfig, target: ModelConfig, of: str = "") -> None:
    same = replace(target, ffn=config.ffn, pattern=config.pattern, init=config.init, encoder=config.encoder)
    if same != config or (target.encoder is None) != (config.encoder is None):
        raise Refusal(
            "model",
            NO_VALUE,
            "upcycling needs a target that differs from the dense model in the ffn of its layers only",
            "begin with the dense model's configuration and change `ffn` or `pattern`",
        )
    for number, (before, after) in enumerate(zip(config.layers, target.layers, strict=True)):
        dense, experts = before.ffn, after.ffn
        if after == before:
            continue
        if not isinstance(dense, FfnConfig) or not isinstance(experts, MoeConfig) or after.mixer != before.mixer:
            raise Refusal(
                "model",
                NO_VALUE,
                f"{of}layer {number} of the target has {after}",
                "upcycling puts experts where the dense model has a dense network, and changes nothing else",
            )
        wanted = FfnConfig(d_ff=experts.d_ff, activation=experts.activation, gated=experts.gated)
        if dense != wanted:
            raise Refusal(
                "model",
                NO_VALUE,
                (
                    f"{of}layer {number} has a dense {dense}, and experts of {wanted}: each expert is a copy, "
                    "so give it the same d_ff, activation and gate"
                ),
                "experts have no biases",
            )
        if not experts.router.renormalize or experts.router.scale != 1.0 or experts.capacity is not None:
            raise Refusal(
                "model",
                NO_VALUE,
                (
                    f"{of}layer {number} of the target weighs its experts with {experts.router} and capacity "
                    f"{experts.capacity}: copies add up to what they are copied from only where weights sum to"
                    " one and no token is dropped"
                ),
                "set router.renormalize, router.scale to 1 and capacity to null",
            )
