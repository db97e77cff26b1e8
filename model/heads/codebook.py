"""A codebook for frames (wav2vec 2.0, Baevski et al. 2020, section 2; Jang et al. 2016)."""

from dataclasses import dataclass

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal
from model.frontends.spans import CODES
from model.init import Declared, Linear, Parameter, declare
from model.noise import uniform


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """A frame takes one of `entries` vectors from each of `groups` books; side by side they have `width` channels."""

    groups: int = 2
    """Books."""
    entries: int = 320
    """Vectors of a book."""
    width: int = 256
    """Channels of all books together."""
    seed: int = 0
    """Of the draws in training."""

    def __post_init__(self) -> None:
        if min(self.groups, self.entries) < 1 or self.width < 1 or self.width % self.groups:
            raise Refusal(
                "",
                NO_VALUE,
                (
                    f"has groups={self.groups}, entries={self.entries}, width={self.width}:"
                    " groups share the width equally, so groups must divide it"
                ),
            )

    def parameters(self, channels: int) -> int:
        """How many parameters it has, for frames of `channels`."""
        return self.groups * self.entries * (channels + 1) + self.entries * self.width

    def flops(self, tokens: int, channels: int) -> int:
        """Forward FLOPs: the scores of all entries, and the entries times their shares."""
        return 2 * self.entries * (self.groups * channels + self.width) * tokens


class Codebook(Declared):
    """x_BTC -> the entries that frames chose, side by side, and which share of all entries goes unused.

    In training an entry is drawn, a function of (the row and its mask, seed, place), and gradients flow as if shares had
    been mixed. gumbel_temperature: set from outside; the authors lower it from 2 to 0.5.
    """

    declared = declare(weight=Parameter("embedding", "conv"))

    def __init__(self, config: CodebookConfig, channels: int) -> None:
        super().__init__()
        self.seed = config.seed
        self.groups = config.groups
        self.entries = config.entries
        self.weight = nn.Parameter(torch.empty(config.groups * config.entries, config.width // config.groups))
        self.scores = Linear(channels, config.groups * config.entries, bias=True)
        self.gumbel_temperature = 2.0

    def forward(
        self, x_BTC: torch.Tensor, masked_BT: torch.Tensor, keys_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """masked_BT: bool, the frames that count for the share; fp32 scalar. keys_B: int64, of each row and its mask."""
        scores_MV = self.scores(x_BTC).reshape(-1, self.entries).float()
        if self.training:
            draws = self.groups * self.entries
            noise_BTV = uniform(keys_B, seed=self.seed, layer=CODES, tokens=x_BTC.shape[1], draws=draws)
            chosen_MV = drawn(scores_MV, noise_BTV.view_as(scores_MV), self.gumbel_temperature)
            shares_MV = scores_MV.softmax(-1)
        else:
            chosen_MV = nn.functional.one_hot(scores_MV.argmax(-1), self.entries).to(scores_MV.dtype)
            shares_MV = chosen_MV
        counted_N11 = masked_BT.flatten()[:, None, None]
        shares_GV = (shares_MV.view(-1, self.groups, self.entries) * counted_N11).sum(0) / masked_BT.sum()
        used = torch.exp(-torch.xlogy(shares_GV, shares_GV).sum(-1)).sum()
        weight_GVC = self.weight.view(self.groups, self.entries, -1)
        chosen_NGV = chosen_MV.to(weight_GVC.dtype).view(-1, self.groups, self.entries)
        codes_NGC = torch.einsum("ngv,gvc->ngc", chosen_NGV, weight_GVC)
        return codes_NGC.reshape(*x_BTC.shape[:2], -1), 1 - used / (self.groups * self.entries)


def drawn(scores_MV: torch.Tensor, noise_MV: torch.Tensor, temperature: float) -> torch.Tensor:
    """One-hot: an entry of each line with the probability that its scores give it, by noise from 0 to 1; its gradient is
    that of the shares after the noise (Jang et al. 2016, https://arxiv.org/abs/1611.01144)."""
    gumbel_MV = -noise_MV.clamp(min=2.0**-25).log().neg().log()
    shares_MV = ((scores_MV + gumbel_MV) / temperature).softmax(-1)
    hard_MV = nn.functional.one_hot(shares_MV.argmax(-1), shares_MV.shape[-1]).to(shares_MV.dtype)
    return hard_MV - shares_MV.detach() + shares_MV
