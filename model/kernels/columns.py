"""Attention along the columns of an image: its tokens are put column by column, where the tokens that a query sees stand
together, and back again (Ramesh et al. 2021, https://arxiv.org/abs/2102.12092, figure 11)."""

from dataclasses import replace

import torch

from model.kernels.attention import AttentionKernel
from model.masks import Mask


def by_columns(
    kernel: AttentionKernel,
    q_BTHC: torch.Tensor,
    k_BTKC: torch.Tensor,
    v_BTKC: torch.Tensor,
    mask: Mask,
    scale: float,
) -> torch.Tensor:
    """What `kernel` makes of a mask whose grid has the pattern `column`; so a kernel that skips blocks has some to skip.

    What fills up the last row of an image that has not all its tokens is behind every real token, which does not see it.
    """
    grid, tokens = mask.grid, q_BTHC.shape[1]
    assert grid is not None and mask.bias_HL is None
    height = -(-(tokens - grid.text) // grid.width)
    if height < 1:
        return kernel(q_BTHC, k_BTKC, v_BTKC, replace(mask, grid=None), scale)
    filling = grid.text + height * grid.width - tokens

    def turned(x_BTHC: torch.Tensor, sides: tuple[int, int]) -> torch.Tensor:
        text_BTHC, image_BTHC = x_BTHC[:, : grid.text], x_BTHC[:, grid.text :]
        return torch.cat((text_BTHC, image_BTHC.unflatten(1, sides).transpose(1, 2).flatten(1, 2)), dim=1)

    inputs = (torch.nn.functional.pad(x_BTHC, (0, 0, 0, 0, 0, filling)) for x_BTHC in (q_BTHC, k_BTKC, v_BTKC))
    q_BTHC, k_BTKC, v_BTKC = (turned(x_BTHC, (height, grid.width)) for x_BTHC in inputs)
    transposed: Mask = mask.lowered(
        "columns",
        lambda: replace(mask, grid=replace(grid, pattern="transposed", width=height), documents_BT=None),
    )
    out_BTHC = turned(kernel(q_BTHC, k_BTKC, v_BTKC, transposed, scale), (grid.width, height))[:, :tokens]
    if mask.documents_BT is None:
        return out_BTHC
    return out_BTHC.masked_fill((mask.documents_BT == 0)[:, :, None, None], 0.0)
