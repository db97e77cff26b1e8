"""Prefix tuning (Li & Liang 2021, https://arxiv.org/abs/2101.00190): learned keys and values before every layer's own.

They stand in the first slots of the cache, so that an adapted model computes through one, in training too; of a model
with an encoder it is the decoder's own:

    model(tokens_BT, cache=model.new_cache(rows, tokens))
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal
from model.adapt.bottleneck import start
from model.architecture import Transformer
from model.init import Declared, Parameter, declare
from model.mixers.attention import Attention


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """Learned keys and values before those of the row."""

    kind: Literal["prefix"] = "prefix"
    """Which part this is."""
    tokens: int = 20
    """Keys and values of each head that are learned in every layer."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise Refusal("prefix.tokens", self.tokens, "at least one key and value is learned")


class Prefix(Declared):
    """A table of [tokens, layers x (keys, values) x K x C], the form of the peft package."""

    declared = declare(weight=Parameter("adapter", "weight"))

    def __init__(self, tokens: int, layers: int, kv_heads: int, channels: int, like: torch.Tensor) -> None:
        super().__init__()
        self.tokens = tokens
        self.shape = (layers, 2, kv_heads, channels)
        self.weight = nn.Parameter(like.new_empty(tokens, layers * 2 * kv_heads * channels))

    def forward(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of every layer the keys and the values, [K, S, C]."""
        layers = self.weight.view(self.tokens, *self.shape).permute(1, 2, 3, 0, 4)
        return [(keys, values) for keys, values in layers]


def attach_prefix(model: Transformer, config: PrefixConfig, *, seed: int = 0) -> list[str]:
    """Give the model a prefix and freeze everything else; the names of what is trained.

    The keys and values of a decoder that has an encoder stand before its own tokens, not before the encoder's output.
    Raises Refusal where a layer has no keys and values, or their shapes differ, and for a model that computes through
    no cache.
    """
    if not model.config.causal:
        raise Refusal(
            "model",
            NO_VALUE,
            "a prefix stands in the first slots of a cache, and model.causal is false: an encoder has none",
            "use lora, bottlenecks or prompt tuning",
        )
    mixers = [block.mixer for block in model.stack.layers]
    shapes = {(mixer.kv_heads, mixer.head_dim) for mixer in mixers if isinstance(mixer, Attention)}
    if len(shapes) != 1 or not all(isinstance(mixer, Attention) for mixer in mixers):
        raise Refusal(
            "model",
            NO_VALUE,
            (
                "a prefix is keys and values of one shape in every layer, and this model's layers have "
                f"{', '.join(sorted({type(mixer).__name__ for mixer in mixers}))}"
            ),
            "use prompt tuning, lora or bottlenecks",
        )
    if model.config.grids:
        raise Refusal(
            "model",
            NO_VALUE,
            "a prefix moves every token's slot, and a mixer of kind grid counts a text and its image from the first",
            "use prompt tuning, lora or bottlenecks",
        )
    model.requires_grad_(False)
    [(kv_heads, channels)] = shapes
    model.prefix = Prefix(config.tokens, len(mixers), kv_heads, channels, next(model.stack.parameters()))
    start(model.prefix, "prefix", seed)
    return ["prefix.weight"]
