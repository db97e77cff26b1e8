"""What stands before a stack and what stands behind it."""

from typing import ClassVar

import torch

from model.init import Declared


class Frontend(Declared):
    """forward(positions_BT or null, **inputs) -> x_BTD; inputs go to it by name, as `Transformer.forward` got them."""

    def documents(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """documents_BT, if the inputs themselves say which tokens are padding."""
        return None


class Head(Declared):
    """forward(x_BTD, per_token=False, **targets) -> named tensors: outputs without targets, sums for a loss with them.

    takes: the names of the targets, which `Transformer.forward` hands on. sees: names of inputs that it is also given,
    where they are there: tokens_BT, documents_BT.
    """

    takes: ClassVar[frozenset[str]] = frozenset()
    sees: ClassVar[frozenset[str]] = frozenset()
