"""What a block asks of the network behind its mixer."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from conf.registry import Registry
from model.slots import SlotCosts


@dataclass(frozen=True, kw_only=True)
class AbstractFfnConfig:
    """What stands behind the mixer; each kind has a `kind` of its own and overrides what it does.

    routes: its tokens choose experts, whose auxiliary losses weigh with a row's targets. is_empty: there is none.
    """

    kinds: ClassVar[Registry] = Registry(
        "ffns",
        {
            "dense": "model.ffns.dense:FfnConfig",
            "moe": "model.ffns.experts.config:MoeConfig",
            "none": "model.ffns.dense:NoFfnConfig",
        },
    )

    kind: str
    """Which part this is."""
    routes: ClassVar[bool] = False
    is_empty: ClassVar[bool] = False

    @property
    def experts(self) -> int:
        """How many networks its tokens choose from; 0 where there is no choice."""
        return 0

    @property
    def is_random(self) -> bool:
        """Whether it draws random numbers in training, dropout aside."""
        return False

    @abstractmethod
    def costs(self, d_model: int) -> SlotCosts:
        """Closed forms of one layer's."""

    @abstractmethod
    def build(self, d_model: int, layer: int) -> nn.Module | None:
        """The slot of layer number `layer`, (x_BTD, shared) -> (y_BTD, Record); null where it stays empty."""
