"""What kind of thing a whole row is."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from model.errors import ModelError
from model.init import Parameter, declare
from model.interfaces import Head
from model.loss import IGNORED
from model.norm import NormConfig
from model.slots import SlotCosts


@dataclass(frozen=True, kw_only=True)
class ClassHeadConfig:
    """Logits over `n_classes` classes, from the first token of a row (ViT, BERT)."""

    kind: Literal["classes"] = "classes"
    n_classes: int = 1000
    uses_vocabulary: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.n_classes < 1:
            raise ModelError(f"head.n_classes is {self.n_classes}: there must be something to choose; use at least 1.")

    def costs(self, vocab_size: int, d_model: int, norm: NormConfig) -> SlotCosts:
        """One matrix and its offset, applied once for each row."""
        matrix = self.n_classes * d_model
        return SlotCosts(parameters=matrix + self.n_classes, matrices=0, row_matrices=matrix)


class ClassHead(Head):
    """x_BTD -> logits_BV of the row's class."""

    takes = frozenset({"classes_B"})
    declared = declare(weight=Parameter("head", "head"), bias=Parameter("bias", "zeros"))

    def __init__(self, config: ClassHeadConfig, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_classes, d_model))
        self.bias = nn.Parameter(torch.empty(config.n_classes))

    def forward(
        self, x_BTD: torch.Tensor, per_token: bool = False, classes_B: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """classes_B: int64, -100 where a row has none.

        {"logits": [B, V]}; with classes {"loss_sum": fp32 Σ NLL, "target_count"}; per row, without gradient, {"nll": fp32
        [B], "is_top": bool [B]}.
        """
        logits_BV = nn.functional.linear(x_BTD[:, 0], self.weight, self.bias)
        if classes_B is None:
            return {"logits": logits_BV}
        nll_B = nn.functional.cross_entropy(logits_BV.float(), classes_B, reduction="none", ignore_index=IGNORED)
        if per_token:
            return {"nll": nll_B.detach(), "is_top": logits_BV.argmax(-1) == classes_B}
        return {"loss_sum": nll_B.sum(), "target_count": (classes_B != IGNORED).sum()}
