"""Products arranged for decoding, which multiplies few rows with every weight.

Starting such a product costs as much as the product itself, so maps that read the same input are taken as one: their
weights are laid one after the other in one matrix, of which each becomes a view, and nothing is held twice. Of large
matrices copies are made besides in the order that few rows read fastest (`model.decoding.packed`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from model.decoding.packed import Packing, as_stored
from model.init import Linear, Product


class Joins(nn.Module):
    """A module that can take some of its maps together.

    joined: what multiplies with all of them while `arranged_products` lasts, their outputs side by side; else None.
    """

    joined: Product | None = None

    def joinable(self) -> Sequence[nn.Module]:
        """The maps whose outputs the module wants side by side, in this order."""
        return ()


@contextmanager
def arranged_products(model: nn.Module, packing: Packing | None = None) -> Iterator[None]:
    """Join what can be joined, for as long as weights stay as they are; maps with adapters stay by themselves.

    packing: copies the large ones among the products that each step computes; null copies none.
    """
    packing = Packing() if packing is None else packing
    every_step = set(packing.every_step(model))
    chosen = [module for module in model.modules() if isinstance(module, Joins) and _plain(module.joinable())]
    joined: set[nn.Module] = set()
    try:
        for module in chosen:
            maps = [part for part in module.joinable() if isinstance(part, Linear)]
            biases = [part.bias for part in maps if part.bias is not None]
            weight_OI, bias_O = _joined([part.weight for part in maps]), _joined(biases) if biases else None
            make = packing.product if every_step.issuperset(maps) else as_stored
            module.joined = make(weight_OI, bias_O)
            joined.update(maps)
        for part in every_step - joined:
            part.product = packing.product(part.weight.detach(), part.bias)
        yield
    finally:
        for module in chosen:
            module.joined = None
        for part in every_step:
            part.product = None


def _plain(maps: Sequence[nn.Module]) -> bool:
    """Whether these are maps as the model was built with, all with an offset or none."""
    return len(maps) > 1 and all(type(part) is Linear for part in maps) and len({p.bias is None for p in maps}) == 1


def _joined(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of all along the first axis, the parameters made views of it unless they are already."""
    first, count = parameters[0], sum(parameter.shape[0] for parameter in parameters)
    step, end = first.element_size(), first.data_ptr()
    storage = first.untyped_storage()
    for parameter in parameters:
        if parameter.data_ptr() != end or parameter.untyped_storage().data_ptr() != storage.data_ptr():
            break
        end += parameter.numel() * step
    else:
        return first.detach().as_strided((count, *first.shape[1:]), first.stride(), first.storage_offset())
    with torch.inference_mode(False):  # what it makes could not be trained any more
        whole = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, part in zip(parameters, whole.split([p.shape[0] for p in parameters]), strict=True):
            parameter.data = part
    return whole
