"""What a slot of the block costs, told by the configuration of whatever fills it.

    AttentionConfig(n_heads=8).costs(d_model=256, norm=norm) -> SlotCosts(parameters=..., matrices=..., ...)

Closed forms stand beside the thing they describe; `costs.py` adds them up over layers.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

Record = dict[str, torch.Tensor]
"""What a layer tells about one forward pass beside its output; empty for most. It is returned, never stored, so that
activation recomputation cannot count anything twice."""


class Pattern(Protocol):
    """Who sees whom by other rules than a window."""

    def pairs(self, tokens: int) -> int:
        """How many pairs of a query and a key a row of so many tokens has."""


@dataclass(frozen=True, kw_only=True)
class SlotCosts:
    """Closed forms of one mixer or feed-forward network, of one layer.

    parameters: every parameter. active: those that one token's forward pass uses; null where it uses all of them.
    matrices: weights that one token is multiplied with, so 2 FLOPs each in its forward pass.
    token_flops: further forward FLOPs of one token that no matrix of weights accounts for.
    pair_flops: forward FLOPs of one query-key pair. window: how far back a query looks; null is all the way.
    pattern: what a query sees by other rules (blocks, an image); null is none.
    row_flops: further forward FLOPs of a row, however many tokens it has.
    kept_elements: activations of one token held for the backward pass, in the model's precision.
    kept_bytes: bytes of one token held for the backward pass whatever the precision (fp32 statistics).
    state_per_token, state: elements remembered while decoding, for each token and once for each row.
    memory_matrices, memory_kept_elements, state_per_memory_token: as above, for each token of an encoder's output.
    memory_pair_flops: forward FLOPs of one pair of a token and a token of the encoder's output.
    state_bytes: bytes remembered once for each row whatever the precision (fp32 sums).
    """

    parameters: int
    active: int | None = None
    matrices: int
    token_flops: int = 0
    pair_flops: int = 0
    row_flops: int = 0
    memory_matrices: int = 0
    memory_pair_flops: int = 0
    window: int | None = None
    pattern: Pattern | None = None
    kept_elements: int = 0
    kept_bytes: int = 0
    memory_kept_elements: int = 0
    state_per_token: int = 0
    state_per_memory_token: int = 0
    state: int = 0
    state_bytes: int = 0
