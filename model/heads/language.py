"""What turns the last x_BTD into logits or a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal, field
from model.ffns.dense import ACTIVATIONS, Activation
from model.heads.base import Head, HeadConfig
from model.init import Linear, Multiplies, Parameter, declare
from model.losses.cross_entropy import (
    CPU_PASS,
    SoftmaxGradient,
    Terms,
    capped,
    chunk_tokens,
    chunked_cross_entropy,
    softmax_gradient_,
    token_scores,
)
from model.norms.norm import NormConfig, build_norm
from model.slots import SlotCosts

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class TargetWeight:
    """How much a target weighs in the objective if its vocabulary entry is `first` or a later one."""

    first: int = 0
    """The first entry it holds for."""
    weight: float = 1.0
    """Weight of such a target."""

    def __post_init__(self) -> None:
        if self.first < 0 or self.weight < 0:
            raise Refusal(
                "",
                NO_VALUE,
                (
                    f"has first={self.first}, weight={self.weight}: entries are counted "
                    "from 0, and no target weighs less than nothing"
                ),
            )


@dataclass(frozen=True, kw_only=True)
class LanguageHeadConfig(HeadConfig):
    """Logits over the vocabulary."""

    uses_vocabulary: ClassVar[bool] = True
    can_tie: ClassVar[bool] = True

    kind: Literal["language"] = "language"
    """Which part this is."""
    bias: bool = False
    """An offset for each vocabulary entry."""
    transform: Activation | None = None
    """Activation of a dense layer that comes first, with the model's norm (BERT's masked-token head); null: no such
    layer."""
    scale_input: bool = False
    """The input times d_model^-0.5 (T5 with tied embeddings)."""
    label_smoothing: float = 0.0
    """Share of every target that training spreads over the whole vocabulary."""
    weights: tuple[TargetWeight, ...] = ()
    """Where targets weigh differently; later entries win, and what none names weighs 1 (DALL-E's codes of an image)."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise Refusal("label_smoothing", self.label_smoothing, "it is a share below 1", "use 0 for none")

    def check(self, model: ModelConfig) -> None:
        for weight in self.weights:
            if model.vocab_size is not None and weight.first >= model.vocab_size:
                raise Refusal(
                    "head.weights",
                    NO_VALUE,
                    f"has first={weight.first} with {field('vocab_size')}={model.vocab_size}: no target reaches it",
                    "name an entry of the vocabulary",
                )

    def build(self, model: ModelConfig, vocab_size: int) -> LanguageHead:
        width = model.d_model
        return LanguageHead(
            nn.Parameter(torch.empty(vocab_size, width)),
            soft_cap=model.logit_soft_cap,
            z_loss=model.z_loss,
            bias=self.bias,
            transform=None if self.transform is None else Transform(width, self.transform, model.norm),
            scale=width**-0.5 if self.scale_input else 1.0,
            smoothing=self.label_smoothing,
            weights=self.weights,
        )

    def costs(self, vocab_size: int, d_model: int, norm: NormConfig) -> SlotCosts:
        """The vocabulary matrix, which a tied head shares with the embeddings, and the dense layer before it."""
        dense = 0 if self.transform is None else d_model * d_model
        extra = (0 if self.transform is None else d_model + norm.parameters(d_model)) + (vocab_size if self.bias else 0)
        matrices = vocab_size * d_model + dense
        return SlotCosts(parameters=matrices + extra, matrices=matrices)

    def loss_bytes(self, vocab_size: int, d_model: int, tokens: int, dtype_bytes: int) -> int:
        """The weight in the precision of the products, its gradient (summed in fp32 where there are several chunks), a
        chunk's logits and one pass over them in fp32, twice. Beyond a chunk's tokens they are the same for any number."""
        chunk = chunk_tokens(tokens, vocab_size, d_model, dtype_bytes)
        weights = (0 if dtype_bytes == 4 else dtype_bytes) + dtype_bytes + (4 if chunk < tokens else 0)
        passes = 8 * min(chunk * vocab_size, CPU_PASS)
        return weights * vocab_size * d_model + chunk * vocab_size * dtype_bytes + passes


@dataclass(frozen=True, kw_only=True)
class NoHeadConfig(HeadConfig):
    """The last x_BTD itself: what an encoder hands to its decoder, or features for another use."""

    passes_features: ClassVar[bool] = True

    kind: Literal["none"] = "none"
    """Which part this is."""

    def costs(self, vocab_size: int, d_model: int, norm: NormConfig) -> SlotCosts:
        """Nothing."""
        return SlotCosts(parameters=0, matrices=0)

    def build(self, model: ModelConfig, vocab_size: int) -> NoHead:
        return NoHead()


class LanguageHead(Head, Multiplies):
    """Vocabulary logits, and their cross-entropy without ever holding them all.

    A tied head registers the embedding's own parameter as its `weight`, so that it reads nothing but its own inside
    its own forward: ZeRO-3 gathers a module's parameters around that module's forward and nowhere else.
    """

    takes = frozenset({"targets_BT"})
    declared = declare(weight=Parameter("head", "head"), bias=Parameter("bias", "zeros"))

    def __init__(
        self,
        weight_VD: nn.Parameter,
        *,
        soft_cap: float | None,
        z_loss: float,
        bias: bool = False,
        transform: nn.Module | None = None,
        scale: float = 1.0,
        smoothing: float = 0.0,
        weights: tuple[TargetWeight, ...] = (),
    ) -> None:
        super().__init__()
        self.weight = weight_VD
        self.bias = nn.Parameter(torch.empty(weight_VD.shape[0])) if bias else None
        self.transform = transform
        self.scale = scale
        self.smoothing = smoothing
        self.weights = weights
        self.soft_cap = soft_cap
        self.z_loss = z_loss
        self._compiled: SoftmaxGradient | None = None

    def compile_loss(self) -> None:
        """Make one kernel of the passes over the logits. Safe where parameters are gathered around `forward`
        (ZeRO-3): none is read in it."""
        self._compiled = torch.compile(softmax_gradient_, dynamic=False)

    def forward(
        self,
        x_BTD: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        per_token: bool = False,
        targets_BT: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """{"logits"}; with targets the sums of `chunked_cross_entropy`, or per token {"nll", "is_top"} of [B, T]."""
        if self.transform is not None:
            x_BTD = self.transform(x_BTD)
        if self.scale != 1.0:
            x_BTD = x_BTD * self.scale
        if targets_BT is not None and per_token:
            nll_N, is_top_N = token_scores(
                x_BTD.flatten(0, -2), self.weight, targets_BT.flatten(), bias_V=self.bias, soft_cap=self.soft_cap
            )
            return {"nll": nll_N.view(targets_BT.shape), "is_top": is_top_N.view(targets_BT.shape)}
        if targets_BT is not None:
            return chunked_cross_entropy(
                x_BTD.flatten(0, -2),
                self.weight,
                targets_BT.flatten(),
                bias_V=self.bias,
                terms=Terms(self.soft_cap, self.z_loss, self.smoothing),
                weights_N=self._weights(targets_BT.flatten()),
                compiled=self._compiled,
            )
        logits_BTV = self.multiply(x_BTD)
        if self.soft_cap is not None:
            logits_BTV = capped(logits_BTV, self.soft_cap)
        return {"logits": logits_BTV}

    def _weights(self, targets_N: torch.Tensor) -> torch.Tensor | None:
        """fp32, what each target weighs; null where all weigh 1."""
        if not self.weights:
            return None
        weights_N = torch.ones(targets_N.shape, device=targets_N.device)
        for entry in self.weights:
            weights_N = weights_N.masked_fill(targets_N >= entry.first, entry.weight)
        return weights_N


class Transform(nn.Module):
    """norm(activation(W x + b)), before the vocabulary matrix of a masked-token head (Devlin et al. 2018)."""

    def __init__(self, d_model: int, activation: Activation, norm: NormConfig) -> None:
        super().__init__()
        self.dense = Linear(d_model, d_model, bias=True)
        self.activation = ACTIVATIONS[activation]
        self.norm = build_norm(norm, d_model)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """x_BTD of the same shape, in the precision of the input."""
        out_BTD: torch.Tensor = self.norm(self.activation(self.dense(x_BTD)))
        return out_BTD


class NoHead(Head):
    """{"features": x_BTD}."""

    passes_features = True

    def forward(
        self, x_BTD: torch.Tensor, documents_BT: torch.Tensor | None = None, per_token: bool = False
    ) -> dict[str, torch.Tensor]:
        return {"features": x_BTD}
