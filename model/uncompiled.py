"""Functions that `torch.compile` leaves alone, without loading the compiler before anyone compiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def uncompiled(fn: Callable[P, T]) -> Callable[P, T]:
    """`torch.compiler.disable(fn)` from the first call on: as a decorator it would import the compiler, 1.4 s of every
    command that only wants to know a model's shape."""
    disabled: Callable[P, T] | None = None

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal disabled
        if disabled is None:
            disabled = torch.compiler.disable(fn)
        return disabled(*args, **kwargs)

    return call
