"""Weights that others store as lengths and directions (Salimans & Kingma 2016), which we hold as one tensor."""

from collections.abc import Mapping

import torch

SPELLINGS = (("parametrizations.weight.original0", "parametrizations.weight.original1"), ("weight_g", "weight_v"))
"""How PyTorch names length and direction, today and formerly."""


def folded(theirs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With every pair of length g and direction v as the weight g v / |v|."""
    state = dict(theirs)
    for length, direction in SPELLINGS:
        for name in [name for name in state if name.endswith(f".{length}")]:
            stem = name.removesuffix(length)
            if stem + direction in state:
                g, v = state.pop(name), state.pop(stem + direction)
                state[f"{stem}weight"] = v * (g / _lengths(v, g.ndim - 1 - g.shape[::-1].index(max(g.shape))))
    return state


def unfolded(state: Mapping[str, torch.Tensor], axes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """With the weights named in `axes` as lengths along that axis and, for direction, the weight itself."""
    theirs = dict(state)
    for name in axes.keys() & state.keys():
        weight = theirs.pop(name)
        stem = name.removesuffix("weight")
        for part, tensor in zip(SPELLINGS[0], (_lengths(weight, axes[name]), weight), strict=True):
            theirs[stem + part] = tensor
    return theirs


def _lengths(v: torch.Tensor, axis: int) -> torch.Tensor:
    others = [other for other in range(v.ndim) if other != axis]
    return torch.linalg.vector_norm(v, dim=others, keepdim=True)
