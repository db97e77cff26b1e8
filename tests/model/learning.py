"""What tests of learning share: updates on one batch, a batch in micro-batches, what a forward pass holds."""

from collections.abc import Callable, Mapping

import pytest
import torch

from model.build import build_model
from model.config import ModelConfig
from model.ffns.experts.receipts import is_count
from model.stack import Stack


def learn(model: torch.nn.Module, loss: Callable[[], torch.Tensor], *, steps: int, lr: float) -> list[float]:
    """The loss before each of `steps` updates by Adam of what is trainable."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        value = loss()
        losses.append(value.item())
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def sums_and_gradients(
    config: ModelConfig, batch: Mapping[str, torch.Tensor], *, recompute: bool = False, split: int = 1
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Sums of all results over a batch in `split` micro-batches, and the gradient of every parameter."""
    model = build_model(config).train()
    for stack in (module for module in model.modules() if isinstance(module, Stack)):
        stack.recompute = recompute
    sums: dict[str, torch.Tensor] = {}
    for part in range(split):
        out = model(**{name: x.chunk(split)[part] for name, x in batch.items()})
        out["loss_sum"].backward()
        sums = {name: sums.get(name, 0) + x.detach() for name, x in out.items()}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(dict(model.named_parameters()))
    return sums, gradients


def assert_recomputation_changes_nothing(config: ModelConfig, batch: Mapping[str, torch.Tensor]) -> None:
    """Results and gradients with activations recomputed are the same bit for bit, and nothing is counted twice."""
    plain, again = sums_and_gradients(config, batch), sums_and_gradients(config, batch, recompute=True)
    for one, other in zip(plain, again, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def assert_micro_batches_change_nothing(config: ModelConfig, batch: Mapping[str, torch.Tensor]) -> None:
    """Counts of a batch in four parts are the same, losses and gradients up to rounding."""
    (whole, gradients), (parts, summed) = sums_and_gradients(config, batch), sums_and_gradients(config, batch, split=4)
    for name, total in whole.items():
        if is_count(name):
            assert torch.equal(total, parts[name]), name
        else:
            assert float(total) == pytest.approx(float(parts[name]), rel=1e-5), name
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert all((gradients[name] - summed[name]).abs().max() <= 1e-5 * largest for name in gradients)


def kept_bytes(config: ModelConfig, rows: int, tokens: int, dtype: torch.dtype, *, recompute: bool = False) -> int:
    """Bytes of all storages that the forward pass saves for the backward pass, parameters aside."""
    model = build_model(config, dtype=dtype)
    model.stack.recompute = recompute
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.Tensor] = {}  # the tensors themselves: an address may be given out again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = torch.zeros(rows, tokens, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch, targets_BT=batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())
