"""Waveforms as sequences of frames (wav2vec 2.0, Baevski et al. 2020, https://arxiv.org/abs/2006.11477)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal
from model.frontends.base import Frontend, FrontendConfig, Source
from model.heads.codebook import Codebook, CodebookConfig
from model.init import Declared, Linear, Parameter, declare
from model.noise import row_keys
from model.norms.norm import LayerNorm, NormConfig, build_norm

if TYPE_CHECKING:
    from model.config import ModelConfig

CONV_EPS = 1e-5
"""Of the norms between convolutions, whatever the model's own."""


@dataclass(frozen=True, kw_only=True)
class WaveformFrontendConfig(FrontendConfig):
    """Convolutions over samples, a projection to the model's width, and positions by convolution.

    The defaults make a frame of every 320 samples (20 ms at 16 kHz).
    """

    kind: Literal["waveform"] = "waveform"
    """Which part this is."""
    channels: tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512)
    """Of each convolution."""
    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    """Taps of each convolution."""
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    """Of each convolution."""
    bias: bool = False
    """The convolutions have offsets."""
    conv_norm: Literal["group", "layer"] = "group"
    """group: each channel normalised over time in the first, so that padding changes other frames; layer: each frame
    over its channels in all."""
    positional_kernel: int = 128
    """Taps of the convolution whose output is added in place of positions."""
    positional_groups: int = 16
    """Groups of that convolution."""
    mask_token: bool = True
    """A learned vector replaces masked frames."""
    norm: bool = True
    """The model's norm after positions are added."""
    codebook: CodebookConfig | None = None
    """What frames are to be recognised by, for head distractors; taken before masking."""

    def __post_init__(self) -> None:
        sizes = [self.channels, self.kernels, self.strides]
        if len({len(size) for size in sizes}) > 1 or not self.channels or min(min(size) for size in sizes) < 1:
            raise Refusal(
                "",
                NO_VALUE,
                (
                    f"has channels={self.channels}, kernels={self.kernels}, "
                    f"strides={self.strides}: each convolution needs one of each, at least 1"
                ),
                "give three lists of one length",
            )
        if self.positional_kernel < 1 or self.positional_groups < 1:
            raise Refusal(
                "",
                NO_VALUE,
                (
                    f"has positional_kernel={self.positional_kernel}, positional_groups={self.positional_groups}:"
                    " both count something"
                ),
                "use at least 1",
            )

    def lengths(self, frames: int) -> list[int]:
        """The fewest samples that make this many frames, and the frames after each convolution."""
        lengths = [frames]
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            lengths.append((lengths[-1] - 1) * stride + kernel)
        return lengths[::-1]

    def parameters(self, vocab_size: int, d_model: int, norm: NormConfig) -> int:
        """How many parameters it has."""
        taps = sum(out * kernel * into for into, out, kernel in self._convolutions())
        offsets = sum(self.channels) if self.bias else 0
        norms = 2 * (self.channels[0] if self.conv_norm == "group" else sum(self.channels)) + 2 * self.channels[-1]
        projection = (self.channels[-1] + 1) * d_model
        positional = d_model * d_model // self.positional_groups * self.positional_kernel + d_model
        after = (norm.parameters(d_model) if self.norm else 0) + (d_model if self.mask_token else 0)
        book = 0 if self.codebook is None else self.codebook.parameters(self.channels[-1])
        return taps + offsets + norms + projection + positional + after + book

    def flops(self, tokens: int, d_model: int) -> int:
        """Forward FLOPs for the fewest samples that make this many frames."""
        lengths = self.lengths(tokens)[1:]
        taps = [into * out * kernel for into, out, kernel in self._convolutions()]
        convolutions = sum(2 * count * length for count, length in zip(taps, lengths, strict=True))
        positional = 2 * d_model * d_model // self.positional_groups * self.positional_kernel * tokens
        book = 0 if self.codebook is None else self.codebook.flops(tokens, self.channels[-1])
        return convolutions + 2 * self.channels[-1] * d_model * tokens + positional + book

    def book(self) -> CodebookConfig | None:
        return self.codebook

    def build(self, model: ModelConfig, vocab_size: int) -> WaveformFrontend:
        norm = build_norm(model.norm, model.d_model) if self.norm else None
        return WaveformFrontend(self, model.d_model, model.norm.eps, norm, model.dropout)

    def _convolutions(self) -> list[tuple[int, int, int]]:
        """(channels in, channels out, kernel) of each."""
        return list(zip((1, *self.channels), self.channels, self.kernels, strict=False))


