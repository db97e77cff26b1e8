"""A learned bias on scores by distance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal, field
from model.init import Parameter, declare
from model.positions.base import Distances, PositionConfig

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class RelativePositionConfig(PositionConfig):
    """A learned bias on the scores for each head and each bucket of distances, shared by all layers (Raffel et al. 2020,
    https://arxiv.org/abs/1910.10683, section 2.1).
    """

    bias: ClassVar[Literal["learned", "fixed"] | None] = "learned"

    kind: Literal["relative"] = "relative"
    """Which part this is."""
    buckets: int = 32
    """Half of them for single distances, half for ranges that grow; an encoder has as many for each direction."""
    max_distance: int = 128
    """Tokens from which on all distances share a bucket."""

    def __post_init__(self) -> None:
        if self.buckets < 4 or self.buckets % 4 or self.max_distance <= self.buckets // 2:
            raise Refusal(
                "",
                NO_VALUE,
                (
                    f"has buckets={self.buckets}, max_distance={self.max_distance}: take"
                    " a multiple of 4 and a distance above half of it, such as 32 and 128"
                ),
            )

    def check(self, model: ModelConfig) -> None:
        check_distances(model)

    def parameters(self, max_seq_len: int, d_model: int, heads: int) -> int:
        return self.buckets * heads

    def build_distances(self, heads: int, *, causal: bool) -> RelativeBias:
        return RelativeBias(self, heads, causal=causal)


class RelativeBias(Distances):
    """A table of [buckets, H]: what is added to a head's scores, by how far away the key is."""

    declared = declare(weight=Parameter("embedding", "zeros"))

    def __init__(self, config: RelativePositionConfig, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.config = config
        self.causal = causal
        self.weight = nn.Parameter(torch.empty(config.buckets, heads))

    def forward(self, keys: int, device: torch.device) -> torch.Tensor:
        distance_L = torch.arange(1 - keys, keys, device=device)
        buckets_L = distance_buckets(distance_L, self.config, causal=self.causal)
        return nn.functional.embedding(buckets_L, self.weight).T.float()


def distance_buckets(distance_L: torch.Tensor, config: RelativePositionConfig, *, causal: bool) -> torch.Tensor:
    """int64 bucket of each distance (key minus query): one each up to half the buckets, then logarithmic ranges."""
    buckets = config.buckets if causal else config.buckets // 2
    away_L = (-distance_L).clamp(min=0) if causal else distance_L.abs()
    single = buckets // 2
    growth_L = torch.log(away_L.clamp(min=1).float() / single) / math.log(config.max_distance / single)
    range_L = (single + (growth_L * (buckets - single)).long()).clamp(max=buckets - 1)
    found_L = torch.where(away_L < single, away_L, range_L)
    return found_L if causal else found_L + buckets * (distance_L > 0)


def check_distances(model: ModelConfig) -> None:
    """A bias by distance is one for all layers, and added by plain and latent attention only. Raises Refusal."""
    mixers = [layer.mixer for layer in model.layers]
    without = [mixer for mixer in mixers if mixer.drops_bias] or mixers[: 0 if model.positioned_heads else 1]
    if without:
        raise Refusal(
            "position.kind",
            model.position.kind,
            (
                f"with {field('mixer.kind')}={without[0].kind}: it is a bias on the scores of plain or "
                "latent attention, which other mixers do not add"
            ),
            f"set {field('position.kind')}=none or learned, or take {field('mixer.kind')}=attention",
        )
    if len({each.heads for each in model.positioned_heads}) > 1:
        raise Refusal(
            "pattern",
            NO_VALUE,
            (
                "it gives attention layers different n_heads: all layers share one ALiBi slope"
                " or one table of distances for each head"
            ),
            "give them the same n_heads or choose other positions",
        )
