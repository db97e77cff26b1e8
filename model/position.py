"""Where a token stands: rotary embeddings, learned tables, and positions that restart with every document."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from model.errors import ModelError
from model.init import Declared, Parameter, declare


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the long wavelengths, from a context of `original_max_seq_len` to `factor` times that."""

    kind: Literal["llama3"] = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        if self.factor < 1 or not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ModelError(
                f"position.scaling has factor={self.factor}, low_freq_factor={self.low_freq_factor}, "
                f"high_freq_factor={self.high_freq_factor}: the factor must be at least 1 and the frequencies positive "
                "and in rising order; Llama 3.1 uses 8, 1 and 4."
            )


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023): every position is divided by `factor`."""

    kind: Literal["linear"] = "linear"
    factor: float = 2.0

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ModelError(f"position.scaling.factor is {self.factor}: stretching a context needs at least 1.")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021), rotating the two halves of a head against each other."""

    kind: Literal["rope"] = "rope"
    theta: float = 10000.0
    scaling: Llama3Scaling | LinearScaling | None = None

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise ModelError(f"position.theta is {self.theta}: wavelengths need a base above 1, e.g. 10000.")


@dataclass(frozen=True, kw_only=True)
class LearnedPositionConfig:
    """One learned vector per position, added to the token embedding (GPT-2)."""

    kind: Literal["learned"] = "learned"


@dataclass(frozen=True, kw_only=True)
class NoPositionConfig:
    """No positional signal but the causal mask (NoPE)."""

    kind: Literal["none"] = "none"


PositionConfig = RopeConfig | LearnedPositionConfig | NoPositionConfig


@dataclass(frozen=True)
class Rotation:
    """The angles of every token, shared by all layers: fp32 [B or 1, T, 1, C], the sine of the first half negated."""

    cos_BT1C: torch.Tensor
    sin_BT1C: torch.Tensor

    def __call__(self, x_BTHC: torch.Tensor) -> torch.Tensor:
        """Rotate queries or keys; computed in fp32, returned in the precision of the input."""
        low_BTHC, high_BTHC = x_BTHC.chunk(2, dim=-1)
        swapped_BTHC = torch.cat((high_BTHC, low_BTHC), dim=-1)
        return (x_BTHC * self.cos_BT1C + swapped_BTHC * self.sin_BT1C).to(x_BTHC.dtype)


def rotation(config: RopeConfig, positions_BT: torch.Tensor, head_dim: int) -> Rotation:
    """cos and sin for integer positions of any range; nothing is tabulated, so no buffer can be cast to bf16."""
    inverse_C = inverse_frequencies(config, head_dim, positions_BT.device)
    angles_BT1C = (positions_BT.float()[..., None] * inverse_C)[..., None, :]
    cos_BT1C, sin_BT1C = angles_BT1C.cos(), angles_BT1C.sin()
    return Rotation(torch.cat((cos_BT1C, cos_BT1C), dim=-1), torch.cat((-sin_BT1C, sin_BT1C), dim=-1))


def inverse_frequencies(config: RopeConfig, head_dim: int, device: torch.device) -> torch.Tensor:
    """fp32 radians per position of each channel pair, after scaling; [C/2]."""
    exponent_C = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    inverse_C = 1.0 / (config.theta**exponent_C)
    scaling = config.scaling
    if scaling is None:
        return inverse_C
    if isinstance(scaling, LinearScaling):
        return inverse_C / scaling.factor
    wavelength_C = 2 * math.pi / inverse_C
    low = scaling.original_max_seq_len / scaling.low_freq_factor
    high = scaling.original_max_seq_len / scaling.high_freq_factor
    blend_C = (scaling.original_max_seq_len / wavelength_C - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended_C = (1 - blend_C) * inverse_C / scaling.factor + blend_C * inverse_C
    scaled_C = torch.where(wavelength_C > low, inverse_C / scaling.factor, blended_C)
    return torch.where(wavelength_C < high, inverse_C, scaled_C)


class LearnedPositions(Declared):
    """A table of [max_seq_len, D]; positions beyond it are a user's error, caught where lengths are known."""

    declared = declare(weight=Parameter("embedding", "embedding"))

    def __init__(self, max_seq_len: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_seq_len, d_model))

    def forward(self, positions_BT: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(positions_BT, self.weight)


def document_starts(documents_BT: torch.Tensor) -> torch.Tensor:
    """bool: true for the first token of every document and of every run of padding."""
    return documents_BT != nn.functional.pad(documents_BT[:, :-1], (1, 0), value=-1)


def document_positions(documents_BT: torch.Tensor) -> torch.Tensor:
    """int64 position of each token within its document, where a document is a run of equal numbers in a row."""
    index_BT = torch.arange(documents_BT.shape[1], device=documents_BT.device).expand(documents_BT.shape)
    start_BT = torch.where(document_starts(documents_BT), index_BT, 0).cummax(dim=1).values
    return index_BT - start_BT
