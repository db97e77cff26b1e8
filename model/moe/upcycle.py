"""From a dense model to one with experts that computes the same (Komatsuzaki et al. 2022,
https://arxiv.org/abs/2212.05055)."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from model.build import build_model
from model.config import ModelConfig
from model.errors import ModelError
from model.ffn import FfnConfig
from model.init import declarations, initial_value
from model.moe.config import MoeConfig


def upcycled(
    state: Mapping[str, torch.Tensor], config: ModelConfig, target: ModelConfig, *, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The state dict of `target`, whose experts are all copies of the dense network that `config` has in their place.

    The weights of a token's experts sum to one and `Gather` adds equal copies without rounding, so in evaluation every
    logit is what it was, to the last bit where the products are: a product's sums must not depend on which other rows and
    columns it has. On CPUs that holds in fp32 where d_model and d_ff are multiples of 64 (tested); at odd widths another
    kernel computes the edges, and logits differ by rounding. Routers are drawn from `seed`, and shared experts start with
    a last matrix of zeros. Raises ModelError where `target` differs from `config` in more than its experts, or could not
    compute the same.
    """
    _check(config, target)
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
            value = initial_value(
                name=name, shape=parameter.shape, draw=draw, config=target.init, n_layers=target.n_layers, seed=seed
            )
            out[name] = value.to(next(iter(state.values())).dtype)
    out |= {name: torch.zeros(buffer.shape) for name, buffer in model.named_buffers()}
    if target.tie_embeddings:
        out["head.weight"] = out["frontend.tokens.weight"]
    return out


def _check(config: ModelConfig, target: ModelConfig) -> None:
    if replace(target, ffn=config.ffn, pattern=config.pattern, init=config.init) != config:
        raise ModelError(
            "upcycling needs a target that differs from the dense model in the ffn of its layers only; begin with the "
            "dense model's configuration and change `ffn` or `pattern`."
        )
    for number, (before, after) in enumerate(zip(config.layers, target.layers, strict=True)):
        dense, experts = before.ffn, after.ffn
        if after == before:
            continue
        if not isinstance(dense, FfnConfig) or not isinstance(experts, MoeConfig) or after.mixer != before.mixer:
            raise ModelError(
                f"layer {number} of the target has {after}: upcycling puts experts where the dense model has a dense "
                "network, and changes nothing else."
            )
        wanted = FfnConfig(d_ff=experts.d_ff, activation=experts.activation, gated=experts.gated)
        if dense != wanted:
            raise ModelError(
                f"layer {number} has a dense {dense}, and experts of {wanted}: each expert is a copy, so give it the "
                "same d_ff, activation and gate; experts have no biases."
            )
        if not experts.router.renormalize or experts.router.scale != 1.0 or experts.capacity is not None:
            raise ModelError(
                f"layer {number} of the target weighs its experts with {experts.router} and capacity "
                f"{experts.capacity}: copies add up to what they are copied from only where weights sum to one and no "
                "token is dropped; set router.renormalize, router.scale to 1 and capacity to null."
            )
