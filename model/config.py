"""What a model is: the whole architecture as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from model.block import Layout
from model.errors import ModelError, check_counts
from model.ffns.build import AnyFfnConfig
from model.ffns.dense import FfnConfig
from model.ffns.experts.config import MoeConfig
from model.frontends.text import FrontendConfig, TokenFrontendConfig
from model.grid import Grid, GridPositionConfig
from model.heads.classifiers import ClassifierHeadConfig, SpanHeadConfig, TokenClassifierHeadConfig
from model.heads.ctc import CtcHeadConfig
from model.heads.distractor import DistractorHeadConfig
from model.heads.embedding import EmbeddingHeadConfig
from model.heads.language import LanguageHeadConfig, NoHeadConfig
from model.init import InitConfig, Role, parameter_roles
from model.mixers.attention import AttentionConfig
from model.mixers.bigbird import BigBirdConfig
from model.mixers.build import MixerConfig
from model.mixers.grid import GridAttentionConfig
from model.mixers.latent import LatentAttentionConfig
from model.mixers.longformer import LongformerConfig
from model.mixers.mamba import MambaConfig
from model.norms.norm import NormConfig
from model.positions.position import AlibiConfig, PositionConfig, RelativePositionConfig, RopeConfig

__all__ = ["LayerChange", "LayerConfig", "ModelConfig", "ModelError", "Role", "parameter_roles"]

HeadConfig = (
    LanguageHeadConfig
    | ClassifierHeadConfig
    | TokenClassifierHeadConfig
    | SpanHeadConfig
    | CtcHeadConfig
    | EmbeddingHeadConfig
    | DistractorHeadConfig
    | NoHeadConfig
)


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What fills the slots of one layer."""

    mixer: MixerConfig
    """How tokens are mixed."""
    cross: AttentionConfig | None
    """Attention to an encoder's output; null in models without one."""
    ffn: AnyFfnConfig
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
    ffn: AnyFfnConfig | None = None
    """Null: as the model has it."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.first < 0:
            raise ModelError(
                f"model.pattern has every={self.every}, first={self.first}: layers are counted from 0, and every k-th "
                "needs a k of at least 1."
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
    ffn: AnyFfnConfig = field(default_factory=FfnConfig)
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
        check_counts("model", self, "vocab_size", "d_model", "n_layers", "max_seq_len")
        for change in self.pattern:
            if change.first >= self.n_layers:
                raise ModelError(
                    f"model.pattern has first={change.first} with n_layers={self.n_layers}: layers are counted from 0, so "
                    "it changes none; lower first, or leave the change out."
                )
        for layer in self.layers:
            layer.mixer.check(self.d_model)
        if isinstance(self.position, RopeConfig):
            self._check_rotary()
        for layer in self.layers:
            if self.causal and isinstance(layer.mixer, LongformerConfig | BigBirdConfig):
                raise ModelError(
                    f"model.causal is true with mixer.kind={layer.mixer.kind}, whose global tokens see what is ahead: "
                    "set causal=false, or take mixer.kind=attention with a window."
                )
            if not self.causal and isinstance(layer.mixer, MambaConfig | GridAttentionConfig):
                raise ModelError(
                    f"model.causal is false with mixer.kind={layer.mixer.kind}, which looks back only: set causal=true, or "
                    "take attention or linear attention."
                )
        routers = [layer.ffn.router for layer in self.layers if isinstance(layer.ffn, MoeConfig)]
        if any(router.is_random for router in routers) and not isinstance(self.frontend, TokenFrontendConfig):
            raise ModelError(
                f"model.frontend.kind is {self.frontend.kind} with ffn.router.jitter or second_by_chance: a router's "
                "noise is a function of a row's tokens, and here there are none; set jitter to 0 and second_by_chance to "
                "false."
            )
        for weight in getattr(self.head, "weights", ()):
            if self.vocab_size is not None and weight.first >= self.vocab_size:
                raise ModelError(
                    f"head.weights has first={weight.first} with vocab_size={self.vocab_size}: no target reaches it; name "
                    "an entry of the vocabulary."
                )
        if self.encoder is not None:
            self._check_encoder(self.encoder)
        self._check_tower(self.tower)
        if self.grids or isinstance(self.position, GridPositionConfig):
            self._check_grids()
        if isinstance(self.position, AlibiConfig | RelativePositionConfig):
            self._check_distances()
        if self.causal and getattr(self.head, "pool", None) == "first":
            raise ModelError(
                f"model.causal is true with head.kind={self.head.kind} and head.pool first: the first token sees itself "
                "alone, so its vector says nothing of the rest; set causal=false, or another pool."
            )
        if not 0 <= self.dropout < 1:
            raise ModelError(f"model.dropout is {self.dropout}: it is a probability below 1; use 0 for none.")
        if self.logit_soft_cap is not None and self.logit_soft_cap <= 0:
            raise ModelError(f"model.logit_soft_cap is {self.logit_soft_cap}: use a positive cap such as 30, or null.")
        if self.z_loss < 0:
            raise ModelError(f"model.z_loss is {self.z_loss}: a loss needs a weight of 0 or more.")

    def _check_encoder(self, encoder: ModelConfig) -> None:
        if encoder.encoder is not None or not isinstance(encoder.head, NoHeadConfig):
            raise ModelError(
                f"model.encoder.head.kind is {encoder.head.kind} and there is {'an' if encoder.encoder else 'no'} encoder "
                "of its own: its output goes to the decoder as it is; set model.encoder.head.kind=none and no encoder."
            )
        if not self.causal:
            raise ModelError(
                "model.causal is false with an encoder: what reads an encoder's output is a causal decoder."
            )
        if self.layout in ("parallel", "parallel_two_norms"):
            raise ModelError(
                f"model.layout is {self.layout} with an encoder: that block has no cross-attention; use pre or post."
            )
        if not all(isinstance(layer.mixer, AttentionConfig) for layer in self.layers):
            raise ModelError("model.encoder needs attention layers: cross-attention takes its shape from the mixer.")
        if (encoder.tie_embeddings and encoder.frontend.uses_vocabulary) and (
            encoder.d_model != self.d_model or encoder.vocab_size not in (None, self.vocab_size)
        ):
            raise ModelError(
                f"model.encoder.tie_embeddings is true with d_model {encoder.d_model} and vocab_size {encoder.vocab_size}: "
                f"its table is the decoder's, which has {self.d_model} and {self.vocab_size}; make them equal or set "
                "model.encoder.tie_embeddings=false."
            )

    def _check_tower(self, tower: ModelConfig | None) -> None:
        own = self.head if isinstance(self.head, EmbeddingHeadConfig) else None
        if (tower is not None) != (own is not None and own.contrast):
            raise ModelError(
                f"model.tower is {'null' if tower is None else 'set'} with head {self.head}: a tower is there to be "
                "compared with; set model.head.kind=embedding with model.head.contrast=true and a tower, or neither."
            )
        if tower is None or own is None:
            return
        if any(isinstance(layer.ffn, MoeConfig) for layer in tower.layers):
            raise ModelError(
                "model.tower.ffn.kind is moe: its rows are not this model's, so what its routers lose has no row to be "
                "weighed with; give experts to this model, or none."
            )
        other = tower.head if isinstance(tower.head, EmbeddingHeadConfig) else None
        if other is None or other.contrast or other.width != own.width:
            raise ModelError(
                f"model.tower has head {tower.head}: its vectors are compared with this model's, so it needs "
                f"model.tower.head.kind=embedding, model.tower.head.width={own.width} and model.tower.head.contrast=false."
            )

    def _check_distances(self) -> None:
        mixers = [layer.mixer for layer in self.layers]
        others: list[MixerConfig] = [mixer for mixer in mixers if isinstance(mixer, LongformerConfig | BigBirdConfig)]
        if others or not self._attentions:
            raise ModelError(
                f"model.position.kind is {self.position.kind} with mixer.kind={(others or mixers)[0].kind}: it is a bias on "
                "the scores of plain or latent attention, which other mixers do not add; set model.position.kind=none or "
                "learned, or take mixer.kind=attention."
            )
        if len({mixer.n_heads for mixer in self._attentions}) > 1:
            raise ModelError(
                "model.pattern gives attention layers different n_heads: all layers share one ALiBi slope or one table "
                "of distances for each head; give them the same n_heads or choose other positions."
            )

    def _check_rotary(self) -> None:
        if not self._attentions:
            raise ModelError(
                f"model.position.kind is rope, but no layer attends (mixer.kind is {self.mixer.kind}): rotary positions "
                "turn queries and keys; set model.position.kind=none, or learned."
            )
        channels = sorted({mixer.channels(self.d_model) for mixer in self._attentions})
        if len(channels) > 1:
            raise ModelError(
                f"model.pattern gives attention layers {' and '.join(map(str, channels))} channels a head: all layers "
                "share one set of rotary angles; set mixer.head_dim to the same everywhere."
            )
        rotated = self.position.channels if isinstance(self.position, RopeConfig) else None
        if channels and rotated is not None and rotated > channels[0]:
            raise ModelError(
                f"model.position.channels is {rotated} with heads of {channels[0]} channels: no more can be rotated than "
                "there are; lower it, or null rotates all."
            )
        if channels and rotated is None and channels[0] % 2:
            raise ModelError(
                f"model.d_model {self.d_model} over {self._attentions[0].n_heads} heads leaves {channels[0]} channels "
                "a head: rotary positions rotate pairs, so make it even."
            )

    def _check_grids(self) -> None:
        position, kind = self.position, self.position.kind
        if self.grids and kind not in ("grid", "learned", "sinusoidal", "none"):
            raise ModelError(
                f"model.position.kind is {kind} with mixer.kind=grid, where a distance says little: choose grid, or learned."
            )
        if isinstance(position, GridPositionConfig):
            for grid in self.grids:
                if (grid.text, grid.width) != (position.text, position.width):
                    raise ModelError(
                        f"model.mixer has text={grid.text} width={grid.width}, model.position has text={position.text} "
                        f"width={position.width}: both are of the same image; make them equal."
                    )
            if self.max_seq_len > position.tokens:
                raise ModelError(
                    f"model.max_seq_len is {self.max_seq_len}: model.position has places for {position.tokens}, text and "
                    "image together; lower it, or make those larger."
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
            cross = mixer if self.encoder is not None and isinstance(mixer, AttentionConfig) else None
            layers.append(LayerConfig(mixer=mixer, cross=cross, ffn=ffn))
        return tuple(layers)

    @property
    def tied_weights(self) -> dict[str, str]:
        """Names of the parameters that are another one under a second name, each with that one's."""
        table, tied = "frontend.tokens.weight", {}
        if self.tie_embeddings and self.frontend.uses_vocabulary and isinstance(self.head, LanguageHeadConfig):
            tied["head.weight"] = table
        if self.encoder is not None and self.encoder.tie_embeddings and self.encoder.frontend.uses_vocabulary:
            tied[f"encoder.{table}"] = table
        return tied

    @property
    def _attentions(self) -> list[AttentionConfig | LatentAttentionConfig]:
        mixers = [layer.mixer for layer in self.layers]
        return [mixer for mixer in mixers if isinstance(mixer, AttentionConfig | LatentAttentionConfig)]

    @property
    def attention_heads(self) -> int:
        """Query heads of the attention layers; 0 where no layer attends."""
        return self._attentions[0].n_heads if self._attentions else 0

    @cached_property
    def windows(self) -> tuple[int, ...]:
        """Every window that some layer has."""
        windows = {getattr(layer.mixer, "window", None) for layer in self.layers}
        return tuple(sorted(window for window in windows if window is not None))

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        """Every grid that some layer sees its row as."""
        grids = (layer.mixer.grid for layer in self.layers if isinstance(layer.mixer, GridAttentionConfig))
        return tuple(dict.fromkeys(grids))

    @property
    def head_dim(self) -> int | None:
        """Channels of one attention head, those that can be turned if it keeps others; none where no layer attends."""
        return self._attentions[0].channels(self.d_model) if self._attentions else None

    @property
    def n_positions(self) -> int:
        """How many positions a row can have: as many as the frontend makes, where it always makes the same."""
        return self.frontend.tokens or self.max_seq_len

    @property
    def rotated_channels(self) -> int | None:
        """Channels of a head that rotary positions rotate."""
        chosen = self.position.channels if isinstance(self.position, RopeConfig) else None
        return self.head_dim if chosen is None else chosen

    def require_vocab_size(self) -> int:
        """The vocabulary size, or ModelError while no tokenizer has set it; 0 for a model of images that needs none."""
        if not self.frontend.uses_vocabulary and not isinstance(self.head, LanguageHeadConfig | CtcHeadConfig):
            return 0
        if self.vocab_size is None:
            raise ModelError(
                "model.vocab_size is null: a model needs its tokenizer's vocabulary size before it can be built or "
                "counted; run the tokenizer step first or set model.vocab_size."
            )
        return self.vocab_size
