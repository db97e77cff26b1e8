"""Images as sequences of patches (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal
from model.frontends.base import Frontend, FrontendConfig
from model.init import Parameter, declare
from model.limits import check_counts
from model.norms.norm import NormConfig, build_norm
from model.positions.base import Positions

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class PatchFrontendConfig(FrontendConfig):
    """Square images, cut into square patches, each a token."""

    kind: Literal["patches"] = "patches"
    """Which part this is."""
    image_size: int = 224
    """Pixels of a side."""
    patch_size: int = 16
    """Pixels of a patch's side."""
    planes: int = 3
    """Colours of a pixel."""
    class_token: bool = True
    """A learned vector stands before the patches."""
    bias: bool = True
    """The projection has an offset."""
    norm: bool = False
    """The model's norm after positions are added (CLIP)."""

    def __post_init__(self) -> None:
        check_counts(self, "image_size", "patch_size", "planes")
        if self.image_size % self.patch_size:
            raise Refusal(
                "patch_size",
                self.patch_size,
                (
                    f"image_size {self.image_size}: patches cover an image without a remainder, so patch_size "
                    "must divide image_size"
                ),
            )

    @property
    def n_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """How many tokens every image becomes."""
        return self.n_patches + int(self.class_token)

    def parameters(self, vocab_size: int, d_model: int, norm: NormConfig) -> int:
        """How many parameters it has, those of positions aside."""
        projection = self.planes * self.patch_size**2 * d_model + (d_model if self.bias else 0)
        return projection + (d_model if self.class_token else 0) + (norm.parameters(d_model) if self.norm else 0)

    def flops(self, tokens: int, d_model: int) -> int:
        """Forward FLOPs for one image."""
        return 2 * self.planes * self.patch_size**2 * d_model * self.n_patches

    def build(self, model: ModelConfig, vocab_size: int) -> PatchFrontend:
        norm = build_norm(model.norm, model.d_model) if self.norm else None
        positions = model.position.build(model.n_positions, model.d_model)
        return PatchFrontend(self, model.d_model, positions, norm, model.dropout)


class PatchFrontend(Frontend):
    """pixels_BAYX -> x_BTD: class token, if any, then the patches row by row."""

    reads = "pixels_BAYX"
    declared = declare(
        weight=Parameter("matrix", "conv"),
        bias=Parameter("bias", "zeros"),
        class_token=Parameter("embedding", "embedding"),
    )

    def __init__(
        self,
        config: PatchFrontendConfig,
        d_model: int,
        positions: Positions | None,
        norm: nn.Module | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(d_model, config.planes, config.patch_size, config.patch_size))
        self.bias = nn.Parameter(torch.empty(d_model)) if config.bias else None
        self.class_token = nn.Parameter(torch.empty(d_model)) if config.class_token else None
        self.positions = positions
        self.norm = norm
        self.dropout = nn.Dropout(dropout)

    def forward(self, positions_BT: torch.Tensor | None, pixels_BAYX: torch.Tensor) -> torch.Tensor:
        """pixels_BAYX: floats, scaled as the data says."""
        size = (self.config.planes, self.config.image_size, self.config.image_size)
        if pixels_BAYX.shape[1:] != size:
            raise Refusal(
                "model",
                NO_VALUE,
                (
                    f"pixels_BAYX has images of {tuple(pixels_BAYX.shape[1:])}: this model takes {size} "
                    "(planes, height, width)"
                ),
                "resize them or set model.frontend.image_size",
            )
        patches_BDYX = nn.functional.conv2d(
            pixels_BAYX.to(self.weight.dtype), self.weight, self.bias, stride=self.config.patch_size
        )
        x_BTD = patches_BDYX.flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x_BTD = torch.cat((self.class_token.expand(x_BTD.shape[0], 1, -1), x_BTD), dim=1)
        if self.positions is not None:
            if positions_BT is None:
                positions_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]
            x_BTD = x_BTD + self.positions(positions_BT).to(x_BTD.dtype)
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return self.dropout(x_BTD)
