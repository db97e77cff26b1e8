"""What turns the last x_BTD into logits or a loss."""

import torch
from torch import nn

from model.init import Declared, Parameter, declare
from model.loss import capped, chunked_cross_entropy, token_scores


class LanguageHead(Declared):
    """Vocabulary logits, and their cross-entropy without ever holding them all.

    A tied head registers the embedding's own parameter as its `weight`, so that it reads nothing but its own inside
    its own forward: ZeRO-3 gathers a module's parameters around that module's forward and nowhere else.
    """

    declared = declare(weight=Parameter("head", "head"), bias=Parameter("bias", "zeros"))

    def __init__(self, weight_VD: nn.Parameter, *, bias: bool, soft_cap: float | None, z_loss: float) -> None:
        super().__init__()
        self.weight = weight_VD
        self.bias = nn.Parameter(torch.empty(weight_VD.shape[0])) if bias else None
        self.soft_cap = soft_cap
        self.z_loss = z_loss

    def forward(
        self, x_BTD: torch.Tensor, targets_BT: torch.Tensor | None = None, per_token: bool = False
    ) -> dict[str, torch.Tensor]:
        """{"logits"}; with targets the sums of `chunked_cross_entropy`, or per token {"nll", "is_top"} of [B, T]."""
        if targets_BT is not None and per_token:
            nll_N, is_top_N = token_scores(
                x_BTD.flatten(0, -2), self.weight, targets_BT.flatten(), bias_V=self.bias, soft_cap=self.soft_cap
            )
            return {"nll": nll_N.view(targets_BT.shape), "is_top": is_top_N.view(targets_BT.shape)}
        if targets_BT is not None:
            return chunked_cross_entropy(
                x_BTD.flatten(0, -2),
                self.weight,
                targets_BT.flatten(),
                bias_V=self.bias,
                soft_cap=self.soft_cap,
                z_loss=self.z_loss,
            )
        logits_BTV = nn.functional.linear(x_BTD, self.weight, self.bias)
        if self.soft_cap is not None:
            logits_BTV = capped(logits_BTV, self.soft_cap)
        return {"logits": logits_BTV}
