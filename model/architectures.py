"""A whole model: frontend, stack, head."""

from typing import Literal, Protocol

import torch
from torch import nn

from model.cache import Cache, rounded_slots
from model.config import ModelConfig
from model.errors import ModelError
from model.frontends import TokenFrontend
from model.heads import LanguageHead
from model.masks import Mask
from model.mixers.attention import KeyValueState
from model.mixers.base import MixerInput
from model.position import LearnedPositionConfig, RopeConfig, Rotation, document_positions, rotation
from model.stack import Stack


class Prefixes(Protocol):
    """Learned keys and values before those of every layer (`model.peft.prefix`)."""

    tokens: int

    def __call__(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of every layer the keys and the values, [K, S, C]."""


class Transformer(nn.Module):
    """A decoder over tokens: GPT-2, LLaMA and whatever else the configuration spells."""

    def __init__(self, config: ModelConfig, frontend: TokenFrontend, stack: Stack, head: LanguageHead) -> None:
        super().__init__()
        self.config = config
        self.frontend = frontend
        self.stack = stack
        self.head = head
        self.prefix: Prefixes | None = None
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
        cache: Cache | None = None,
        logits_for: Literal["all", "last"] | torch.Tensor = "all",
        per_token: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Logits, or with targets the sums a loss is made of.

        tokens_BT: int64. targets_BT: int64, the token that should follow each, -100 where there is none.
        documents_BT: int32 document number within the row, 0 for padding; attention stays inside a document and
        positions restart with each. positions_BT: int64, to override that.
        cache: tokens continue what it remembers, and are remembered. logits_for: every token, the last one, or the
        column given for each row (int64 [B]).

        Without targets {"logits": [B, T or 1, V]}; with targets {"loss_sum": fp32 Σ NLL, "target_count": int64} and
        "z_loss_sum" where the configuration weighs it; with `per_token` instead, and without gradient, {"nll": fp32
        [B, T], "is_top": bool [B, T]}.
        """
        if self.prefix is not None and cache is None:
            raise ModelError(
                "a model with a prefix computes through a cache: pass cache=model.new_cache(rows, tokens)."
            )
        shared, positions_BT = self._shared(tokens_BT, documents_BT, positions_BT, cache)
        states = None if cache is None else cache.states
        x_BTD = self.stack(self.frontend(tokens_BT, positions_BT), shared, states)
        if cache is not None:
            cache.advance(tokens_BT.shape[1])
        if isinstance(logits_for, torch.Tensor):
            x_BTD = x_BTD[torch.arange(x_BTD.shape[0], device=x_BTD.device), logits_for][:, None]
        elif logits_for == "last":
            x_BTD = x_BTD[:, -1:]
        result: dict[str, torch.Tensor] = self.head(x_BTD, targets_BT, per_token)
        return result

    def new_cache(self, rows: int, max_tokens: int, *, static: bool = False) -> Cache:
        """An empty cache for `rows` rows of at most `max_tokens` tokens, prompt and continuation together; see `Cache`."""
        offset = 0 if self.prefix is None else self.prefix.tokens
        device, slots = self.frontend.tokens.weight.device, rounded_slots(max_tokens + offset)
        angles = self._rotation(torch.arange(slots, device=device)[None])
        states = self.stack.new_states(rows, slots)
        if self.prefix is not None:
            for state, (k_KSC, v_KSC) in zip(states, self.prefix(), strict=True):
                assert isinstance(state, KeyValueState)
                state.begin(k_KSC, v_KSC)
        return Cache(states, rows, max_tokens, device, angles=angles, static=static, offset=offset)

    def _rotation(self, positions_BT: torch.Tensor) -> Rotation | None:
        """The angles of those positions, where the model rotates and attends."""
        position, head_dim = self.config.position, self.config.head_dim
        if not isinstance(position, RopeConfig) or head_dim is None:
            return None
        return rotation(position, positions_BT, head_dim)

    def _shared(
        self,
        tokens_BT: torch.Tensor,
        documents_BT: torch.Tensor | None,
        positions_BT: torch.Tensor | None,
        cache: Cache | None,
    ) -> tuple[MixerInput, torch.Tensor]:
        """What all layers share of this pass, and the position of every token."""
        tokens, position = tokens_BT.shape[1], self.config.position
        slots_BT = None if cache is None else cache.claim(tokens)
        angles = None
        if cache is not None and slots_BT is not None and positions_BT is None and documents_BT is None:
            angles = cache.rotation(slots_BT)
        if positions_BT is None:
            if documents_BT is not None:
                positions_BT = document_positions(documents_BT)
            elif slots_BT is not None:
                positions_BT = slots_BT
            else:
                positions_BT = torch.arange(tokens, device=tokens_BT.device)[None]
        if isinstance(position, LearnedPositionConfig) and tokens > self.config.max_seq_len:
            raise ModelError(
                f"a row has {tokens} tokens, the model {self.config.max_seq_len} learned positions: shorten the rows "
                "or raise model.max_seq_len."
            )
        if angles is None:
            angles = self._rotation(positions_BT)
        if cache is None:
            return MixerInput(Mask(documents_BT=documents_BT), angles), positions_BT
        fresh = cache.longest + cache.offset == 0 and not cache.static
        mask = Mask() if fresh else Mask(slots_BT=slots_BT, keys=cache.slots_for(tokens))
        return MixerInput(mask, angles, slots_BT, cache.common_slot), positions_BT
