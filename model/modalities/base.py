"""What stands before a stack."""

import torch

from model.init import Declared


class Frontend(Declared):
    """forward(positions_BT or null, **inputs) -> x_BTD; inputs go to it by name, as `Transformer.forward` got them."""

    def documents(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """documents_BT, if the inputs themselves say which tokens are padding."""
        return None