class Convolution(Declared):
    """x_BIW -> gelu(norm(conv x)) of fewer samples; `norm` null, over time or over channels."""

    declared = declare(weight=Parameter("matrix", "conv"), bias=Parameter("bias", "zeros"))

    def __init__(self, into: int, out: int, kernel: int, stride: int, bias: bool, norm: nn.Module | None) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(out, into, kernel))
        self.bias = nn.Parameter(torch.empty(out)) if bias else None
        self.norm = norm

    def forward(self, x_BIW: torch.Tensor) -> torch.Tensor:
        """[B, channels out, (W - kernel) // stride + 1]: nothing is padded."""
        x_BCW = nn.functional.conv1d(x_BIW, self.weight, self.bias, stride=self.stride)
        if isinstance(self.norm, LayerNorm):
            x_BCW = self.norm(x_BCW.transpose(1, 2)).transpose(1, 2)
        elif self.norm is not None:
            x_BCW = self.norm(x_BCW)
        return nn.functional.gelu(x_BCW)


class TimeNorm(Declared):
    """Each channel of x_BCW normalised over time: GroupNorm with a group for each channel (Wu & He 2018)."""

    declared = declare(weight=Parameter("norm", "ones"), bias=Parameter("bias", "zeros"))

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x_BCW: torch.Tensor) -> torch.Tensor:
        """Mean 0 and variance 1 over all of W, padding included, then weight and bias."""
        return nn.functional.group_norm(x_BCW, len(self.weight), self.weight, self.bias, CONV_EPS)


