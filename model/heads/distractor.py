"""Telling a masked frame's codebook entry from those of other frames (wav2vec 2.0, Baevski et al. 2020, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from conf.refusal import Refusal
from model.heads.base import Head, HeadConfig
from model.init import Linear
from model.norms.norm import NormConfig
from model.slots import SlotCosts

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class DistractorHeadConfig(HeadConfig):
    """Frames and codebook entries, projected to `width` channels and compared by cosine over `temperature`."""

    kind: Literal["distractors"] = "distractors"
    """Which part this is."""
    codes: int = 256
    """Channels of an entry: frontend.codebook.width."""
    width: int = 256
    """Channels that are compared."""
    temperature: float = 0.1
    """Cosines are divided by this."""
    diversity: float = 0.1
    """Weight of the share of entries that goes unused."""

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.diversity < 0 or min(self.codes, self.width) < 1:
            raise Refusal("", self, "temperature and sizes must be above 0, diversity 0 or more")

    def costs(self, vocab_size: int, d_model: int, norm: NormConfig) -> SlotCosts:
        """Two matrices and their offsets; cosines are left out."""
        matrices = self.width * (d_model + self.codes)
        return SlotCosts(parameters=matrices + 2 * self.width, matrices=matrices)

    def build(self, model: ModelConfig, vocab_size: int) -> DistractorHead:
        book = model.frontend.book()
        if book is None or book.width != self.codes:
            raise Refusal(
                "head.codes",
                self.codes,
                f"with frontend.codebook {book}: frames are told apart by entries of that codebook",
                "set frontend.codebook with width equal to head.codes",
            )
        return DistractorHead(self, model.d_model)


class DistractorHead(Head):
    """x_BTD and the frames' codebook entries -> how well each masked frame tells its own from others."""

    takes = frozenset({"negatives_BTO"})
    reads = frozenset({"masked_BT"})
    reads_codes = True
    counted = "masked_BT"

    def __init__(self, config: DistractorHeadConfig, d_model: int) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.diversity = config.diversity
        self.frames = Linear(d_model, config.width, bias=True)
        self.codes = Linear(config.codes, config.width, bias=True)

    def forward(
        self,
        x_BTD: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        per_token: bool = False,
        codes_BTC: torch.Tensor | None = None,
        unused: torch.Tensor | None = None,
        masked_BT: torch.Tensor | None = None,
        negatives_BTO: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """codes_BTC, unused: what `Codebook` made. negatives_BTO: int64, for each frame the places in its row of those
        it is to be told from; only masked frames' count.

        {"features", "codes"}, both projected; with negatives {"loss_sum": fp32 Σ NLL + diversity * unused * masked
        frames, "target_count": masked frames}.
        """
        assert codes_BTC is not None
        assert unused is not None
        features_BTD, codes_BTD = self.frames(x_BTD), self.codes(codes_BTC)
        if negatives_BTO is None or masked_BT is None:
            return {"features": features_BTD, "codes": codes_BTD}
        rows_B11 = torch.arange(len(x_BTD), device=x_BTD.device)[:, None, None]
        others_BTOD = codes_BTD[rows_B11, negatives_BTO]
        candidates_BTOD = torch.cat((codes_BTD[:, :, None], others_BTOD), dim=2)
        cosines_BTO = torch.cosine_similarity(features_BTD[:, :, None].float(), candidates_BTOD.float(), dim=-1)
        same_BTO = (codes_BTD[:, :, None] == others_BTOD).all(-1)
        same_BTO = nn.functional.pad(same_BTO, (1, 0))
        logits_BTO = (cosines_BTO / self.temperature).masked_fill(same_BTO, float("-inf"))
        nll_BT = -logits_BTO.log_softmax(-1)[..., 0]
        count = masked_BT.sum()
        return {"loss_sum": (nll_BT * masked_BT).sum() + self.diversity * unused * count, "target_count": count}
