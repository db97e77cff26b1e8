"""What turns input into x_BTD, the sequence of vectors every stack works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal
from model.frontends.base import Frontend, FrontendConfig, Source
from model.init import Declared, Parameter, declare
from model.norms.norm import NormConfig, build_norm
from model.positions.base import Positions

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class TokenFrontendConfig(FrontendConfig):
    """Token embeddings and whatever is added to them."""

    uses_vocabulary: ClassVar[bool] = True

    kind: Literal["tokens"] = "tokens"
    """Which part this is."""
    scale_by_sqrt_width: bool = False
    """Embeddings times sqrt(d_model) before positions are added (Vaswani et al. 2017)."""
    token_types: int = 0
    """Kinds of segment with a vector of their own (BERT's sentence A and B); 0: none."""
    norm: bool = False
    """The model's norm after the sum (BERT, BART)."""

    def __post_init__(self) -> None:
        if self.token_types < 0:
            raise Refusal("token_types", self.token_types, "it counts segments", "use 0 for none")

    def parameters(self, vocab_size: int, d_model: int, norm: NormConfig) -> int:
        """How many parameters it has, those of positions aside."""
        return (vocab_size + self.token_types) * d_model + (norm.parameters(d_model) if self.norm else 0)

    def flops(self, tokens: int, d_model: int) -> int:
        """Forward FLOPs for one row: looking up multiplies nothing."""
        return 0

    def build(self, model: ModelConfig, vocab_size: int) -> TokenFrontend:
        width = model.d_model
        return TokenFrontend(
            Embedding(vocab_size, width),
            model.position.build(model.n_positions, width),
            model.dropout,
            scale=width**0.5 if self.scale_by_sqrt_width else 1.0,
            types=Embedding(self.token_types, width) if self.token_types else None,
            norm=build_norm(model.norm, width) if self.norm else None,
        )


class Embedding(Declared):
    """A table of [V, D].

    is_tied: a head multiplies with the same table, so its gradient comes from there as well, dense. Then the rows looked
    up are added to that one, where a dense gradient of their own would clear and read all of [V, D] for them.
    """

    declared = declare(weight=Parameter("embedding", "embedding"))

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.is_tied = False

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """x_BTD of int64 ids from 0 to V - 1."""
        # Finding the distinct ids waits for a GPU, whose memory is fast enough not to need this; no graph traces it.
        if self.is_tied and self.weight.device.type == "cpu" and not torch.compiler.is_compiling():
            x_BTD: torch.Tensor = _RowsOf.apply(tokens_BT, self.weight)
            return x_BTD
        return nn.functional.embedding(tokens_BT, self.weight)


class _RowsOf(torch.autograd.Function):
    """Rows of a table, whose gradient is sparse and has each row once: added to a dense one it gives the same bits as two
    dense ones."""

    @staticmethod
    def forward(ctx: Any, tokens_BT: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens_BT)
        ctx.shape = weight_VD.shape
        return nn.functional.embedding(tokens_BT, weight_VD)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor]:
        (tokens_BT,) = ctx.saved_tensors
        distinct_N, number_BT = tokens_BT.unique(return_inverse=True)
        rows_ND = torch.ops.aten.embedding_dense_backward(grads[0], number_BT, len(distinct_N), -1, False)
        # Checking that the ids are distinct and in order takes a pass over them; `unique` has made them so.
        return None, torch.sparse_coo_tensor(
            distinct_N[None], rows_ND, ctx.shape, is_coalesced=True, check_invariants=False
        )


class TokenFrontend(Frontend):
    """Token embeddings, plus positions and token types where the family has them."""

    reads = "tokens_BT"
    optional = frozenset({"token_types_BT"})

    def __init__(
        self,
        tokens: Embedding,
        positions: Positions | None,
        dropout: float,
        *,
        scale: float = 1.0,
        types: Embedding | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.positions = positions
        self.types = types
        self.norm = norm
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, positions_BT: torch.Tensor, tokens_BT: torch.Tensor, token_types_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """token_types_BT: int64 segment of each token; null is segment 0 everywhere. Raises Refusal for unknown ids."""
        try:
            x_BTD = self.tokens(tokens_BT)
        except IndexError as error:
            raise Refusal(
                "model",
                NO_VALUE,
                (
                    f"token ids from {int(tokens_BT.min())} to {int(tokens_BT.max())} were given, the "
                    f"vocabulary is 0 to {self.tokens.weight.shape[0] - 1}"
                ),
                (
                    "check the tokenizer. Ids below 0 are virtual tokens, which attach_prompt teaches one "
                    "text only: the encoder's, where the model has one that reads text"
                ),
            ) from error
        if self.scale != 1.0:
            x_BTD = x_BTD * self.scale
        if self.types is not None:
            x_BTD = x_BTD + self.types(torch.zeros_like(tokens_BT) if token_types_BT is None else token_types_BT)
        elif token_types_BT is not None:
            raise Refusal(
                "model",
                NO_VALUE,
                "token_types_BT was given, but model.frontend.token_types is 0",
                "set it or leave them out",
            )
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(positions_BT).to(x_BTD.dtype)
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return self.dropout(x_BTD)

    def batched(self, sources: Sequence[Source], device: torch.device) -> dict[str, torch.Tensor]:
        """Texts of any lengths, padded behind their ends."""
        rows = [torch.as_tensor(source, device=device) for source in sources]
        real = [torch.ones(len(row), dtype=torch.int32, device=device) for row in rows]
        tokens_BT, documents_BT = (nn.utils.rnn.pad_sequence(padded, batch_first=True) for padded in (rows, real))
        return {self.reads: tokens_BT, "documents_BT": documents_BT}
