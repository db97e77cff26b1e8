"""A whole model: frontend, stack, head; and for some an encoder before them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import nn

from model.block import BlockState
from model.config import ModelConfig
from model.decoding.cache import Cache, rounded_slots
from model.errors import ModelError
from model.ffns.experts.config import MoeConfig
from model.ffns.experts.receipts import routing_counts, with_encoders
from model.frontends.base import Frontend
from model.frontends.text import Embedding
from model.grid import GridPositionConfig
from model.heads.language import Head, NoHead
from model.masks import Mask
from model.mixers.attention import KeyValueState
from model.mixers.base import MixerInput
from model.noise import row_keys
from model.positions.position import (
    AlibiConfig,
    LearnedPositionConfig,
    RelativeBias,
    RopeConfig,
    Rotation,
    alibi_bias,
    document_positions,
    rotation,
)
from model.slots import Record
from model.stack import Stack

ENCODER = "encoder_"
"""What the names of an encoder's inputs begin with: `encoder_tokens_BT` is its `tokens_BT`."""

TOWER = "tower_"
"""The same of a second tower's inputs: `tower_pixels_BAYX`."""


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
        distances: RelativeBias | None = None,
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
        self._is_random = any(
            isinstance(layer.ffn, MoeConfig) and layer.ffn.router.is_random for layer in config.layers
        )
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
        if self.prefix is not None and cache is None:
            raise ModelError(
                "a model with a prefix computes through a cache: pass cache=model.new_cache(rows, tokens)."
            )
        if targets_BT is not None:
            inputs["targets_BT"] = targets_BT
        if tokens_BT is not None:
            inputs["tokens_BT"] = tokens_BT
        own, targets, of_encoder, of_tower = self._sorted_out(inputs)
        slots_BT = None if cache is None or tokens_BT is None else cache.claim(tokens_BT.shape[1])
        positions_BT = self._positions(tokens_BT, documents_BT, positions_BT, slots_BT)
        if documents_BT is None:
            documents_BT = self.frontend.documents(own)
        x_BTD, codes = self._embedded(positions_BT, own)
        tokens = x_BTD.shape[1]
        mask = self._mask(tokens, documents_BT, prefix_B, globals_BT, slots_BT, cache)
        shared = self._shared(mask, x_BTD, tokens_BT, positions_BT, slots_BT, cache, lengths)
        heard: dict[str, torch.Tensor] = {}
        if self.encoder is not None:
            shared, heard = self._with_memory(shared, documents_BT, cache, of_encoder)
        x_BTD, records = self.stack(x_BTD, shared, None if cache is None else cache.states)
        if cache is not None:
            cache.advance([tokens] * x_BTD.shape[0] if lengths is None else lengths)
        targets |= codes
        if self.tower is not None and of_tower:
            targets["other_ND"] = self.tower(**of_tower)["features"]
        result: dict[str, torch.Tensor] = self.head(_chosen(x_BTD, logits_for), documents_BT, per_token, **targets)
        if "loss_sum" in result:
            told = with_encoders(heard, _routing(records, documents_BT, x_BTD))
            return result | _with_auxiliary(result["loss_sum"], told, lambda: self.head.row_targets(targets))
        return result | _routing(records, documents_BT, x_BTD) if isinstance(self.head, NoHead) else result

    def _sorted_out(self, inputs: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], ...]:
        """Whose is what: of the frontend, of the head, of the encoder and of the tower, these under their own names.

        Raises ModelError for inputs that this model does not take, and where its own are missing.
        """
        inner: list[dict[str, torch.Tensor]] = []
        for begin, module in ((ENCODER, self.encoder), (TOWER, self.tower)):
            named = {name: tensor for name, tensor in inputs.items() if name.startswith(begin)}
            if named and module is None:
                raise ModelError(
                    f"{', '.join(named)} was given, but the model has no {begin.rstrip('_')}: leave it out."
                )
            inner.append({name.removeprefix(begin): tensor for name, tensor in named.items()})
            inputs = {name: tensor for name, tensor in inputs.items() if name not in named}
        own = {name: tensor for name, tensor in inputs.items() if name not in self.head.takes}
        targets = {name: tensor for name, tensor in inputs.items() if name in self.head.takes | self.head.reads}
        known = {self.frontend.reads, *self.frontend.optional}
        if not own.keys() <= known or self.frontend.reads not in own:
            unknown = ", ".join(sorted(own.keys() - known)) or "nothing of what it reads"
            inner_names = [
                f"{begin}…" for begin, of in ((ENCODER, self.encoder), (TOWER, self.tower)) if of is not None
            ]
            raise ModelError(
                f"the model was given {unknown}: it reads {self.frontend.reads}, and takes "
                f"{', '.join([*sorted(known | self.head.takes), *inner_names])} besides documents_BT, positions_BT and "
                "what else forward names; give it those."
            )
        return own, targets, *inner

    def new_cache(self, rows: int, max_tokens: int, *, static: bool = False) -> Cache:
        """An empty cache for `rows` rows of at most `max_tokens` tokens, prompt and continuation together; see `Cache`."""
        if not self.config.causal:
            raise ModelError(
                "model.causal is false: an encoder sees what comes later, so it cannot continue from a cache."
            )
        offset = 0 if self.prefix is None else self.prefix.tokens
        device, slots = next(self.stack.parameters()).device, rounded_slots(max_tokens + offset)
        angles = self._rotation(torch.arange(slots, device=device)[None]) if self._rotates else None
        states = self.stack.new_states(rows, slots)
        if self.prefix is not None:
            own = [state.mixer if isinstance(state, BlockState) else state for state in states]
            for state, (k_KSC, v_KSC) in zip(own, self.prefix(), strict=True):
                assert isinstance(state, KeyValueState)
                state.begin(k_KSC, v_KSC)
        return Cache(states, rows, max_tokens, device, angles=angles, static=static, offset=offset)

    @property
    def _rotates(self) -> bool:
        return isinstance(self.config.position, RopeConfig) and self.config.head_dim is not None

    def _rotation(self, positions_BT: torch.Tensor) -> Rotation | None:
        """The angles of those positions, where the model rotates and attends."""
        position, head_dim = self.config.position, self.config.head_dim
        if not isinstance(position, RopeConfig) or head_dim is None:
            return None
        return rotation(position, positions_BT, head_dim)

    def _positions(
        self,
        tokens_BT: torch.Tensor | None,
        documents_BT: torch.Tensor | None,
        positions_BT: torch.Tensor | None,
        slots_BT: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """The position of every token; null where the input is not tokens."""
        if tokens_BT is None:
            return positions_BT
        tokens = tokens_BT.shape[1]
        if (
            isinstance(self.config.position, LearnedPositionConfig | GridPositionConfig)
            and tokens > self.config.max_seq_len
        ):
            raise ModelError(
                f"a row has {tokens} tokens, the model {self.config.max_seq_len} learned positions: shorten the rows "
                "or raise model.max_seq_len."
            )
        if positions_BT is not None:
            return positions_BT
        if documents_BT is not None:
            return document_positions(documents_BT)
        return torch.arange(tokens, device=tokens_BT.device)[None] if slots_BT is None else slots_BT

    def _embedded(
        self, positions_BT: torch.Tensor | None, own: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """x_BTD of the frontend, and what its codebook makes of the input if the head reads that."""
        if self.head.reads_codes:
            x_BTD, codes = self.frontend(positions_BT, with_codes=True, **own)
            return x_BTD, codes
        return self.frontend(positions_BT, **own), {}

    def _mask(
        self,
        tokens: int,
        documents_BT: torch.Tensor | None,
        prefix_B: torch.Tensor | None,
        globals_BT: torch.Tensor | None,
        slots_BT: torch.Tensor | None,
        cache: Cache | None,
    ) -> Mask:
        """Who sees whom, and the bias on scores of the models whose positions are one. A cache holds one document a row."""
        mask = Mask(
            causal=self.config.causal,
            documents_BT=documents_BT if cache is None else None,
            prefix_B=prefix_B,
            globals_BT=globals_BT,
        )
        # Of an empty cache the new tokens are all there is to see.
        if cache is not None and (cache.longest or cache.static or cache.offset):
            at_end = tokens == 1 and cache.common_slot is not None
            mask = replace(mask, slots_BT=slots_BT, keys=cache.slots_for(tokens), at_end=at_end)
        keys = mask.keys or tokens
        if isinstance(self.config.position, AlibiConfig):
            device = next(self.stack.parameters()).device
            return replace(mask, bias_HL=alibi_bias(self.config.attention_heads, keys, device))
        return mask if self.distances is None else replace(mask, bias_HL=self.distances(keys))

    def _shared(
        self,
        mask: Mask,
        x_BTD: torch.Tensor,
        tokens_BT: torch.Tensor | None,
        positions_BT: torch.Tensor | None,
        slots_BT: torch.Tensor | None,
        cache: Cache | None,
        lengths: Sequence[int] | None,
    ) -> MixerInput:
        """What all layers share of this pass; without positions tokens count from 0."""
        tokens, device = x_BTD.shape[1], x_BTD.device
        draws = self._is_random and self.training and cache is None
        if positions_BT is None:
            positions_BT = torch.arange(tokens, device=device)[None]
        if cache is not None and slots_BT is not None and positions_BT is slots_BT:
            angles = cache.rotation(slots_BT)
        else:
            angles = self._rotation(positions_BT)
        return MixerInput(
            mask,
            angles,
            slots_BT,
            None if cache is None else cache.common_slot,
            windowed={window: replace(mask, window=window) for window in self.config.windows},
            row_keys_B=row_keys(tokens_BT) if draws and tokens_BT is not None else None,
            lengths_B=None if lengths is None or min(lengths) >= tokens else torch.tensor(lengths, device=device),
        )

    def _with_memory(
        self,
        shared: MixerInput,
        documents_BT: torch.Tensor | None,
        cache: Cache | None,
        of_encoder: dict[str, torch.Tensor],
    ) -> tuple[MixerInput, dict[str, torch.Tensor]]:
        """With the encoder's output and who sees what of it, from the cache where this pass brings no encoder inputs; and
        what else the encoder told."""
        assert self.encoder is not None
        if not of_encoder:
            if cache is None or not cache.longest:
                raise ModelError("the model has an encoder: give its input too, as encoder_tokens_BT.")
            mask = Mask(causal=False, key_documents_BS=cache.memory_documents_BS)
            return replace(shared, memory_mask=mask), {}
        heard = self.encoder(**of_encoder)
        memory_BSD = heard.pop("features")
        memory_documents_BS = of_encoder.get("documents_BT")
        if memory_documents_BS is None:
            memory_documents_BS = self.encoder.frontend.documents(of_encoder)
        if cache is not None:
            cache.memory_documents_BS = memory_documents_BS
        queries_BT = None if cache is not None or memory_documents_BS is None else documents_BT
        mask = Mask(causal=False, documents_BT=queries_BT, key_documents_BS=memory_documents_BS)
        return replace(shared, memory_BSD=memory_BSD, memory_mask=mask), heard


def _chosen(x_BTD: torch.Tensor, logits_for: Literal["all", "last"] | torch.Tensor) -> torch.Tensor:
    """The tokens whose logits are asked for: [B, T or 1, D]."""
    if isinstance(logits_for, torch.Tensor):
        return x_BTD[torch.arange(x_BTD.shape[0], device=x_BTD.device), logits_for][:, None]
    return x_BTD[:, -1:] if logits_for == "last" else x_BTD


def _routing(records: list[Record], documents_BT: torch.Tensor | None, x_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
    """Counts of what the layers routed, and "auxiliary_B", the sum of their auxiliary losses; {} where no layer has
    experts."""
    if not any(records):
        return {}
    places = x_BTD.shape[0] * x_BTD.shape[1]
    tokens = torch.full((), places, device=x_BTD.device) if documents_BT is None else (documents_BT != 0).sum()
    told = routing_counts(records, tokens)
    losses = [record["auxiliary_B"] for record in records if "auxiliary_B" in record]
    return {**told, "auxiliary_B": torch.stack(losses).sum(0)} if losses else told


def _with_auxiliary(
    loss_sum: torch.Tensor, told: dict[str, torch.Tensor], row_targets: Callable[[], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What was told of routing, with the auxiliary losses in the gradient of `loss_sum`, not in its value, as the head
    does with its own.

    The losses are means over the tokens of a row, an encoder's over its own; a row weighs as many targets as it has. So
    they are a sum like Σ NLL: divided by the targets of all micro-batches and ranks it is the same whichever way rows
    are shared out.
    """
    counts = {name: tensor for name, tensor in told.items() if name != "auxiliary_B"}
    if "auxiliary_B" not in told:
        return counts
    auxiliary = (told["auxiliary_B"] * row_targets()).sum()
    return {**counts, "loss_sum": loss_sum + (auxiliary - auxiliary.detach()), "aux_loss_sum": auxiliary.detach()}
