"""What a model is: the whole architecture as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from conf.refusal import NO_VALUE, Refusal, Shown
from conf.refusal import field as key
from model.block import Layout
from model.ffns.base import AbstractFfnConfig
from model.ffns.dense import FfnConfig
from model.frontends.base import FrontendConfig
from model.frontends.text import TokenFrontendConfig
from model.heads.base import HeadConfig
from model.heads.language import LanguageHeadConfig
from model.init import InitConfig, Role, parameter_roles
from model.limits import check_counts
from model.mixers.attention import AttentionConfig
from model.mixers.base import MixerConfig, PositionedHeads
from model.norms.norm import NormConfig
from model.positions.base import PositionConfig
from model.positions.grid import Grid
from model.positions.rope import RopeConfig

if TYPE_CHECKING:
    import torch

    from model.positions.base import Rotation

__all__ = ["LayerChange", "LayerConfig", "ModelConfig", "Role", "parameter_roles"]


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What fills the slots of one layer."""

    mixer: MixerConfig
    """How tokens are mixed."""
    cross: MixerConfig | None
    """Attention to an encoder's output; null in models without one."""
    ffn: AbstractFfnConfig
    """What stands behind the mixer."""


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """Other parts in some layers: in layers `first`, `first + every`, `first + 2 * every` … (hybrids, experts every
    second layer).
    """

    every: int = 1
    """Layers from one changed layer to the next."""
    first: int = 0
    """The first changed layer, counted from 0."""
    mixer: MixerConfig | None = None
    """Null: as the model has it."""
    ffn: AbstractFfnConfig | None = None
    """Null: as the model has it."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.first < 0:
            raise Refusal(
                "",
                NO_VALUE,
                (
                    f"has every={self.every}, first={self.first}: layers are counted "
                    "from 0, and every k-th needs a k of at least 1"
                ),
            )

    def covers(self, layer: int) -> bool:
        """Whether this changes layer number `layer`."""
        return layer >= self.first and (layer - self.first) % self.every == 0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A transformer: a decoder over tokens, or whatever else frontend, causal, encoder and head make of it."""

    vocab_size: int | None = None
    """Entries of the vocabulary; null until a tokenizer is known, and `build_model` needs a number."""
    d_model: int = 256
    """Channels of the residual stream."""
    n_layers: int = 6
    """Blocks."""
    max_seq_len: int = 512
    """Tokens of the longest row the model is meant for; learned positions end there."""
    tie_embeddings: bool = True
    """The head's matrix is the token embedding's; of an encoder: its embedding is the decoder's."""
    causal: bool = True
    """A token sees itself and what stands before it; false: an encoder, where all see all."""
    layout: Layout = "pre"
    """Where the norms stand in a block (see `Block`)."""
    norm: NormConfig = field(default_factory=NormConfig)
    """Of the blocks and behind the last one."""
    frontend: FrontendConfig = field(default_factory=TokenFrontendConfig)
    """What makes vectors of the input."""
    position: PositionConfig = field(default_factory=RopeConfig)
    """How a token's place is known."""
    mixer: MixerConfig = field(default_factory=AttentionConfig)
    """What mixes tokens, in every layer."""
    ffn: AbstractFfnConfig = field(default_factory=FfnConfig)
    """What stands behind the mixer, in every layer."""
    pattern: tuple[LayerChange, ...] = ()
    """Layers that have something else there; later changes win."""
    head: HeadConfig = field(default_factory=LanguageHeadConfig)
    """What is made of the last vectors."""
    encoder: ModelConfig | None = None
    """Runs before this decoder and is read by its cross-attention, which has the mixer's shape; its head is none, and
    its vocabulary this one's where it is null."""
    tower: ModelConfig | None = None
    """A second model that reads something else and is compared with this one (CLIP); both have head embedding."""
    init: InitConfig = field(default_factory=InitConfig)
    """How weights start."""
    dropout: float = 0.0
    """Probability on embeddings and on each branch of a block."""
    logit_soft_cap: float | None = None
    """Logits are squashed to ±this (Gemma 2); null: as they are."""
    z_loss: float = 0.0
    """Weight of logsumexp² in the training objective."""

    def __post_init__(self) -> None:
        check_counts(self, "vocab_size", "d_model", "n_layers", "max_seq_len")
        for change in self.pattern:
            if change.first >= self.n_layers:
                raise Refusal(
                    "pattern",
                    NO_VALUE,
                    (
                        f"has first={change.first} with n_layers={self.n_layers}: layers are counted from 0, so it"
                        " changes none"
                    ),
                    "lower first, or leave the change out",
                )
        for layer in self.layers:
            layer.mixer.check(self)
        self.position.check(self)
        if self.is_random and not self.frontend.uses_vocabulary:
            raise Refusal(
                "frontend.kind",
                self.frontend.kind,
                (
                    "with ffn.router.jitter or second_by_chance: a router's noise is a function of a row's "
                    "tokens, and here there are none"
                ),
                "set jitter to 0 and second_by_chance to false",
            )
        if self.encoder is not None:
            self._check_encoder(self.encoder)
        if (self.tower is not None) != self.head.compares:
            raise Refusal(
                "tower",
                None if self.tower is None else Shown("…"),
                f"with head {self.head}: a tower is there to be compared with",
                f"set {key('head.kind')}=embedding with {key('head.contrast')}=true and a tower, or neither",
            )
        self.head.check(self)
        if self.causal and self.head.pools_first:
            raise Refusal(
                "causal",
                True,
                (
                    f"with {key('head.kind')}={self.head.kind} and head.pool first: the first token sees "
                    "itself alone, so its vector says nothing of the rest"
                ),
                f"set {key('causal')}=false, or another pool",
            )
        if not 0 <= self.dropout < 1:
            raise Refusal("dropout", self.dropout, "it is a probability below 1", "use 0 for none")
        if self.logit_soft_cap is not None and self.logit_soft_cap <= 0:
            raise Refusal("logit_soft_cap", self.logit_soft_cap, "use a positive cap such as 30, or null")
        if self.z_loss < 0:
            raise Refusal("z_loss", self.z_loss, "a loss needs a weight of 0 or more")

    def _check_encoder(self, encoder: ModelConfig) -> None:
        if encoder.encoder is not None or not encoder.head.passes_features:
            raise Refusal(
                "encoder.head.kind",
                encoder.head.kind,
                (
                    f"and there is {'an' if encoder.encoder else 'no'} encoder of its own: its output goes to "
                    "the decoder as it is"
                ),
                f"set {key('encoder.head.kind')}=none and no encoder",
            )
        if not self.causal:
            raise Refusal("causal", False, "with an encoder: what reads an encoder's output is a causal decoder")
        if self.layout in ("parallel", "parallel_two_norms"):
            raise Refusal(
                "layout", self.layout, "with an encoder: that block has no cross-attention", "use pre or post"
            )
        if not all(layer.mixer.crosses for layer in self.layers):
            raise Refusal(
                "encoder", Shown("…"), "it needs attention layers: cross-attention takes its shape from the mixer"
            )
        if (encoder.tie_embeddings and encoder.frontend.uses_vocabulary) and (
            encoder.d_model != self.d_model or encoder.vocab_size not in (None, self.vocab_size)
        ):
            raise Refusal(
                "encoder.tie_embeddings",
                True,
                (
                    f"with d_model {encoder.d_model} and vocab_size {encoder.vocab_size}: its table is the "
                    f"decoder's, which has {self.d_model} and {self.vocab_size}"
                ),
                f"make them equal or set {key('encoder.tie_embeddings')}=false",
            )

    @cached_property
    def layers(self) -> tuple[LayerConfig, ...]:
        """What fills the slots of every layer, the pattern applied."""
        layers = []
        for number in range(self.n_layers):
            mixer, ffn = self.mixer, self.ffn
            for change in self.pattern:
                if change.covers(number):
                    mixer, ffn = change.mixer or mixer, change.ffn or ffn
            cross = mixer if self.encoder is not None and mixer.crosses else None
            layers.append(LayerConfig(mixer=mixer, cross=cross, ffn=ffn))
        return tuple(layers)

    @property
    def tied_weights(self) -> dict[str, str]:
        """Names of the parameters that are another one under a second name, each with that one's."""
        table, tied = "frontend.tokens.weight", {}
        if self.tie_embeddings and self.frontend.uses_vocabulary and self.head.can_tie:
            tied["head.weight"] = table
        if self.encoder is not None and self.encoder.tie_embeddings and self.encoder.frontend.uses_vocabulary:
            tied[f"encoder.{table}"] = table
        return tied

    @cached_property
    def positioned_heads(self) -> tuple[PositionedHeads, ...]:
        """Of each layer that has them, the heads that rotary positions and biases by distance act on."""
        heads = (layer.mixer.positioned_heads(self.d_model) for layer in self.layers)
        return tuple(each for each in heads if each is not None)

    @property
    def attention_heads(self) -> int:
        """Query heads of the attention layers; 0 where no layer attends."""
        return self.positioned_heads[0].heads if self.positioned_heads else 0

    @cached_property
    def windows(self) -> tuple[int, ...]:
        """Every window that some layer has."""
        windows = {layer.mixer.reach() for layer in self.layers}
        return tuple(sorted(window for window in windows if window is not None))

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        """Every grid that some layer sees its row as."""
        grids = (layer.mixer.image() for layer in self.layers)
        return tuple(dict.fromkeys(grid for grid in grids if grid is not None))

    @cached_property
    def is_random(self) -> bool:
        """Whether some layer draws random numbers in training, dropout aside: a function of each row's tokens."""
        return any(layer.ffn.is_random for layer in self.layers)

    @property
    def head_dim(self) -> int | None:
        """Channels of one attention head, those that can be turned if it keeps others; none where no layer attends."""
        return self.positioned_heads[0].channels if self.positioned_heads else None

    def rotation(self, positions_BT: torch.Tensor) -> Rotation | None:
        """The angles of those positions, where the model rotates and attends."""
        return None if self.head_dim is None else self.position.rotation(positions_BT, self.head_dim)

    @property
    def n_positions(self) -> int:
        """How many positions a row can have: as many as the frontend makes, where it always makes the same."""
        return self.frontend.tokens or self.max_seq_len

    @property
    def rotated_channels(self) -> int | None:
        """Channels of a head that rotary positions rotate."""
        return None if self.head_dim is None else self.position.rotated_channels(self.head_dim)

    def require_vocab_size(self) -> int:
        """The vocabulary size, or Refusal while no tokenizer has set it; 0 for a model of images that needs none."""
        if not self.frontend.uses_vocabulary and not self.head.uses_vocabulary:
            return 0
        if self.vocab_size is None:
            raise Refusal(
                "model.vocab_size",
                None,
                "a model needs its tokenizer's vocabulary size before it can be built or counted",
                "run the tokenizer step first or set model.vocab_size",
            )
        return self.vocab_size
