"""Which parameters are trained, by the names they have."""

import fnmatch
from collections.abc import Sequence

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Train no parameter whose name matches one of `patterns`, such as `frontend.*` or `stack.layers.0.*`; their names.

    A tied head is its embedding and freezes with it. Raises Refusal where a pattern matches nothing.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    frozen = []
    for pattern in patterns:
        matching = [name for name in named if fnmatch.fnmatch(name, pattern)]
        if not matching:
            raise Refusal(
                "model",
                NO_VALUE,
                f"freeze has {pattern!r}, which matches no parameter",
                f"a parameter's name is like {next(iter(named))!r}, and * stands for any part of it",
            )
        frozen += matching
    for name in frozen:
        named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise Refusal("model", NO_VALUE, f"freeze = {list(patterns)} leaves nothing to train", "freeze less")
    return list(dict.fromkeys(frozen))


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The part of the state dict that is being trained, detached: what is to be saved of an adapted model."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
