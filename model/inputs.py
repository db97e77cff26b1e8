"""Keyword inputs of a model, sorted by who reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from conf.refusal import NO_VALUE, Refusal

if TYPE_CHECKING:
    from model.architecture import Transformer

ENCODER = "encoder_"
"""What the names of an encoder's inputs begin with: `encoder_tokens_BT` is its `tokens_BT`."""

TOWER = "tower_"
"""The same of a second tower's inputs: `tower_pixels_BAYX`."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    """By name: of the frontend, of the head, of the encoder and of the other tower, these under their own names."""

    frontend: Tensors
    head: Tensors
    encoder: Tensors
    tower: Tensors


def sort_inputs(model: Transformer, inputs: Tensors) -> Inputs:
    """Split keyword inputs by owner. Raises Refusal for those that the model does not take, and for what it lacks."""
    inner: list[Tensors] = []
    for prefix, module in ((ENCODER, model.encoder), (TOWER, model.tower)):
        given = {name: tensor for name, tensor in inputs.items() if name.startswith(prefix)}
        if given and module is None:
            raise Refusal(
                "model",
                NO_VALUE,
                f"{', '.join(given)} was given, but the model has no {prefix.rstrip('_')}",
                "leave it out",
            )
        inner.append({name.removeprefix(prefix): tensor for name, tensor in given.items()})
        inputs = {name: tensor for name, tensor in inputs.items() if name not in given}
    frontend, head = model.frontend, model.head
    of_frontend = {name: tensor for name, tensor in inputs.items() if name not in head.takes}
    of_head = {name: tensor for name, tensor in inputs.items() if name in head.takes | head.reads}
    known = {frontend.reads, *frontend.optional}
    if not of_frontend.keys() <= known or frontend.reads not in of_frontend:
        unknown = ", ".join(sorted(of_frontend.keys() - known)) or "nothing of what it reads"
        modules = ((ENCODER, model.encoder), (TOWER, model.tower))
        others = [f"{prefix}…" for prefix, module in modules if module is not None]
        raise Refusal(
            "model",
            NO_VALUE,
            (
                f"the model was given {unknown}: it reads {frontend.reads}, and takes "
                f"{', '.join([*sorted(known | head.takes), *others])} besides documents_BT, positions_BT "
                "and what else forward names"
            ),
            "give it those",
        )
    return Inputs(of_frontend, of_head, *inner)
