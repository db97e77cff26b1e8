"""Images as codes: a discrete variational autoencoder (Ramesh et al. 2021, https://arxiv.org/abs/2102.12092, section 2.1
and appendix A).

    tokenizer = build_image_tokenizer(ImageTokenizerConfig(), seed=0)
    tokenizer(pixels_BAYX)["loss_sum"]        # training: pixels again, and how far the codes are from all alike
    codes_BYX = tokenizer.codes(pixels_BAYX)  # for `TextImageVocabulary.row`, row by row
    pixels_BAYX = tokenizer.pixels(codes_BYX)
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal
from model.init import Declared, InitConfig, Parameter, declare, initialize
from model.limits import check_counts

EDGE = 0.1
"""Pixels are squeezed from [0, 1] to [EDGE, 1 - EDGE], where their logits are finite."""


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerConfig:
    """codes: how many there are. halvings: a code stands for a square of 2^halvings pixels a side.

    width: channels at the first size, times 2 at each further one, as many times back. blocks: of each size. kl_weight: of
    the divergence of the codes from a uniform choice (6.6 in the paper, from 0 over the first 5,000 steps).
    """

    codes: int = 8192
    """Codes there are."""
    planes: int = 3
    """Colours of a pixel."""
    width: int = 256
    """Channels at the first size, times 2 at each further one."""
    halvings: int = 3
    """A code stands for a square of 2^halvings pixels a side."""
    blocks: int = 2
    """Residual blocks of each size."""
    kl_weight: float = 6.6
    """Weight of the divergence of the codes from a uniform choice (6.6 in the paper, from 0 over the first 5,000
    steps)."""

    def __post_init__(self) -> None:
        check_counts(self, "codes", "planes", "width", "blocks")
        if self.halvings < 0 or self.kl_weight < 0:
            raise Refusal(
                "model",
                NO_VALUE,
                f"image_tokenizer has halvings={self.halvings}, kl_weight={self.kl_weight}: neither is below 0",
                "the paper has 3 and 6.6",
            )

    @property
    def side(self) -> int:
        """Pixels of a side of the square that one code stands for."""
        return 1 << self.halvings


class Convolution(Declared):
    """Over squares of `kernel` pixels, padded so that sizes stay. gain: of the start of its weights."""

    def __init__(self, into: int, out: int, kernel: int, gain: float = 1.0) -> None:
        super().__init__()
        self.declared = declare(weight=Parameter("matrix", "conv", gain), bias=Parameter("bias", "zeros"))
        self.weight = nn.Parameter(torch.empty(out, into, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(out))

    def forward(self, x_BCYX: torch.Tensor) -> torch.Tensor:
        """[B, channels out, Y, X]; zeros stand around the image."""
        return nn.functional.conv2d(x_BCYX, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class Residual(nn.Module):
    """x + gain * f(x), f of two convolutions; a third, of single pixels, where the number of channels changes."""

    def __init__(self, into: int, out: int, gain: float) -> None:
        super().__init__()
        self.path = nn.Sequential(nn.ReLU(), Convolution(into, out, 3), nn.ReLU(), Convolution(out, out, 3))
        self.straight = nn.Identity() if into == out else Convolution(into, out, 1)
        self.gain = gain

    def forward(self, x_BCYX: torch.Tensor) -> torch.Tensor:
        """[B, channels out, Y, X]."""
        out_BCYX: torch.Tensor = self.straight(x_BCYX) + self.gain * self.path(x_BCYX)
        return out_BCYX


class ImageTokenizer(nn.Module):
    """pixels_BAYX in [0, 1] to codes and back. temperature: of the relaxation in training, set from outside; the paper
    lowers it from 1 to 1/16. kl_weight: likewise, from the configuration's."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.temperature, self.kl_weight = 1.0, config.kl_weight
        widths = [config.width << size for size in range(config.halvings + 1)]
        gain = (len(widths) * config.blocks) ** -2
        down: list[nn.Module] = [Convolution(config.planes, widths[0], 7)]
        # Of all codes one is chosen, so that its weights alone make up what comes out.
        up: list[nn.Module] = [Convolution(config.codes, widths[-1], 1, gain=(config.codes / 2) ** 0.5)]
        for size, width in enumerate(widths):
            down += [nn.MaxPool2d(2)] if size else []
            down += [Residual(widths[max(size - 1, 0)] if n == 0 else width, width, gain) for n in range(config.blocks)]
        for size, width in reversed(list(enumerate(widths))):
            up += [
                Residual(widths[min(size + 1, config.halvings)] if n == 0 else width, width, gain)
                for n in range(config.blocks)
            ]
            up += [nn.Upsample(scale_factor=2)] if size else []
        self.encoder = nn.Sequential(*down, nn.ReLU(), Convolution(widths[-1], config.codes, 1, gain=0.1))
        self.decoder = nn.Sequential(*up, nn.ReLU(), Convolution(widths[0], 2 * config.planes, 1, gain=0.1))

    def forward(self, pixels_BAYX: torch.Tensor) -> dict[str, torch.Tensor]:
        """{"loss_sum": fp32 Σ -ln p(pixel) + kl_weight Σ KL, "kl_sum", "target_count": how many pixels and planes}.

        Codes are drawn by the Gumbel-softmax relaxation from PyTorch's generator, as dropout is; pixels follow the
        logit-Laplace distribution. Raises Refusal for sizes that do not divide.
        """
        scores_BVYX = self._scores(pixels_BAYX).float()
        relaxed_BVYX = nn.functional.gumbel_softmax(scores_BVYX, tau=self.temperature, dim=1)
        mean_BAYX, spread_BAYX = self.decoder(relaxed_BVYX.to(pixels_BAYX.dtype)).float().chunk(2, dim=1)
        squeezed_BAYX = EDGE + (1 - 2 * EDGE) * pixels_BAYX.float()
        # -ln of exp(-|logit x - mean| / b) / (2 b x (1 - x)), with ln b as `spread`.
        distance_BAYX = (squeezed_BAYX.logit() - mean_BAYX).abs() * torch.exp(-spread_BAYX)
        nll_BAYX = distance_BAYX + spread_BAYX + (2 * squeezed_BAYX * (1 - squeezed_BAYX)).log()
        log_q_BVYX = scores_BVYX.log_softmax(1)
        kl_sum = (log_q_BVYX.exp() * (log_q_BVYX + math.log(self.config.codes))).sum()
        count = torch.tensor(pixels_BAYX.numel(), device=pixels_BAYX.device)
        return {"loss_sum": nll_BAYX.sum() + self.kl_weight * kl_sum, "kl_sum": kl_sum.detach(), "target_count": count}

    @torch.no_grad()
    def codes(self, pixels_BAYX: torch.Tensor) -> torch.Tensor:
        """int64 [B, Y, X], the likeliest code of each square."""
        return self._scores(pixels_BAYX).argmax(1)

    @torch.no_grad()
    def pixels(self, codes_BYX: torch.Tensor) -> torch.Tensor:
        """fp32 pixels_BAYX in [0, 1] that the codes stand for."""
        chosen_BVYX = nn.functional.one_hot(codes_BYX, self.config.codes).movedim(-1, 1)
        mean_BAYX, _ = self.decoder(chosen_BVYX.to(next(self.parameters()).dtype)).float().chunk(2, dim=1)
        return ((mean_BAYX.sigmoid() - EDGE) / (1 - 2 * EDGE)).clamp(0, 1)

    def _scores(self, pixels_BAYX: torch.Tensor) -> torch.Tensor:
        planes, *sides = pixels_BAYX.shape[1:]
        if planes != self.config.planes or any(side % self.config.side for side in sides):
            raise Refusal(
                "model",
                NO_VALUE,
                (
                    f"pixels_BAYX has images of {tuple(pixels_BAYX.shape[1:])}: it takes {self.config.planes} "
                    f"planes and sides that {self.config.side} divides"
                ),
                "crop or resize them",
            )
        scores_BVYX: torch.Tensor = self.encoder(pixels_BAYX)
        return scores_BVYX


def build_image_tokenizer(config: ImageTokenizerConfig, *, seed: int = 0) -> ImageTokenizer:
    """The tokenizer with its starting weights, a function of `seed` alone."""
    tokenizer = ImageTokenizer(config)
    initialize(tokenizer, config=InitConfig(), n_layers=1, seed=seed)
    return tokenizer
