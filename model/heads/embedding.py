"""A vector for a whole row, and which row of another tower is its match (CLIP, Radford et al. 2021,
https://arxiv.org/abs/2103.00020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal, Shown, field
from model.heads.base import Head, HeadConfig
from model.init import Linear, Parameter, declare
from model.losses.cross_entropy import IGNORED
from model.norms.norm import NormConfig
from model.slots import SlotCosts

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class EmbeddingHeadConfig(HeadConfig):
    """One vector of `width` channels and length 1 for a row: that of one token, projected."""

    kind: Literal["embedding"] = "embedding"
    """Which part this is."""
    width: int = 512
    """Channels of the vector."""
    pool: Literal["first", "end", "largest"] = "first"
    """Which token: the first (a class token), the first `end_token`, or the one of the largest number (largest: the
    end token of vocabularies where it comes last)."""
    end_token: int | None = None
    """Entry that ends a text, for pool end."""
    contrast: bool = False
    """Rows are compared with those of `model.tower`, at a temperature that is learned."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise Refusal("width", self.width, "the vector needs at least one channel")
        if (self.pool == "end") != (self.end_token is not None):
            raise Refusal(
                "pool",
                self.pool,
                f"with end_token {self.end_token}: the pool end looks for that token, and no other does",
                "set both or neither",
            )

    def costs(self, vocab_size: int, d_model: int, norm: NormConfig) -> SlotCosts:
        """One matrix, applied once for each row; the comparison of rows with rows is left out."""
        matrix = self.width * d_model
        return SlotCosts(parameters=matrix + int(self.contrast), matrices=0, row_flops=2 * matrix)

    @property
    def compares(self) -> bool:
        return self.contrast

    @property
    def pools_first(self) -> bool:
        return self.pool == "first"

    def check(self, model: ModelConfig) -> None:
        tower = model.tower
        if tower is None or not self.contrast:
            return
        if any(layer.ffn.routes for layer in tower.layers):
            raise Refusal(
                "tower.ffn.kind",
                Shown("moe"),
                "its rows are not this model's, so what its routers lose has no row to be weighed with",
                "give experts to this model, or none",
            )
        other = tower.head if isinstance(tower.head, EmbeddingHeadConfig) else None
        if other is None or other.contrast or other.width != self.width:
            raise Refusal(
                "tower",
                NO_VALUE,
                (
                    f"has head {tower.head}: its vectors are compared with this model's, so it needs "
                    f"{field('tower.head.kind')}=embedding, {field('tower.head.width')}={self.width} and "
                    f"{field('tower.head.contrast')}=false"
                ),
            )

    def build(self, model: ModelConfig, vocab_size: int) -> EmbeddingHead:
        return EmbeddingHead(self, model.d_model)


class EmbeddingHead(Head):
    """x_BTD -> {"features": [B, width]}; beside another tower's, {"logits": [B, its rows]}."""

    takes = frozenset({"matches_B"})
    counted = "matches_B"
    reads = frozenset({"tokens_BT"})
    declared = declare(log_scale=Parameter("norm", "temperature"))

    def __init__(self, config: EmbeddingHeadConfig, d_model: int) -> None:
        super().__init__()
        self.pool = config.pool
        self.end_token = config.end_token
        self.projection = Linear(d_model, config.width)
        self.log_scale = nn.Parameter(torch.empty(())) if config.contrast else None

    def forward(
        self,
        x_BTD: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        per_token: bool = False,
        tokens_BT: torch.Tensor | None = None,
        other_ND: torch.Tensor | None = None,
        matches_B: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """other_ND: the other tower's features. matches_B: int64, which of them belongs to each row, -100 for none;
        no two rows have the same.

        Without other_ND {"features"}. With it "logits" too: cosines times the learned scale. With matches {"loss_sum":
        fp32, "target_count"}: the mean of both directions' cross-entropies, among the rows of this call.
        """
        features_BD = nn.functional.normalize(self.projection(self._pooled(x_BTD, tokens_BT)), dim=-1, eps=0.0)
        if other_ND is None or self.log_scale is None:
            return {"features": features_BD}
        logits_BN = features_BD @ other_ND.T * self.log_scale.exp()
        if matches_B is None:
            return {"features": features_BD, "other_features": other_ND, "logits": logits_BN}
        found_B = matches_B != IGNORED
        back_N = torch.full((len(other_ND),), IGNORED, device=matches_B.device)
        back_N[matches_B[found_B]] = torch.arange(len(matches_B), device=matches_B.device)[found_B]
        both = (
            nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
            for logits, targets in ((logits_BN, matches_B), (logits_BN.T, back_N))
        )
        return {"loss_sum": sum(both, torch.zeros((), device=x_BTD.device)) / 2, "target_count": found_B.sum()}

    def _pooled(self, x_BTD: torch.Tensor, tokens_BT: torch.Tensor | None) -> torch.Tensor:
        if self.pool == "first":
            return x_BTD[:, 0]
        assert tokens_BT is not None
        place_B = (tokens_BT if self.end_token is None else (tokens_BT == self.end_token).int()).argmax(1)
        return x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), place_B]
