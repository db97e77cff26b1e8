"""A whole model: frontend, stack, head."""

import torch
from torch import nn

from model.config import ModelConfig
from model.frontends import TokenFrontend
from model.heads import LanguageHead
from model.masks import Mask
from model.mixers.base import MixerInput
from model.position import RopeConfig, document_positions, rotation
from model.stack import Stack


class Transformer(nn.Module):
    """A decoder over tokens: GPT-2, LLaMA and whatever else the configuration spells."""

    def __init__(self, config: ModelConfig, frontend: TokenFrontend, stack: Stack, head: LanguageHead) -> None:
        super().__init__()
        self.config = config
        self.frontend = frontend
        self.stack = stack
        self.head = head
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's, where the configuration says so; `to_empty` undoes it."""
        if self.config.tie_embeddings:
            self.head.weight = self.frontend.tokens.weight

    def forward(
        self,
        tokens_BT: torch.Tensor,
        *,
        targets_BT: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
        positions_BT: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Logits of every token, or with targets the sums a loss is made of.

        tokens_BT: int64. targets_BT: int64, the token that should follow each, -100 where there is none.
        documents_BT: int32 document number within the row, 0 for padding; attention stays inside a document and
        positions restart with each. positions_BT: int64, to override that.

        Without targets {"logits": [B, T, V]}; with targets {"loss_sum": fp32 Σ NLL, "target_count": int64} and
        "z_loss_sum" where the configuration weighs it.
        """
        if positions_BT is None:
            if documents_BT is None:
                positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
            else:
                positions_BT = document_positions(documents_BT)
        position = self.config.position
        angles = rotation(position, positions_BT, self.config.head_dim) if isinstance(position, RopeConfig) else None
        shared = MixerInput(Mask(causal=True, documents_BT=documents_BT), angles)
        x_BTD = self.stack(self.frontend(tokens_BT, positions_BT), shared)
        sums_or_logits: dict[str, torch.Tensor] = self.head(x_BTD, targets_BT)
        return sums_or_logits
