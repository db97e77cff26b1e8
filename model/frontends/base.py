"""What stands before a stack."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from conf.refusal import NO_VALUE, Refusal
from conf.registry import Registry
from model.init import Declared
from model.norms.norm import NormConfig

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.heads.codebook import CodebookConfig

Source = Sequence[int] | torch.Tensor
"""One input of a model, without a batch: token ids, or a tensor: pixels [A, Y, X], mel frames [A, W], samples [W]."""


@dataclass(frozen=True, kw_only=True)
class FrontendConfig:
    """What makes vectors of the input; each kind has a `kind` of its own and overrides what it does.

    uses_vocabulary: it looks up entries of the vocabulary.
    """

    kinds: ClassVar[Registry] = Registry(
        "frontends",
        {
            "tokens": "model.frontends.text:TokenFrontendConfig",
            "patches": "model.frontends.patches:PatchFrontendConfig",
            "waveform": "model.frontends.waveform:WaveformFrontendConfig",
            "mel": "model.frontends.mel:MelFrontendConfig",
        },
    )

    kind: str
    """Which part this is."""
    uses_vocabulary: ClassVar[bool] = False

    @property
    def tokens(self) -> int | None:
        """How many tokens every row has; null where rows differ."""
        return None

    def book(self) -> CodebookConfig | None:
        """What frames are to be recognised by, if it has such a thing."""
        return None

    @abstractmethod
    def parameters(self, vocab_size: int, d_model: int, norm: NormConfig) -> int:
        """How many parameters it has, those of positions aside."""

    @abstractmethod
    def flops(self, tokens: int, d_model: int) -> int:
        """Forward FLOPs for one row."""

    @abstractmethod
    def build(self, model: ModelConfig, vocab_size: int) -> Frontend:
        """The frontend of that model over a vocabulary of that size."""


class Frontend(Declared):
    """forward(positions_BT or null, **inputs) -> x_BTD; inputs go to it by name, as `Transformer.forward` got them.

    reads: the name of the one that is always there. optional: those of the others.
    """

    reads: ClassVar[str]
    optional: ClassVar[frozenset[str]] = frozenset()

    def embed(
        self, positions_BT: torch.Tensor | None, inputs: dict[str, torch.Tensor], *, with_codes: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """x_BTD, and with_codes what its codebook makes of the input, by the names of the head's inputs."""
        return self(positions_BT, **inputs), {}

    def documents(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """documents_BT, if the inputs themselves say which tokens are padding."""
        return None

    def batched(self, sources: Sequence[Source], device: torch.device) -> dict[str, torch.Tensor]:
        """The inputs by name of a batch of these. Raises Refusal where their shapes differ and no padding is known."""
        rows = [torch.as_tensor(source, device=device) for source in sources]
        shapes = list(dict.fromkeys(tuple(row.shape) for row in rows))
        if len(shapes) > 1:
            raise Refusal(
                "model",
                NO_VALUE,
                f"{self.reads} would have rows of {shapes[0]} and {shapes[1]}: this frontend knows no padding",
                "bring them to one shape, or hand them over one by one",
            )
        return {self.reads: torch.stack(rows)}
