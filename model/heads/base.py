"""What stands behind a stack."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from conf.registry import Registry
from model.init import Declared
from model.norms.norm import NormConfig
from model.slots import SlotCosts

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What is made of the last vectors; each kind has a `kind` of its own and overrides what it does.

    uses_vocabulary: its outputs are entries of the vocabulary. can_tie: its matrix may be the token embedding's.
    passes_features: it makes nothing of the vectors, as an encoder's before its decoder.

    """

    kinds: ClassVar[Registry] = Registry(
        "heads",
        {
            "language": "model.heads.language:LanguageHeadConfig",
            "classifier": "model.heads.classifiers:ClassifierHeadConfig",
            "token_classifier": "model.heads.classifiers:TokenClassifierHeadConfig",
            "span": "model.heads.classifiers:SpanHeadConfig",
            "ctc": "model.heads.ctc:CtcHeadConfig",
            "embedding": "model.heads.embedding:EmbeddingHeadConfig",
            "distractors": "model.heads.distractor:DistractorHeadConfig",
            "none": "model.heads.language:NoHeadConfig",
        },
    )

    kind: str
    """Which part this is."""
    uses_vocabulary: ClassVar[bool] = False
    can_tie: ClassVar[bool] = False
    passes_features: ClassVar[bool] = False

    @property
    def pools_first(self) -> bool:
        """Whether it reads the first token alone."""
        return False

    @property
    def compares(self) -> bool:
        """Whether it compares rows with those of another tower."""
        return False

    def check(self, model: ModelConfig) -> None:
        """Raises Refusal where it does not suit the rest of the model."""

    @abstractmethod
    def costs(self, vocab_size: int, d_model: int, norm: NormConfig) -> SlotCosts:
        """Closed forms."""

    def loss_bytes(self, vocab_size: int, d_model: int, tokens: int, dtype_bytes: int) -> int:
        """Bytes of the loss of so many tokens at its height, as far as they count beside a block's."""
        return 0

    @abstractmethod
    def build(self, model: ModelConfig, vocab_size: int) -> Head:
        """The head of that model over a vocabulary of that size."""


class Head(Declared):
    """forward(x_BTD, documents_BT, per_token, **targets) -> named tensors: outputs without targets, sums for a loss with
    them.

    takes: the names of the targets, which `Transformer.forward` hands on. reads: names of inputs that it
    is given too. reads_codes: it is given the entries of the frontend's codebook too. counted: the name of what tells
    how many targets a row has. passes_features: it makes nothing of its input, so what layers routed is told beside it.
    """

    takes: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()
    reads_codes: ClassVar[bool] = False
    counted: ClassVar[str] = "targets_BT"
    passes_features: ClassVar[bool] = False

    def row_targets(self, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """How many targets each row has, int64 [B]: places that are not ignored, or that are marked."""
        counted = targets[self.counted]
        return (counted if counted.dtype == torch.bool else counted >= 0).view(len(counted), -1).sum(1)
