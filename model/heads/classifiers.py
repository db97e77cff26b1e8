"""Heads that choose among a few classes: for a row, for every token, or for where a span starts and ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from conf.refusal import Refusal
from model.heads.base import Head, HeadConfig
from model.init import Linear
from model.losses.cross_entropy import IGNORED
from model.norms.norm import NormConfig
from model.slots import SlotCosts

if TYPE_CHECKING:
    from model.config import ModelConfig

HIDDEN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"tanh": torch.tanh, "relu": nn.functional.relu}


@dataclass(frozen=True, kw_only=True)
class ClassifierHeadConfig(HeadConfig):
    """One of `classes` for a row."""

    kind: Literal["classifier"] = "classifier"
    """Which part this is."""
    classes: int = 2
    """Classes there are."""
    pool: Literal["first", "last", "mean"] = "first"
    """Which vector stands for the row: the first token's (BERT's [CLS]), the last that is no padding (a decoder), or
    the mean of all."""
    hidden: Literal["tanh", "relu"] | None = "tanh"
    """Activation of a dense layer of the model's width before the classes (BERT's pooler); null: no such layer."""

    def __post_init__(self) -> None:
        _check_classes(self.classes)

    def costs(self, vocab_size: int, d_model: int, norm: NormConfig) -> SlotCosts:
        """Two matrices that one vector of each row is multiplied with."""
        hidden = 0 if self.hidden is None else d_model * (d_model + 1)
        matrices = d_model * self.classes + (0 if self.hidden is None else d_model * d_model)
        return SlotCosts(parameters=hidden + (d_model + 1) * self.classes, matrices=0, row_flops=2 * matrices)

    @property
    def pools_first(self) -> bool:
        return self.pool == "first"

    def build(self, model: ModelConfig, vocab_size: int) -> ClassifierHead:
        return ClassifierHead(self, model.d_model, model.dropout)


@dataclass(frozen=True, kw_only=True)
class TokenClassifierHeadConfig(HeadConfig):
    """One of `classes` for every token (named entities, parts of speech)."""

    kind: Literal["token_classifier"] = "token_classifier"
    """Which part this is."""
    classes: int = 2
    """Classes there are."""

    def __post_init__(self) -> None:
        _check_classes(self.classes)

    def costs(self, vocab_size: int, d_model: int, norm: NormConfig) -> SlotCosts:
        """One matrix."""
        return SlotCosts(parameters=(d_model + 1) * self.classes, matrices=d_model * self.classes)

    def build(self, model: ModelConfig, vocab_size: int) -> TokenClassifierHead:
        return TokenClassifierHead(self, model.d_model, model.dropout)


@dataclass(frozen=True, kw_only=True)
class SpanHeadConfig(HeadConfig):
    """Where in the row an answer starts and ends (Devlin et al. 2018, section 4.2)."""

    kind: Literal["span"] = "span"
    """Which part this is."""

    def costs(self, vocab_size: int, d_model: int, norm: NormConfig) -> SlotCosts:
        """One matrix of two outputs."""
        return SlotCosts(parameters=2 * (d_model + 1), matrices=2 * d_model)

    def build(self, model: ModelConfig, vocab_size: int) -> SpanHead:
        return SpanHead(model.d_model)


class ClassifierHead(Head):
    """{"logits": [B, classes]}; with classes_B (int64, -100 for none) the sums of its cross-entropy."""

    takes = frozenset({"classes_B"})
    counted = "classes_B"

    def __init__(self, config: ClassifierHeadConfig, d_model: int, dropout: float) -> None:
        super().__init__()
        self.pool = config.pool
        self.hidden = None if config.hidden is None else Linear(d_model, d_model, bias=True)
        self.activation = None if config.hidden is None else HIDDEN[config.hidden]
        self.dropout = nn.Dropout(dropout)
        self.out = Linear(d_model, config.classes, bias=True)

    def forward(
        self,
        x_BTD: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        per_token: bool = False,
        classes_B: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """x_BTD [B, T, D] to logits of each row, or the sums of a loss."""
        x_BD = self._pooled(x_BTD, documents_BT)
        if self.hidden is not None and self.activation is not None:
            x_BD = self.activation(self.hidden(x_BD))
        logits_BV = self.out(self.dropout(x_BD))
        return {"logits": logits_BV} if classes_B is None else cross_entropy(logits_BV, classes_B)

    def _pooled(self, x_BTD: torch.Tensor, documents_BT: torch.Tensor | None) -> torch.Tensor:
        if self.pool == "first":
            return x_BTD[:, 0]
        if documents_BT is None:
            return x_BTD[:, -1] if self.pool == "last" else x_BTD.mean(1)
        real_BT = documents_BT != 0
        if self.pool == "mean":
            weights_BT1 = (real_BT / real_BT.sum(1, keepdim=True).clamp(min=1))[..., None].to(x_BTD.dtype)
            return (x_BTD * weights_BT1).sum(1)
        last_B = (real_BT * torch.arange(real_BT.shape[1], device=real_BT.device)).argmax(1)
        return x_BTD[torch.arange(len(last_B), device=last_B.device), last_B]


class TokenClassifierHead(Head):
    """{"logits": [B, T, classes]}; with targets_BT (int64, -100 for none) the sums of their cross-entropy."""

    takes = frozenset({"targets_BT"})

    def __init__(self, config: TokenClassifierHeadConfig, d_model: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.out = Linear(d_model, config.classes, bias=True)

    def forward(
        self,
        x_BTD: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        per_token: bool = False,
        targets_BT: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """x_BTD [B, T, D] to logits of each token, or the sums of a loss."""
        logits_BTV = self.out(self.dropout(x_BTD))
        return {"logits": logits_BTV} if targets_BT is None else cross_entropy(logits_BTV, targets_BT)


class SpanHead(Head):
    """{"starts": [B, T], "ends": [B, T]}, logits of the place; with starts_B and ends_B (int64, -100 where there is no
    answer) the sums of both cross-entropies, which count as one target a row. Padding is never chosen."""

    takes = frozenset({"starts_B", "ends_B"})
    counted = "starts_B"

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.out = Linear(d_model, 2, bias=True)

    def forward(
        self,
        x_BTD: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        per_token: bool = False,
        starts_B: torch.Tensor | None = None,
        ends_B: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """x_BTD [B, T, D] to logits of where a span starts and ends, or the sums of a loss."""
        starts_BT, ends_BT = self.out(x_BTD).unbind(-1)
        if documents_BT is not None:
            least = torch.finfo(starts_BT.dtype).min
            starts_BT, ends_BT = (x.masked_fill(documents_BT == 0, least) for x in (starts_BT, ends_BT))
        if starts_B is None or ends_B is None:
            return {"starts": starts_BT, "ends": ends_BT}
        both = cross_entropy(starts_BT, starts_B), cross_entropy(ends_BT, ends_B)
        return {"loss_sum": both[0]["loss_sum"] + both[1]["loss_sum"], "target_count": both[0]["target_count"]}


def cross_entropy(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """{"loss_sum": fp32 Σ NLL, "target_count"} over few classes, the last axis; targets of -100 are ignored."""
    vocab_size = logits_BTV.shape[-1]
    loss = nn.functional.cross_entropy(
        logits_BTV.reshape(-1, vocab_size).float(), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return {"loss_sum": loss, "target_count": (targets_BT != IGNORED).sum()}


def _check_classes(classes: int) -> None:
    if classes < 1:
        raise Refusal("head.classes", classes, "there is at least one to choose")
