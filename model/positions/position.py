"""Where a token stands: rotary embeddings, learned tables, and positions that restart with every document."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from model.errors import ModelError
from model.grid import GridPositionConfig, GridPositions
from model.init import Declared, Parameter, declare


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the long wavelengths, from a context of `original_max_seq_len` to `factor` times that."""

    kind: Literal["llama3"] = "llama3"
    """Which part this is."""
    factor: float = 8.0
    """The stretch of the long wavelengths."""
    low_freq_factor: float = 1.0
    """Wavelengths that turn fewer times in the original context are stretched whole."""
    high_freq_factor: float = 4.0
    """Those that turn more often are left."""
    original_max_seq_len: int = 8192
    """Tokens of the context before."""

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
    """Which part this is."""
    factor: float = 2.0
    """What positions are divided by."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ModelError(f"position.scaling.factor is {self.factor}: stretching a context needs at least 1.")


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071): long wavelengths stretched, short ones left.

    Scores become sharper, as m(w) = 0.1 w ln(factor) + 1 says: queries and keys are multiplied by m(mscale) / m(mscale_all),
    or by m(1) where one of the two is 0; scores of latent attention by m(mscale_all)² besides.
    """

    kind: Literal["yarn"] = "yarn"
    """Which part this is."""
    factor: float = 4.0
    """The stretch."""
    beta_fast: float = 32.0
    """Wavelengths that turn more often than this within the original context are left."""
    beta_slow: float = 1.0
    """Those that turn fewer times are stretched whole."""
    original_max_seq_len: int = 4096
    """Tokens of the context before."""
    mscale: float = 0.0
    """w of the first m."""
    mscale_all: float = 0.0
    """w of the second."""

    def __post_init__(self) -> None:
        if self.factor < 1 or not 0 < self.beta_slow < self.beta_fast or min(self.mscale, self.mscale_all) < 0:
            raise ModelError(
                f"position.scaling has factor={self.factor}, beta_slow={self.beta_slow}, beta_fast={self.beta_fast}, "
                f"mscale={self.mscale}, mscale_all={self.mscale_all}: the factor must be at least 1, the numbers of turns "
                "positive and in rising order, the weights 0 or more; DeepSeek-V3 uses 40, 1, 32, 1 and 1."
            )

    def _m(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1

    @property
    def amplitude(self) -> float:
        """What queries and keys are multiplied by."""
        return self._m(self.mscale) / self._m(self.mscale_all) if self.mscale and self.mscale_all else self._m(1)

    @property
    def sharpness(self) -> float:
        """What scores of latent attention are multiplied by besides."""
        return self._m(self.mscale_all) ** 2

    def stretched(self, inverse_C: torch.Tensor, theta: float) -> torch.Tensor:
        """Radians per position after scaling, of those before it."""
        pairs = len(inverse_C)
        low, high = (
            pairs * math.log(self.original_max_seq_len / (turns * 2 * math.pi)) / math.log(theta)
            for turns in (self.beta_fast, self.beta_slow)
        )
        first, last = max(math.floor(low), 0), min(math.ceil(high), 2 * pairs - 1)
        ramp_C = (torch.arange(pairs, device=inverse_C.device) - first) / (last - first or 0.001)
        share_C = ramp_C.clamp(0, 1)
        return inverse_C / self.factor * share_C + inverse_C * (1 - share_C)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""

    kind: Literal["rope"] = "rope"
    """Which part this is."""
    theta: float = 10000.0
    """Base of the wavelengths."""
    channels: int | None = None
    """Channels of a head that are rotated, its first ones; null: all (GPT-J takes 64 of 256)."""
    interleaved: bool = False
    """Neighbouring channels form a pair (GPT-J); false: the first half is rotated against the second."""
    scaling: Llama3Scaling | LinearScaling | YarnScaling | None = None
    """For contexts beyond those trained on; null: none."""

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise ModelError(f"position.theta is {self.theta}: wavelengths need a base above 1, e.g. 10000.")
        if self.channels is not None and (self.channels < 2 or self.channels % 2):
            raise ModelError(
                f"position.channels is {self.channels}: pairs are rotated, so make it even and at least 2."
            )


@dataclass(frozen=True, kw_only=True)
class LearnedPositionConfig:
    """One learned vector per position, added to the token embedding (GPT-2)."""

    kind: Literal["learned"] = "learned"
    """Which part this is."""
    offset: int = 0
    """Rows of the table before that of position 0, which nothing looks up (BART and RoBERTa have 2)."""

    def __post_init__(self) -> None:
        if self.offset < 0:
            raise ModelError(f"position.offset is {self.offset}: it counts unused rows; use 0 for none.")


@dataclass(frozen=True, kw_only=True)
class SinusoidalPositionConfig:
    """Fixed sines and cosines added to the token embedding (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762,
    section 3.5): the first half of the channels are all sines, the second all cosines, from 1 to 1/10000 radians.
    """

    kind: Literal["sinusoidal"] = "sinusoidal"
    """Which part this is."""
    inclusive: bool = False
    """The last channel of each half has 1/10000 radians itself, not the one that would follow (Whisper)."""


@dataclass(frozen=True, kw_only=True)
class NoPositionConfig:
    """No positional signal but the causal mask (NoPE)."""

    kind: Literal["none"] = "none"
    """Which part this is."""


@dataclass(frozen=True, kw_only=True)
class AlibiConfig:
    """Scores fall with distance, at a slope of its own for each head (Press et al. 2022).

    https://arxiv.org/abs/2108.12409
    """

    kind: Literal["alibi"] = "alibi"
    """Which part this is."""


@dataclass(frozen=True, kw_only=True)
class RelativePositionConfig:
    """A learned bias on the scores for each head and each bucket of distances, shared by all layers (Raffel et al. 2020,
    https://arxiv.org/abs/1910.10683, section 2.1).
    """

    kind: Literal["relative"] = "relative"
    """Which part this is."""
    buckets: int = 32
    """Half of them for single distances, half for ranges that grow; an encoder has as many for each direction."""
    max_distance: int = 128
    """Tokens from which on all distances share a bucket."""

    def __post_init__(self) -> None:
        if self.buckets < 4 or self.buckets % 4 or self.max_distance <= self.buckets // 2:
            raise ModelError(
                f"position has buckets={self.buckets}, max_distance={self.max_distance}: take a multiple of 4 and a "
                "distance above half of it, such as 32 and 128."
            )


PositionConfig = (
    RopeConfig
    | LearnedPositionConfig
    | SinusoidalPositionConfig
    | NoPositionConfig
    | AlibiConfig
    | RelativePositionConfig
    | GridPositionConfig
)


@dataclass(frozen=True)
class Rotation:
    """The angles of every token, shared by all layers: fp32 [B or 1, T, 1, C] for the channels that are rotated, the
    sine of the first channel of each pair negated. sharpness: see `YarnScaling`."""

    cos_BT1C: torch.Tensor
    sin_BT1C: torch.Tensor
    interleaved: bool = False
    sharpness: float = 1.0

    def __call__(self, x_BTHC: torch.Tensor) -> torch.Tensor:
        """Rotate queries or keys; computed in fp32, returned in the precision of the input."""
        channels = self.cos_BT1C.shape[-1]
        if channels < x_BTHC.shape[-1]:
            return torch.cat((self(x_BTHC[..., :channels]), x_BTHC[..., channels:]), dim=-1)
        if self.interleaved:
            swapped_BTHC = x_BTHC.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            swapped_BTHC = x_BTHC.roll(channels // 2, -1)  # the halves in the other order
        return torch.addcmul(x_BTHC * self.cos_BT1C, swapped_BTHC, self.sin_BT1C).to(x_BTHC.dtype)

    def between(self, first: int, end: int) -> "Rotation":
        """Of angles of positions 0, 1, 2 …, those of some, without a copy."""
        return replace(self, cos_BT1C=self.cos_BT1C[:, first:end], sin_BT1C=self.sin_BT1C[:, first:end])

    def at(self, positions_BT: torch.Tensor) -> "Rotation":
        """Of angles of positions 0, 1, 2 …, those of these."""
        return replace(self, cos_BT1C=self.cos_BT1C[0][positions_BT], sin_BT1C=self.sin_BT1C[0][positions_BT])


def rotation(config: RopeConfig, positions_BT: torch.Tensor, head_dim: int) -> Rotation:
    """cos and sin for integer positions of any range; nothing is tabulated, so no buffer can be cast to bf16."""
    inverse_C = inverse_frequencies(config, config.channels or head_dim, positions_BT.device)
    angles_BT1C = (positions_BT.float()[..., None] * inverse_C)[..., None, :]
    cos_BT1C, sin_BT1C, sharpness = angles_BT1C.cos(), angles_BT1C.sin(), 1.0
    if isinstance(config.scaling, YarnScaling):
        cos_BT1C, sin_BT1C = cos_BT1C * config.scaling.amplitude, sin_BT1C * config.scaling.amplitude
        sharpness = config.scaling.sharpness
    cos_of_pair, sin_of_pair = (cos_BT1C, cos_BT1C), (-sin_BT1C, sin_BT1C)
    if config.interleaved:
        cos_BT1C, sin_BT1C = (torch.stack(pair, dim=-1).flatten(-2) for pair in (cos_of_pair, sin_of_pair))
    else:
        cos_BT1C, sin_BT1C = (torch.cat(pair, dim=-1) for pair in (cos_of_pair, sin_of_pair))
    return Rotation(cos_BT1C, sin_BT1C, config.interleaved, sharpness)


def inverse_frequencies(config: RopeConfig, channels: int, device: torch.device) -> torch.Tensor:
    """fp32 radians per position of each pair of rotated channels, after scaling; [C/2]."""
    exponent_C = torch.arange(0, channels, 2, dtype=torch.int64, device=device).float() / channels
    inverse_C = 1.0 / (config.theta**exponent_C)
    scaling = config.scaling
    if scaling is None:
        return inverse_C
    if isinstance(scaling, LinearScaling):
        return inverse_C / scaling.factor
    if isinstance(scaling, YarnScaling):
        return scaling.stretched(inverse_C, config.theta)
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

    def __init__(self, max_seq_len: int, d_model: int, offset: int = 0) -> None:
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.empty(max_seq_len + offset, d_model))

    def forward(self, positions_BT: torch.Tensor) -> torch.Tensor:
        """int64 positions from 0 to max_seq_len - 1: [B or 1, T, D]."""
        return nn.functional.embedding(positions_BT + self.offset, self.weight)


class SinusoidalPositions(nn.Module):
    """The sines and cosines of any position; nothing is tabulated, so no buffer can be cast to bf16."""

    def __init__(self, d_model: int, inclusive: bool = False) -> None:
        super().__init__()
        self.d_model = d_model
        self.inclusive = inclusive

    def forward(self, positions_BT: torch.Tensor) -> torch.Tensor:
        """fp32 [B or 1, T, D]; angles are taken in fp64, where a large position keeps its fraction of a turn, but in
        fp32 where Whisper's weights were trained with those."""
        if self.inclusive:
            step = math.log(10000.0) / (self.d_model // 2 - 1)
            inverse_C = torch.exp(-step * torch.arange(self.d_model // 2, device=positions_BT.device))
            angles_BTC = positions_BT[..., None] * inverse_C
            return torch.cat((angles_BTC.sin(), angles_BTC.cos()), dim=-1)
        exponent_C = torch.arange(0, self.d_model, 2, dtype=torch.float64, device=positions_BT.device) / self.d_model
        angles_BTC = positions_BT.double()[..., None] * 10000.0**-exponent_C
        x_BTD = torch.cat((angles_BTC.sin(), angles_BTC[..., : self.d_model // 2].cos()), dim=-1)
        return x_BTD.float()


Positions = LearnedPositions | SinusoidalPositions | GridPositions
"""What a frontend adds: positions_BT -> x_BTD."""


def build_positions(config: PositionConfig, max_seq_len: int, d_model: int) -> Positions | None:
    """What `config` adds to the embeddings, if anything."""
    if isinstance(config, LearnedPositionConfig):
        return LearnedPositions(max_seq_len, d_model, config.offset)
    if isinstance(config, GridPositionConfig):
        return GridPositions(config, d_model)
    if not isinstance(config, SinusoidalPositionConfig):
        return None
    if config.inclusive and (d_model < 4 or d_model % 2):
        raise ModelError(
            f"model.d_model is {d_model} with position.inclusive: two equal halves need an even 4 or more."
        )
    return SinusoidalPositions(d_model, config.inclusive)


def position_parameters(config: PositionConfig, max_seq_len: int, d_model: int, heads: int) -> int:
    """How many parameters the positions have."""
    if isinstance(config, RelativePositionConfig):
        return config.buckets * heads
    if isinstance(config, GridPositionConfig):
        return config.vectors * d_model
    return (max_seq_len + config.offset) * d_model if isinstance(config, LearnedPositionConfig) else 0


def alibi_bias(heads: int, keys: int, device: torch.device) -> torch.Tensor:
    """fp32 bias_HL for `Mask`: minus slope times distance, for distances of less than `keys` either way."""
    slopes_H = torch.tensor(alibi_slopes(heads), device=device)
    distance_L = torch.arange(1 - keys, keys, device=device).abs()
    return -slopes_H[:, None] * distance_L


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8/n), 2^(-16/n) … for n heads; if n is no power of two, those of the power below and every other of the
    next one's, as the authors' code has it."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    return slopes + [2.0 ** (-4 * (2 * head + 1) / power) for head in range(heads - power)]


class RelativeBias(Declared):
    """A table of [buckets, H]: what is added to a head's scores, by how far away the key is."""

    declared = declare(weight=Parameter("embedding", "zeros"))

    def __init__(self, config: RelativePositionConfig, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.config = config
        self.causal = causal
        self.weight = nn.Parameter(torch.empty(config.buckets, heads))

    def forward(self, keys: int) -> torch.Tensor:
        """fp32 bias_HL for `Mask`, for distances of less than `keys` either way."""
        distance_L = torch.arange(1 - keys, keys, device=self.weight.device)
        buckets_L = distance_buckets(distance_L, self.config, causal=self.causal)
        return nn.functional.embedding(buckets_L, self.weight).T.float()


def distance_buckets(distance_L: torch.Tensor, config: RelativePositionConfig, *, causal: bool) -> torch.Tensor:
    """int64 bucket of each distance (key minus query): one each up to half the buckets, then logarithmic ranges."""
    buckets = config.buckets if causal else config.buckets // 2
    away_L = (-distance_L).clamp(min=0) if causal else distance_L.abs()
    single = buckets // 2
    growth_L = torch.log(away_L.clamp(min=1).float() / single) / math.log(config.max_distance / single)
    range_L = (single + (growth_L * (buckets - single)).long()).clamp(max=buckets - 1)
    found_L = torch.where(away_L < single, away_L, range_L)
    return found_L if causal else found_L + buckets * (distance_L > 0)


def document_starts(documents_BT: torch.Tensor) -> torch.Tensor:
    """bool: true for the first token of every document and of every run of padding."""
    return documents_BT != nn.functional.pad(documents_BT[:, :-1], (1, 0), value=-1)


def document_positions(documents_BT: torch.Tensor) -> torch.Tensor:
    """int64 position of each token within its document, where a document is a run of equal numbers in a row."""
    index_BT = torch.arange(documents_BT.shape[1], device=documents_BT.device).expand(documents_BT.shape)
    start_BT = torch.where(document_starts(documents_BT), index_BT, 0).cummax(dim=1).values
    return index_BT - start_BT


def document_ends(documents_BT: torch.Tensor) -> torch.Tensor:
    """int64 place behind the last token of each token's document."""
    backwards_BT = torch.arange(documents_BT.shape[1], 0, -1, device=documents_BT.device)
    return backwards_BT.flip(0) + document_positions(documents_BT.flip(1)).flip(1)
