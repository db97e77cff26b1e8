"""What a model is: the whole architecture as one frozen value."""

from dataclasses import dataclass, field

from model.block import Layout
from model.errors import ModelError
from model.ffn import FfnConfig
from model.init import InitConfig, Role, parameter_roles
from model.mixers.attention import AttentionConfig
from model.norm import NormConfig
from model.position import LearnedPositionConfig, NoPositionConfig, RopeConfig

__all__ = ["ModelConfig", "ModelError", "Role", "parameter_roles"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder over tokens.

    vocab_size: null until a tokenizer is known; `build_model` needs a number.
    max_seq_len: the longest row the model is meant for; learned positions end there.
    layout: where the norms stand in a block (see `Block`). dropout: on embeddings and on each branch of a block.
    logit_soft_cap: logits are squashed to ±cap (Gemma 2). z_loss: weight of logsumexp² in the training objective.
    """

    vocab_size: int | None = None
    d_model: int = 256
    n_layers: int = 6
    max_seq_len: int = 512
    tie_embeddings: bool = True
    layout: Layout = "pre"
    norm: NormConfig = field(default_factory=NormConfig)
    position: RopeConfig | LearnedPositionConfig | NoPositionConfig = field(default_factory=RopeConfig)
    mixer: AttentionConfig = field(default_factory=AttentionConfig)
    ffn: FfnConfig = field(default_factory=FfnConfig)
    init: InitConfig = field(default_factory=InitConfig)
    dropout: float = 0.0
    logit_soft_cap: float | None = None
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "max_seq_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ModelError(f"model.{name} is {value}: it counts something and must be at least 1.")
        if self.mixer.head_dim is None and self.d_model % self.mixer.n_heads:
            raise ModelError(
                f"model.d_model is {self.d_model} with mixer.n_heads {self.mixer.n_heads}: heads share the width "
                "equally, so n_heads must divide d_model; change one of them or set mixer.head_dim."
            )
        if self.mixer.channels(self.d_model) % 2 and isinstance(self.position, RopeConfig):
            raise ModelError(
                f"model.d_model {self.d_model} over {self.mixer.n_heads} heads leaves "
                f"{self.mixer.channels(self.d_model)} channels a head: rotary positions rotate pairs, so make it even."
            )
        if not 0 <= self.dropout < 1:
            raise ModelError(f"model.dropout is {self.dropout}: it is a probability below 1; use 0 for none.")
        if self.logit_soft_cap is not None and self.logit_soft_cap <= 0:
            raise ModelError(f"model.logit_soft_cap is {self.logit_soft_cap}: use a positive cap such as 30, or null.")
        if self.z_loss < 0:
            raise ModelError(f"model.z_loss is {self.z_loss}: a loss needs a weight of 0 or more.")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.mixer.channels(self.d_model)

    def require_vocab_size(self) -> int:
        """The vocabulary size, or ModelError while no tokenizer has set it."""
        if self.vocab_size is None:
            raise ModelError(
                "model.vocab_size is null: a model needs its tokenizer's vocabulary size before it can be built or "
                "counted; run the tokenizer step first or set model.vocab_size."
            )
        return self.vocab_size
