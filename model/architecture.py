"""A whole model: frontend, stack, head; and for some an encoder before them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal
from model.config import ModelConfig
from model.decoding.cache import Cache, Claim, rounded_slots
from model.ffns.experts.receipts import auxiliary_outputs, routing_outputs, with_encoders
from model.frontends.base import Frontend
from model.frontends.text import Embedding
from model.heads.base import Head
from model.inputs import Tensors, sort_inputs
from model.masks import Mask
from model.mixers.base import MixerInput
from model.noise import row_keys
from model.positions.base import Distances
from model.positions.documents import document_positions
from model.stack import Stack


class Prefixes(Protocol):
    """Learned keys and values before those of every layer (`model.adapt.prefix`)."""

    tokens: int

    def __call__(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of every layer the keys and the values, [K, S, C]."""


class Transformer(nn.Module):
    """A decoder (GPT-2, LLaMA), an encoder (BERT), or a decoder with an encoder (Vaswani et al. 2017, T5): whatever the
    configuration spells."""

    def __init__(
        self,
        config: ModelConfig,
        frontend: Frontend,
        stack: Stack,
        head: Head,
        encoder: "Transformer | None" = None,
        distances: Distances | None = None,
        tower: "Transformer | None" = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.frontend = frontend
        self.stack = stack
        self.head = head
        self.encoder = encoder
        self.tower = tower
        self.distances = distances
        self.prefix: Prefixes | None = None
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make tied parameters one, where the configuration says so; `to_empty` undoes it."""
        for name, source in self.config.tied_weights.items():
            module, _, local = name.rpartition(".")
            setattr(self.get_submodule(module), local, self.get_parameter(source))
            if isinstance(table := self.get_submodule(source.rpartition(".")[0]), Embedding):
                table.is_tied = True

    def forward(
        self,
        tokens_BT: torch.Tensor | None = None,
        *,
        targets_BT: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
        positions_BT: torch.Tensor | None = None,
        prefix_B: torch.Tensor | None = None,
        globals_BT: torch.Tensor | None = None,
        cache: Cache | None = None,
        lengths: Sequence[int] | None = None,
        logits_for: Literal["all", "last"] | torch.Tensor = "all",
        per_token: bool = False,
        **inputs: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Logits, or with targets the sums a loss is made of.

        tokens_BT: int64. targets_BT: int64, the token that each place is to predict, -100 where there is none.
        documents_BT: int32 document number within the row, 0 for padding; attention stays inside a document and
        positions restart with each. Hugging Face's attention_mask is such numbers. positions_BT: int64, to override that.
        prefix_B: int64, how many first tokens of each row see each other both ways (prefix-LM, Raffel et al. 2020).
        globals_BT: bool, tokens that see and are seen by all within their document, whatever the windows (Longformer).
        cache: tokens continue what it remembers, and are remembered; of row i with `lengths` only the first
        `lengths[i]`, behind which padding stands. logits_for: every token, the last one, or the column given for each
        row (int64 [B]).
        inputs: further ones by name, told where they are taken: of the frontend token_types_BT (int64), or in place of
        tokens pixels_BAYX, mels_BAW or samples_BW (floats; with the latter sample_lengths_B, int64, and masked_BT, bool);
        of the head its other targets (int64: classes_B, labels_BU, matches_B, negatives_BTO …); and `encoder_NAME` for
        the encoder's NAME (encoder_tokens_BT, encoder_documents_BT), which a cache makes needless after the first pass;
        `tower_NAME` for the other tower's.

        Without targets {"logits": [B, T or 1, V]} or what else the head gives; with targets {"loss_sum": fp32 Σ NLL,
        "target_count": int64}, "z_loss_sum" where the configuration weighs it, "aux_loss_sum" and counts of routing
        (`moe.receipts`) where layers have experts, an encoder's too; with `per_token` instead, and without gradient,
        {"nll": fp32 [B, T], "is_top": bool [B, T]}. A model without a head tells of its routing beside the features.
        """
        named = {"tokens_BT": tokens_BT, "targets_BT": targets_BT}
        given = sort_inputs(self, inputs | {name: x for name, x in named.items() if x is not None})
        claim = self._claim(tokens_BT, cache)
        positions_BT = self._positions(tokens_BT, documents_BT, positions_BT, claim)
        if documents_BT is None:
            documents_BT = self.frontend.documents(given.frontend)

        x_BTD, codes = self.frontend.embed(positions_BT, given.frontend, with_codes=self.head.reads_codes)
        tokens = x_BTD.shape[1]
        mask = self._mask(tokens, documents_BT, prefix_B, globals_BT, claim)
        shared = self._shared(mask, x_BTD, tokens_BT, positions_BT, claim, lengths)
        encoder_stats: Tensors = {}
        if self.encoder is not None:
            shared, encoder_stats = self._with_memory(self.encoder, shared, documents_BT, cache, given.encoder)
        x_BTD, records = self.stack(x_BTD, shared, None if cache is None else cache.states)
        if cache is not None:
            cache.advance([tokens] * len(x_BTD) if lengths is None else lengths)
        targets = given.head | codes
        if self.tower is not None and given.tower:
            targets["other_ND"] = self.tower(**given.tower)["features"]
        result: Tensors = self.head(_chosen(x_BTD, logits_for), documents_BT, per_token, **targets)

        if "loss_sum" in result:
            stats = with_encoders(encoder_stats, routing_outputs(records, documents_BT, x_BTD))
            return result | auxiliary_outputs(result["loss_sum"], stats, lambda: self.head.row_targets(targets))
        return result | routing_outputs(records, documents_BT, x_BTD) if self.head.passes_features else result

    def new_cache(self, rows: int, max_tokens: int, *, static: bool = False) -> Cache:
        """An empty cache for `rows` rows of at most `max_tokens` tokens, prompt and continuation together; see `Cache`."""
        if not self.config.causal:
            raise Refusal("model.causal", False, "an encoder sees what comes later, so it cannot continue from a cache")
        offset = 0 if self.prefix is None else self.prefix.tokens
        device, slots = next(self.stack.parameters()).device, rounded_slots(max_tokens + offset)
        angles = self.config.rotation(torch.arange(slots, device=device)[None])
        states = self.stack.new_states(rows, slots)
        if self.prefix is not None:
            for state, (k_KSC, v_KSC) in zip(states, self.prefix(), strict=True):
                state.begin(k_KSC, v_KSC)
        return Cache(states, rows, max_tokens, device, angles=angles, static=static, offset=offset)

    def _claim(self, tokens_BT: torch.Tensor | None, cache: Cache | None) -> Claim | None:
        """Places of this call's tokens in the cache."""
        if cache is not None and tokens_BT is not None:
            return cache.claim(tokens_BT.shape[1])
        if self.prefix is not None:
            raise Refusal(
                "model",
                NO_VALUE,
                "a model with a prefix computes through a cache",
                "pass cache=model.new_cache(rows, tokens)",
            )
        return None

    def _positions(
        self,
        tokens_BT: torch.Tensor | None,
        documents_BT: torch.Tensor | None,
        positions_BT: torch.Tensor | None,
        claim: Claim | None,
    ) -> torch.Tensor | None:
        """The position of every token; null where the input is not tokens."""
        if tokens_BT is None:
            return positions_BT
        tokens = tokens_BT.shape[1]
        longest = self.config.position.longest_row(self.config.max_seq_len)
        if longest is not None and tokens > longest:
            raise Refusal(
                "model",
                NO_VALUE,
                f"a row has {tokens} tokens, the model {longest} learned positions",
                "shorten the rows or raise model.max_seq_len",
            )
        if positions_BT is not None:
            return positions_BT
        if documents_BT is not None:
            return document_positions(documents_BT)
        return torch.arange(tokens, device=tokens_BT.device)[None] if claim is None else claim.slots_BT

    def _mask(
        self,
        tokens: int,
        documents_BT: torch.Tensor | None,
        prefix_B: torch.Tensor | None,
        globals_BT: torch.Tensor | None,
        claim: Claim | None,
    ) -> Mask:
        """Who sees whom, and the bias on scores of the models whose positions are one. A cache holds one document a row."""
        keys = tokens if claim is None or not claim.keys else claim.keys
        bias_HL = None
        if self.distances is not None:
            bias_HL = self.distances(keys, next(self.stack.parameters()).device)
        mask = Mask(causal=self.config.causal, prefix_B=prefix_B, globals_BT=globals_BT, bias_HL=bias_HL)
        if claim is None:
            return replace(mask, documents_BT=documents_BT)
        return replace(mask, slots_BT=claim.slots_BT, keys=keys, at_end=claim.at_end) if claim.keys else mask

    def _shared(
        self,
        mask: Mask,
        x_BTD: torch.Tensor,
        tokens_BT: torch.Tensor | None,
        positions_BT: torch.Tensor | None,
        claim: Claim | None,
        lengths: Sequence[int] | None,
    ) -> MixerInput:
        """What all layers share of this pass; without positions tokens count from 0."""
        tokens, device = x_BTD.shape[1], x_BTD.device
        if positions_BT is None:
            positions_BT = torch.arange(tokens, device=device)[None]
        draws = self.config.is_random and self.training and claim is None
        of_slots = claim is not None and positions_BT is claim.slots_BT
        return MixerInput(
            mask,
            claim.rotation if claim is not None and of_slots else self.config.rotation(positions_BT),
            None if claim is None else claim.slots_BT,
            None if claim is None else claim.common_slot,
            windowed={window: replace(mask, window=window) for window in self.config.windows},
            row_keys_B=row_keys(tokens_BT) if draws and tokens_BT is not None else None,
            lengths_B=None if lengths is None or min(lengths) >= tokens else torch.tensor(lengths, device=device),
        )

    @staticmethod
    def _with_memory(
        encoder: "Transformer",
        shared: MixerInput,
        documents_BT: torch.Tensor | None,
        cache: Cache | None,
        inputs: Tensors,
    ) -> tuple[MixerInput, Tensors]:
        """With the encoder's output and who sees what of it, from the cache where this pass brings no encoder inputs; and
        the encoder's other outputs."""
        if not inputs:
            if cache is None or not cache.longest:
                raise Refusal("model", NO_VALUE, "the model has an encoder", "give its input too, as encoder_tokens_BT")
            mask = Mask(causal=False, key_documents_BS=cache.memory_documents_BS)
            return replace(shared, memory_mask=mask), {}
        outputs = encoder(**inputs)
        memory_BSD = outputs.pop("features")
        memory_documents_BS = inputs.get("documents_BT")
        if memory_documents_BS is None:
            memory_documents_BS = encoder.frontend.documents(inputs)
        if cache is not None:
            cache.memory_documents_BS = memory_documents_BS
        queries_BT = None if cache is not None or memory_documents_BS is None else documents_BT
        mask = Mask(causal=False, documents_BT=queries_BT, key_documents_BS=memory_documents_BS)
        return replace(shared, memory_BSD=memory_BSD, memory_mask=mask), outputs


def _chosen(x_BTD: torch.Tensor, logits_for: Literal["all", "last"] | torch.Tensor) -> torch.Tensor:
    """The tokens whose logits are asked for: [B, T or 1, D]."""
    if isinstance(logits_for, torch.Tensor):
        return x_BTD[torch.arange(x_BTD.shape[0], device=x_BTD.device), logits_for][:, None]
    return x_BTD[:, -1:] if logits_for == "last" else x_BTD
