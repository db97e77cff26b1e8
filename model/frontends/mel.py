"""Sound as log-mel frames, as Whisper takes it (Radford et al. 2022, https://arxiv.org/abs/2212.04356)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal
from model.frontends.base import Frontend, FrontendConfig
from model.init import Declared, Parameter, declare
from model.norms.norm import NormConfig, build_norm
from model.positions.base import Positions

if TYPE_CHECKING:
    from model.config import ModelConfig

SAMPLE_RATE, WINDOW, HOP = 16000, 400, 160
"""Samples a second, samples that one spectrum is taken of, samples from one to the next."""


@dataclass(frozen=True, kw_only=True)
class MelFrontendConfig(FrontendConfig):
    """Two convolutions over three frames each; the second takes every other place."""

    kind: Literal["mel"] = "mel"
    """Which part this is."""
    bands: int = 80
    """Of the spectrogram."""
    norm: bool = False
    """The model's norm after positions are added."""

    def __post_init__(self) -> None:
        if self.bands < 1:
            raise Refusal("bands", self.bands, "a spectrogram has at least one", "Whisper's have 80 or 128")

    def parameters(self, vocab_size: int, d_model: int, norm: NormConfig) -> int:
        """How many parameters it has, those of positions aside."""
        return 3 * d_model * (self.bands + d_model) + 2 * d_model + (norm.parameters(d_model) if self.norm else 0)

    def flops(self, tokens: int, d_model: int) -> int:
        """Forward FLOPs for one row of twice as many frames."""
        return 2 * 3 * d_model * (self.bands * 2 + d_model) * tokens

    def build(self, model: ModelConfig, vocab_size: int) -> MelFrontend:
        norm = build_norm(model.norm, model.d_model) if self.norm else None
        positions = model.position.build(model.n_positions, model.d_model)
        return MelFrontend(self, model.d_model, positions, norm, model.dropout)


class FrameConvolution(Declared):
    """gelu of a convolution over three places, padded so that with stride 1 their number stays."""

    declared = declare(weight=Parameter("matrix", "conv"), bias=Parameter("bias", "zeros"))

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(out, into, 3))
        self.bias = nn.Parameter(torch.empty(out))

    def forward(self, x_BIW: torch.Tensor) -> torch.Tensor:
        """[B, channels out, W / stride, rounded up]."""
        return nn.functional.gelu(nn.functional.conv1d(x_BIW, self.weight, self.bias, stride=self.stride, padding=1))


class MelFrontend(Frontend):
    """mels_BAW -> x_BTD, a token for two frames."""

    reads = "mels_BAW"

    def __init__(
        self,
        config: MelFrontendConfig,
        d_model: int,
        positions: Positions | None,
        norm: nn.Module | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.bands = config.bands
        self.first = FrameConvolution(config.bands, d_model, 1)
        self.second = FrameConvolution(d_model, d_model, 2)
        self.positions = positions
        self.norm = norm
        self.dropout = nn.Dropout(dropout)

    def forward(self, positions_BT: torch.Tensor | None, mels_BAW: torch.Tensor) -> torch.Tensor:
        """mels_BAW: floats, a column for each frame, such as `log_mel` makes."""
        if mels_BAW.shape[1] != self.bands:
            raise Refusal(
                "model",
                NO_VALUE,
                f"mels_BAW has {mels_BAW.shape[1]} bands: this model takes {self.bands}",
                f"make them with log_mel(samples_BW, bands={self.bands})",
            )
        x_BDT = self.second(self.first(mels_BAW.to(self.first.weight.dtype)))
        x_BTD = x_BDT.transpose(1, 2)
        if self.positions is not None:
            if positions_BT is None:
                positions_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]
            x_BTD = x_BTD + self.positions(positions_BT).to(x_BTD.dtype)
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return self.dropout(x_BTD)


def log_mel(samples_BW: torch.Tensor, bands: int = 80) -> torch.Tensor:
    """fp32 mels_BAW of a waveform at 16 kHz, a frame for every 160 samples.

    The logarithm to base 10 of the power in each band, nothing lower than 8 below the row's loudest, then (x + 4) / 4.
    """
    window_W = torch.hann_window(WINDOW, device=samples_BW.device)
    spectrum_BIW = torch.stft(samples_BW.float(), WINDOW, HOP, window=window_W, return_complex=True)[..., :-1]
    power_BAW = mel_filters(bands, samples_BW.device) @ spectrum_BIW.abs().square()
    log_BAW = power_BAW.clamp(min=1e-10).log10()
    log_BAW = torch.maximum(log_BAW, log_BAW.amax((1, 2), keepdim=True) - 8.0)
    return (log_BAW + 4.0) / 4.0


def mel_filters(bands: int, device: torch.device) -> torch.Tensor:
    """fp32 [A, I], the weight of each frequency of the spectrum in each band.

    Triangles between neighbours of `bands + 2` frequencies that lie evenly on Slaney's scale from 0 to 8,000 Hz, each
    of area 2 Hz: straight up to 1,000 Hz, logarithmic above, 27 steps to a factor of 6.4 (Slaney 1998, Auditory Toolbox).
    """
    highest = 15 + 27 * math.log(SAMPLE_RATE / 2 / 1000) / math.log(6.4)
    mels_A = torch.linspace(0, highest, bands + 2, dtype=torch.float64, device=device)
    hertz_A = torch.where(mels_A < 15, mels_A * 200 / 3, 1000 * torch.exp((mels_A - 15) * math.log(6.4) / 27))
    bins_I = torch.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1, dtype=torch.float64, device=device)
    from_low_AI = (bins_I - hertz_A[:-2, None]) / (hertz_A[1:-1] - hertz_A[:-2])[:, None]
    to_high_AI = (hertz_A[2:, None] - bins_I) / (hertz_A[2:] - hertz_A[1:-1])[:, None]
    triangles_AI = torch.minimum(from_low_AI, to_high_AI).clamp(min=0)
    return (triangles_AI * (2 / (hertz_A[2:] - hertz_A[:-2]))[:, None]).float()
