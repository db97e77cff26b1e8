"""Noise that is a function of what it is for: recomputation, another split into micro-batches or ranks, or a resumed
run draw the same."""

import torch

# The finalizer of SplitMix64 (Steele et al. 2014); torch has signed 64-bit integers, so the constants are negative.
_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def row_keys(row_BT: torch.Tensor, real_BT: torch.Tensor | None = None) -> torch.Tensor:
    """keys_B: an int64 hash of each row's tokens, samples (floats, to the last bit in fp32) or marks, and their order.

    real_BT: bool, what counts; none if all does.
    """
    if row_BT.is_floating_point():
        row_BT = row_BT.float().view(torch.int32)
    place_T = torch.arange(row_BT.shape[1], device=row_BT.device)
    hashed_BT = _mixed(row_BT.long() + place_T * _GOLDEN)
    return _mixed((hashed_BT if real_BT is None else hashed_BT * real_BT).sum(1))


def uniform(keys_B: torch.Tensor, *, seed: int, layer: int, tokens: int, draws: int) -> torch.Tensor:
    """fp32 [B, tokens, draws] in [0, 1), a function of (key of the row, seed, layer, place) alone."""
    return _uniform(keys_B, seed, layer, tokens, draws)


# One operator, because torch.compile would take the places for indices and fail where their products pass 64 bits.
@torch.library.custom_op("athanor::uniform_noise", mutates_args=())
def _uniform(keys_B: torch.Tensor, seed: int, layer: int, tokens: int, draws: int) -> torch.Tensor:
    keys_B = _mixed(_mixed(keys_B ^ _mixed(torch.full_like(keys_B, seed))) + layer)
    place_TD = torch.arange(tokens * draws, device=keys_B.device).view(tokens, draws)
    bits_BTD = _mixed(keys_B[:, None, None] + place_TD * _GOLDEN)
    return ((bits_BTD >> 40) & 0xFFFFFF).float() * 2.0**-24


@_uniform.register_fake
def _(keys: torch.Tensor, seed: int, layer: int, tokens: int, draws: int) -> torch.Tensor:
    return keys.new_empty(keys.shape[0], tokens, draws, dtype=torch.float32)


def _mixed(x_BTD: torch.Tensor) -> torch.Tensor:
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        x_BTD = (x_BTD ^ _shifted(x_BTD, shift)) * factor
    return x_BTD ^ _shifted(x_BTD, 31)


def _shifted(x_BTD: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, zeros from the left."""
    return (x_BTD >> bits) & ((1 << (64 - bits)) - 1)