class PositionalConvolution(Declared):
    """gelu of a wide grouped convolution over frames (Mohamed et al. 2019). The authors train its weight as a length
    and a direction for each tap; here it is one tensor, which ZeRO-3 can gather like any other."""

    declared = declare(weight=Parameter("matrix", "conv"), bias=Parameter("bias", "zeros"))

    def __init__(self, d_model: int, kernel: int, groups: int) -> None:
        super().__init__()
        if d_model % groups:
            raise Refusal(
                "frontend.positional_groups",
                groups,
                f"with model.d_model {d_model}: groups share the width equally, so it must divide d_model",
            )
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(d_model, d_model // groups, kernel))
        self.bias = nn.Parameter(torch.empty(d_model))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """y_BTD, to be added to x_BTD: each frame from those around it, zeros beyond the ends."""
        kernel = self.weight.shape[-1]
        x_BDT = nn.functional.pad(x_BTD.transpose(1, 2), (kernel // 2, (kernel - 1) // 2))
        y_BDT = nn.functional.conv1d(x_BDT, self.weight, self.bias, groups=self.groups)
        return nn.functional.gelu(y_BDT).transpose(1, 2)


class WaveformFrontend(Frontend):
    """samples_BW -> x_BTD."""

    reads = "samples_BW"
    optional = frozenset({"sample_lengths_B", "masked_BT"})
    declared = declare(mask_token=Parameter("embedding", "embedding"))

    def __init__(
        self, config: WaveformFrontendConfig, d_model: int, eps: float, norm: nn.Module | None, dropout: float
    ) -> None:
        """eps: of the norm before the projection, the model's."""
        super().__init__()
        self.config = config
        sizes = zip((1, *config.channels), config.channels, config.kernels, config.strides, strict=False)
        self.convolutions = nn.ModuleList(
            Convolution(into, out, kernel, stride, config.bias, self._norm(config, number, out))
            for number, (into, out, kernel, stride) in enumerate(sizes)
        )
        self.feature_norm = LayerNorm(config.channels[-1], eps, bias=True)
        self.projection = Linear(config.channels[-1], d_model, bias=True)
        self.mask_token = nn.Parameter(torch.empty(d_model)) if config.mask_token else None
        self.positional = PositionalConvolution(d_model, config.positional_kernel, config.positional_groups)
        self.codebook = None if config.codebook is None else Codebook(config.codebook, config.channels[-1])
        self.norm = norm
        self.dropout = nn.Dropout(dropout)

    @staticmethod
    def _norm(config: WaveformFrontendConfig, number: int, channels: int) -> nn.Module | None:
        if config.conv_norm == "layer":
            return LayerNorm(channels, CONV_EPS, bias=True)
        return TimeNorm(channels) if number == 0 else None

    def documents(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """1 for frames of samples, 0 for those of padding, of what `sample_lengths_B` says."""
        if "sample_lengths_B" not in inputs:
            return None
        samples_BW, frames_B = inputs["samples_BW"], inputs["sample_lengths_B"]
        frames = samples_BW.shape[1]
        for kernel, stride in zip(self.config.kernels, self.config.strides, strict=True):
            frames_B, frames = (frames_B - kernel) // stride + 1, (frames - kernel) // stride + 1
        place_T = torch.arange(frames, device=frames_B.device)
        return (place_T < frames_B[:, None]).to(torch.int32)

    def batched(self, sources: Sequence[Source], device: torch.device) -> dict[str, torch.Tensor]:
        """Recordings of any lengths, zeros behind their ends."""
        rows = [torch.as_tensor(source, device=device) for source in sources]
        lengths_B = torch.tensor([len(row) for row in rows], device=device)
        return {self.reads: nn.utils.rnn.pad_sequence(rows, batch_first=True), "sample_lengths_B": lengths_B}

    def embed(
        self, positions_BT: torch.Tensor | None, inputs: dict[str, torch.Tensor], *, with_codes: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if not with_codes:
            return super().embed(positions_BT, inputs, with_codes=False)
        x_BTD, codes = self(positions_BT, with_codes=True, **inputs)
        return x_BTD, codes

    def forward(
        self,
        positions_BT: torch.Tensor | None,
        samples_BW: torch.Tensor,
        sample_lengths_B: torch.Tensor | None = None,
        masked_BT: torch.Tensor | None = None,
        with_codes: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """samples_BW: floats, of mean 0 and variance 1. sample_lengths_B: int64, how many of each row are no padding.
        masked_BT: bool, the frames whose vector is replaced by the mask token before positions are added.
        with_codes: return what the codebook makes too, {"codes_BTC", "unused"}; without a mask of all frames."""
        if samples_BW.shape[1] < self.config.lengths(1)[0]:
            raise Refusal(
                "model",
                NO_VALUE,
                f"samples_BW has rows of {samples_BW.shape[1]} samples: one frame takes {self.config.lengths(1)[0]}",
                "leave such recordings out",
            )
        x_BCW = samples_BW.to(self.projection.weight.dtype)[:, None]
        for convolution in self.convolutions:
            x_BCW = convolution(x_BCW)
        features_BTC = self.feature_norm(x_BCW.transpose(1, 2))
        x_BTD = self.dropout(self.projection(features_BTC))
        codes: dict[str, torch.Tensor] = {}
        if with_codes and self.codebook is not None:
            counted_BT = torch.ones_like(features_BTC[..., 0], dtype=torch.bool) if masked_BT is None else masked_BT
            keys_B = sound_keys(samples_BW, sample_lengths_B) + row_keys(counted_BT, counted_BT)
            codes = dict(zip(("codes_BTC", "unused"), self.codebook(features_BTC, counted_BT, keys_B), strict=True))
        if self.mask_token is not None:  # used where nothing is masked too: ZeRO-3 gathers it on all ranks or on none
            if masked_BT is None:
                masked_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
            x_BTD = torch.where(masked_BT[..., None], self.mask_token.to(x_BTD.dtype), x_BTD)
        elif masked_BT is not None:
            raise Refusal(
                "model",
                NO_VALUE,
                "masked_BT was given, but model.frontend.mask_token is false",
                "set it or leave masks out",
            )
        if sample_lengths_B is not None:
            real_BT = self.documents({"samples_BW": samples_BW, "sample_lengths_B": sample_lengths_B})
            assert real_BT is not None
            x_BTD = x_BTD * real_BT[..., None]
        x_BTD = x_BTD + self.positional(x_BTD)
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        x_BTD = self.dropout(x_BTD)
        return (x_BTD, codes) if with_codes else x_BTD


def sound_keys(samples_BW: torch.Tensor, sample_lengths_B: torch.Tensor | None = None) -> torch.Tensor:
    """keys_B of recordings, whatever stands behind their ends."""
    if sample_lengths_B is None:
        return row_keys(samples_BW)
    place_W = torch.arange(samples_BW.shape[1], device=samples_BW.device)
    return row_keys(samples_BW, place_W < sample_lengths_B[:, None])
