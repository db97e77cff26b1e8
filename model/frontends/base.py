"""What stands before a stack."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from model.errors import ModelError
from model.init import Declared

Source = Sequence[int] | torch.Tensor
"""One input of a model, without a batch: token ids, or a tensor: pixels [A, Y, X], mel frames [A, W], samples [W]."""


class Frontend(Declared):
    """forward(positions_BT or null, **inputs) -> x_BTD; inputs go to it by name, as `Transformer.forward` got them.

    reads: the name of the one that is always there. optional: those of the others.
    """

    reads: ClassVar[str]
    optional: ClassVar[frozenset[str]] = frozenset()

    def documents(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """documents_BT, if the inputs themselves say which tokens are padding."""
        return None

    def batched(self, sources: Sequence[Source], device: torch.device) -> dict[str, torch.Tensor]:
        """The inputs by name of a batch of these. Raises ModelError where their shapes differ and no padding is known."""
        rows = [torch.as_tensor(source, device=device) for source in sources]
        shapes = list(dict.fromkeys(tuple(row.shape) for row in rows))
        if len(shapes) > 1:
            raise ModelError(
                f"{self.reads} would have rows of {shapes[0]} and {shapes[1]}: this frontend knows no padding; bring them "
                "to one shape, or hand them over one by one."
            )
        return {self.reads: torch.stack(rows)}
