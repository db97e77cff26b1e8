"""Rotary positions, and how their wavelengths are stretched for contexts beyond those trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from conf.refusal import NO_VALUE, Refusal, Shown, field
from model.positions.base import PositionConfig, Rotation

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A stretch of the wavelengths."""

    def stretched(self, inverse_C: torch.Tensor, theta: float) -> torch.Tensor:
        """Radians per position after scaling, of those before it."""
        raise NotImplementedError

    def amplified(self, x_BT1C: torch.Tensor) -> torch.Tensor:
        """Cosines or sines as queries and keys are multiplied by them."""
        return x_BT1C

    @property
    def sharpness(self) -> float:
        """What scores of latent attention are multiplied by besides."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(Scaling):
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
            raise Refusal(
                "",
                NO_VALUE,
                (
                    f"has factor={self.factor}, low_freq_factor={self.low_freq_factor}, "
                    f"high_freq_factor={self.high_freq_factor}: the factor must be at least 1 and "
                    "the frequencies positive and in rising order"
                ),
                "Llama 3.1 uses 8, 1 and 4",
            )

    def stretched(self, inverse_C: torch.Tensor, theta: float) -> torch.Tensor:
        """Radians per position after scaling, of those before it."""
        wavelength_C = 2 * math.pi / inverse_C
        low = self.original_max_seq_len / self.low_freq_factor
        high = self.original_max_seq_len / self.high_freq_factor
        blend_C = (self.original_max_seq_len / wavelength_C - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended_C = (1 - blend_C) * inverse_C / self.factor + blend_C * inverse_C
        scaled_C = torch.where(wavelength_C > low, inverse_C / self.factor, blended_C)
        return torch.where(wavelength_C < high, inverse_C, scaled_C)


@dataclass(frozen=True, kw_only=True)
class LinearScaling(Scaling):
    """Position interpolation (Chen et al. 2023): every position is divided by `factor`."""

    kind: Literal["linear"] = "linear"
    """Which part this is."""
    factor: float = 2.0
    """What positions are divided by."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise Refusal("factor", self.factor, "stretching a context needs at least 1")

    def stretched(self, inverse_C: torch.Tensor, theta: float) -> torch.Tensor:
        """Radians per position after scaling, of those before it."""
        return inverse_C / self.factor


@dataclass(frozen=True, kw_only=True)
class YarnScaling(Scaling):
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
            raise Refusal(
                "",
                NO_VALUE,
                (
                    f"has factor={self.factor}, beta_slow={self.beta_slow}, "
                    f"beta_fast={self.beta_fast}, mscale={self.mscale}, "
                    f"mscale_all={self.mscale_all}: the factor must be at least 1, the numbers of "
                    "turns positive and in rising order, the weights 0 or more"
                ),
                "DeepSeek-V3 uses 40, 1, 32, 1 and 1",
            )

    def _m(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1

    @property
    def amplitude(self) -> float:
        """What queries and keys are multiplied by."""
        return self._m(self.mscale) / self._m(self.mscale_all) if self.mscale and self.mscale_all else self._m(1)

    def amplified(self, x_BT1C: torch.Tensor) -> torch.Tensor:
        return x_BT1C * self.amplitude

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
class RopeConfig(PositionConfig):
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
            raise Refusal("theta", self.theta, "wavelengths need a base above 1, e.g. 10000")
        if self.channels is not None and (self.channels < 2 or self.channels % 2):
            raise Refusal("channels", self.channels, "pairs are rotated", "make it even and at least 2")

    def check(self, model: ModelConfig) -> None:
        """All attention layers share one set of angles."""
        heads = model.positioned_heads
        if not heads:
            raise Refusal(
                "position.kind",
                Shown("rope"),
                f"no layer attends (mixer.kind is {model.mixer.kind}), and rotary positions turn queries and keys",
                f"set {field('position.kind')}=none, or learned",
            )
        channels = sorted({each.channels for each in heads})
        if len(channels) > 1:
            raise Refusal(
                "pattern",
                NO_VALUE,
                (
                    f"it gives attention layers {' and '.join(map(str, channels))} channels a head:"
                    " all layers share one set of rotary angles"
                ),
                "set mixer.head_dim to the same everywhere",
            )
        if self.channels is not None and self.channels > channels[0]:
            raise Refusal(
                "position.channels",
                self.channels,
                f"with heads of {channels[0]} channels: no more can be rotated than there are",
                "lower it, or null rotates all",
            )
        if self.channels is None and channels[0] % 2:
            raise Refusal(
                "d_model",
                model.d_model,
                f"over {heads[0].heads} heads it leaves {channels[0]} channels a head: rotary positions rotate pairs",
                "make it even",
            )

    def rotated_channels(self, channels: int) -> int:
        return self.channels or channels

    def rotation(self, positions_BT: torch.Tensor, channels: int) -> Rotation:
        """cos and sin for integer positions of any range; nothing is tabulated, so no buffer can be cast to bf16."""
        inverse_C = inverse_frequencies(self, self.rotated_channels(channels), positions_BT.device)
        angles_BT1C = (positions_BT.float()[..., None] * inverse_C)[..., None, :]
        cos_BT1C, sin_BT1C, sharpness = angles_BT1C.cos(), angles_BT1C.sin(), 1.0
        if self.scaling is not None:
            cos_BT1C, sin_BT1C = (self.scaling.amplified(x_BT1C) for x_BT1C in (cos_BT1C, sin_BT1C))
            sharpness = self.scaling.sharpness
        cos_of_pair, sin_of_pair = (cos_BT1C, cos_BT1C), (-sin_BT1C, sin_BT1C)
        if self.interleaved:
            cos_BT1C, sin_BT1C = (torch.stack(pair, dim=-1).flatten(-2) for pair in (cos_of_pair, sin_of_pair))
        else:
            cos_BT1C, sin_BT1C = (torch.cat(pair, dim=-1) for pair in (cos_of_pair, sin_of_pair))
        return Rotation(cos_BT1C, sin_BT1C, self.interleaved, sharpness)


def inverse_frequencies(config: RopeConfig, channels: int, device: torch.device) -> torch.Tensor:
    """fp32 radians per position of each pair of rotated channels, after scaling; [C/2]."""
    exponent_C = torch.arange(0, channels, 2, dtype=torch.int64, device=device).float() / channels
    inverse_C = 1.0 / (config.theta**exponent_C)
    return inverse_C if config.scaling is None else config.scaling.stretched(inverse_C, config.theta)
