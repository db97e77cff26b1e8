"""Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691): learned embeddings of virtual tokens.

Virtual tokens are the ids -1, -2, … in front of a text. So positions, documents in packed rows, caches, beams and
prompts that are begun once need to know nothing of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal
from model.architecture import Transformer
from model.frontends.text import Embedding, TokenFrontend
from model.init import Parameter, declare


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Learned virtual tokens before the row."""

    kind: Literal["prompt"] = "prompt"
    """Which part this is."""
    tokens: int = 20
    """Virtual tokens; they start as the embeddings of random entries of the vocabulary."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise Refusal("prompt.tokens", self.tokens, "at least one virtual token is learned")


class PromptedEmbedding(Embedding):
    """Token embeddings, and a learned vector for each of the ids -1, -2, …"""

    declared = declare(weight=Parameter("embedding", "embedding"), prompt=Parameter("adapter", "embedding"))

    def __init__(self, base: Embedding, prompt_TD: torch.Tensor) -> None:
        nn.Module.__init__(self)
        self.weight = base.weight
        self.prompt = nn.Parameter(prompt_TD)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """tokens_BT: int64, an id of the vocabulary or -1 to -tokens."""
        virtual_BT = tokens_BT < 0
        known_BTD = nn.functional.embedding(tokens_BT.clamp(min=0), self.weight)
        learned_BTD = nn.functional.embedding((-1 - tokens_BT).clamp(min=0), self.prompt)
        return torch.where(virtual_BT[..., None], learned_BTD, known_BTD)


@torch.no_grad()
def attach_prompt(model: Transformer, config: PromptConfig, *, seed: int = 0) -> list[str]:
    """Let the model know virtual tokens, and freeze everything else; the names of what is trained.

    Where an encoder reads a text, as in the paper's T5, they stand before that one. Raises Refusal for a model whose
    input is not tokens.
    """
    within, reader = ("encoder.", model.encoder) if _reads_text(model.encoder) else ("", model)
    if reader is None or not isinstance(reader.frontend, TokenFrontend):
        raise Refusal(
            "model",
            NO_VALUE,
            f"virtual tokens need a frontend of tokens, this model has {type(model.frontend).__name__}",
            "use lora or bottlenecks",
        )
    model.requires_grad_(False)
    base = reader.frontend.tokens
    vocab_size = base.weight.shape[0]
    drawn = torch.randint(0, vocab_size, (config.tokens,), generator=torch.Generator().manual_seed(seed))
    reader.frontend.tokens = PromptedEmbedding(base, base.weight[drawn.to(base.weight.device)].clone())
    return [f"{within}frontend.tokens.prompt"]


def _reads_text(encoder: Transformer | None) -> bool:
    return encoder is not None and isinstance(encoder.frontend, TokenFrontend)


def with_prompt(prompt: Sequence[int], tokens: int) -> list[int]:
    """A text with `tokens` virtual tokens in front, for `generate` or a row of training; their targets are -100."""
    return [*range(-1, -1 - tokens, -1), *prompt]
