"""Labels without alignment: connectionist temporal classification (Graves et al. 2006)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from conf.refusal import Refusal
from model.heads.base import Head, HeadConfig
from model.init import Parameter, declare
from model.norms.norm import NormConfig
from model.slots import SlotCosts

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class CtcHeadConfig(HeadConfig):
    """Logits over the vocabulary for every frame."""

    uses_vocabulary: ClassVar[bool] = True

    kind: Literal["ctc"] = "ctc"
    """Which part this is."""
    blank: int = 0
    """The entry that stands for no label."""

    def __post_init__(self) -> None:
        if self.blank < 0:
            raise Refusal("blank", self.blank, "it is an entry of the vocabulary, counted from 0")

    def costs(self, vocab_size: int, d_model: int, norm: NormConfig) -> SlotCosts:
        """One matrix and its offset."""
        return SlotCosts(parameters=vocab_size * (d_model + 1), matrices=vocab_size * d_model)

    def build(self, model: ModelConfig, vocab_size: int) -> CtcHead:
        return CtcHead(self, vocab_size, model.d_model)


class CtcHead(Head):
    """x_BTD -> logits_BTV of frames; with labels the likelihood of all alignments that spell them."""

    takes = frozenset({"labels_BU"})
    counted = "labels_BU"
    declared = declare(weight=Parameter("head", "head"), bias=Parameter("bias", "zeros"))

    def __init__(self, config: CtcHeadConfig, vocab_size: int, d_model: int) -> None:
        super().__init__()
        if config.blank >= vocab_size:
            raise Refusal("head.blank", config.blank, f"the vocabulary has {vocab_size} entries: choose one of them")
        self.blank = config.blank
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.bias = nn.Parameter(torch.empty(vocab_size))

    def forward(
        self,
        x_BTD: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        per_token: bool = False,
        labels_BU: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """labels_BU: int64, -100 behind the end of a row's labels.

        {"logits": [B, T, V]}; with labels {"loss_sum": fp32 Σ -ln p(labels), "target_count": how many labels}, infinite
        where a row has too few frames for its labels; per row, without gradient, {"nll": fp32 [B]}.
        """
        logits_BTV = nn.functional.linear(x_BTD, self.weight, self.bias)
        if labels_BU is None:
            return {"logits": logits_BTV}
        frames_B = torch.full((len(x_BTD),), x_BTD.shape[1], device=x_BTD.device)
        if documents_BT is not None:
            frames_B = (documents_BT != 0).sum(1)
        count_B = (labels_BU >= 0).sum(1)
        log_p_TBV = logits_BTV.float().log_softmax(-1).transpose(0, 1)
        nll_B = nn.functional.ctc_loss(
            log_p_TBV, labels_BU.clamp(min=0), frames_B, count_B, blank=self.blank, reduction="none"
        )
        if per_token:
            return {"nll": nll_B.detach()}
        return {"loss_sum": nll_B.sum(), "target_count": count_B.sum()}


def best_labels(logits_BTV: torch.Tensor, blank: int, documents_BT: torch.Tensor | None = None) -> list[list[int]]:
    """The labels of each row's likeliest alignment: repetitions merged, then blanks left out."""
    best_BT = logits_BTV.argmax(-1)
    if documents_BT is not None:
        best_BT = best_BT.masked_fill(documents_BT == 0, blank)
    rows = [torch.unique_consecutive(row_T).tolist() for row_T in best_BT]
    return [[label for label in row if label != blank] for row in rows]
