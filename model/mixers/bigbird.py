"""BigBird's attention: blocks around the diagonal, blocks drawn at random, the first and the last block (Zaheer et al.
2020, https://arxiv.org/abs/2007.14062)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from conf.refusal import Refusal
from model.kernels.attention import AttentionKernel
from model.masks import Mask
from model.mixers.attention import Attention, AttentionConfig
from model.mixers.base import MixerConfig, MixerInput, refuse_encoder_only
from model.norms.norm import NormConfig
from model.slots import SlotCosts
from model.uncompiled import uncompiled

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class BigBirdConfig(MixerConfig):
    """Blocks near, drawn by chance, first and last.

    Rows of at most 5 + 2 * random_blocks blocks are attended to whole, as in Hugging Face's class.
    """

    drops_bias: ClassVar[bool] = True

    kind: Literal["bigbird"] = "bigbird"
    """Which part this is."""
    n_heads: int = 8
    """Heads."""
    qkv_bias: bool = True
    """Queries, keys and values have offsets."""
    block: int = 64
    """Tokens of a block."""
    random_blocks: int = 3
    """Blocks that each block of queries sees by chance."""
    drawn_in_eval: bool = False
    """false is Hugging Face's class: in evaluation every block drawn is the first one again, so that its tokens count
    1 + random_blocks times."""

    def __post_init__(self) -> None:
        if self.block < 1 or self.random_blocks < 0:
            raise Refusal(
                "block",
                self.block,
                f"and mixer.random_blocks {self.random_blocks}: a block has tokens, and what is drawn is counted",
                "use 64 and 3",
            )
        self.attention  # noqa: B018 - refuses what no attention can be

    @property
    def attention(self) -> AttentionConfig:
        """The same as ordinary attention."""
        return AttentionConfig(n_heads=self.n_heads, qkv_bias=self.qkv_bias, out_bias=True)

    def check(self, model: ModelConfig) -> None:
        self.attention.check(model)
        refuse_encoder_only(self.kind, model)

    def build(self, d_model: int, norm: NormConfig, attend: AttentionKernel) -> BigBirdAttention:
        return BigBirdAttention(self, d_model, norm, attend)

    def costs(self, d_model: int, norm: NormConfig) -> SlotCosts:
        """Those of attention, over fewer pairs."""
        return replace(self.attention.costs(d_model, norm), pattern=self)

    @property
    def longest_whole(self) -> int:
        """Tokens of the longest row that is attended to whole."""
        return (5 + 2 * self.random_blocks) * self.block

    def pairs(self, tokens: int) -> int:
        """Query-key pairs of one head: the first and the last block see all, those next to them three fixed blocks and
        the last, all others four and the last; these all see `random_blocks` more, each as often as it is drawn."""
        if tokens <= self.longest_whole:
            return tokens * tokens
        blocks = -(-tokens // self.block)
        last = tokens - (blocks - 1) * self.block  # tokens of the last block, which nobody draws
        whole, others = self.random_blocks * self.block + last, blocks - 4
        beside = 2 * self.block * (3 * self.block + whole)
        return (self.block + last) * tokens + beside + others * self.block * (4 * self.block + whole)


class BigBirdAttention(Attention):
    """Attention under a layout of blocks; its number is the seed of the blocks that it draws."""

    def __init__(self, config: BigBirdConfig, d_model: int, norm: NormConfig, kernel: AttentionKernel) -> None:
        super().__init__(config.attention, d_model, norm, kernel)
        self.config = config

    @uncompiled  # it draws, and it remembers
    def mask(self, shared: MixerInput, tokens: int) -> Mask:
        """The layout of this layer's blocks; rows too short for one are attended to whole (`BigBirdConfig`)."""
        config, mask = self.config, shared.mask
        if tokens <= config.longest_whole:
            return mask
        seed = self.number if self.training or config.drawn_in_eval else None
        blocks = -(-tokens // config.block)

        def lower() -> Mask:
            layout_HQJ = layout(self.heads, blocks, config.random_blocks, seed)
            return replace(mask, layout_HQJ=layout_HQJ.to(self.q.like.device), block=config.block)

        sparse: Mask = mask.lowered((config, self.heads, tokens, seed), lower)
        return sparse


@lru_cache(maxsize=64)
def layout(heads: int, blocks: int, random_blocks: int, seed: int | None) -> torch.Tensor:
    """layout_HQJ as `Mask` has it, a function of its arguments alone; without a seed every block drawn is the first.

    It has an entry for each pair of blocks and head, the one thing that grows with the square of a row: of 64 tokens a
    block, 12 heads and 16,384 tokens 0.75 MiB, and four times that while it is drawn.
    """
    place_J = torch.arange(blocks)
    fixed_QJ = (place_J[:, None] - place_J).abs() <= 1
    fixed_QJ[[0, -1]] = fixed_QJ[:, [0, -1]] = True
    if seed is None:
        counts_1QJ = fixed_QJ.int()[None]
        counts_1QJ[:, 1:-1, 0] += random_blocks
        return counts_1QJ
    generator = torch.Generator().manual_seed(seed)
    lots_HQJ = torch.rand(heads, blocks, blocks, generator=generator).masked_fill(fixed_QJ, -1.0)
    drawn_HQJ = torch.zeros(lots_HQJ.shape, dtype=torch.bool)
    drawn_HQJ.scatter_(2, lots_HQJ.topk(min(random_blocks, blocks), dim=2).indices, True)
    return fixed_QJ | (drawn_HQJ & (lots_HQJ >= 0))
