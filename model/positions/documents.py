"""Positions that restart with every document of a packed row."""

import torch
from torch import nn


def document_starts(documents_BT: torch.Tensor) -> torch.Tensor:
    """bool: true for the first token of every document and of every run of padding."""
    return documents_BT != nn.functional.pad(documents_BT[:, :-1], (1, 0), value=-1)


def document_positions(documents_BT: torch.Tensor) -> torch.Tensor:
    """int64 position of each token within its document, where a document is a run of equal numbers in a row."""
    index_BT = torch.arange(documents_BT.shape[1], device=documents_BT.device).expand(documents_BT.shape)
    start_BT = torch.where(document_starts(documents_BT), index_BT, 0).cummax(dim=1).values
    return index_BT - start_BT


def document_ends(documents_BT: torch.Tensor) -> torch.Tensor:
    """int64 place behind the last token of each token's document."""
    backwards_BT = torch.arange(documents_BT.shape[1], 0, -1, device=documents_BT.device)
    return backwards_BT.flip(0) + document_positions(documents_BT.flip(1)).flip(1)
