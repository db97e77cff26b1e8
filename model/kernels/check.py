"""Before training, attention kernels are held to the oracle at the run's own head shapes; what fails is replaced."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from model.config import ModelConfig
from model.kernels.attention import AttentionKernel, dense_attention
from model.kernels.select import KERNELS, Selection, kind_of
from model.masks import Mask
from model.mixers.attention import Attention, CrossAttention
from model.mixers.bigbird import BigBirdAttention, BigBirdConfig, layout
from model.mixers.grid import BLOCK as GRID_BLOCK
from model.mixers.grid import GridAttention
from model.mixers.latent import LatentAttention
from model.mixers.longformer import LongformerAttention
from model.positions.grid import Grid

log = logging.getLogger("athanor.model")


def check_kernels(model: nn.Module, *, device: torch.device, dtype: torch.dtype, tokens: int) -> list[str]:
    """Run what was selected against the oracle, forward and backward, for every attention of `model`; demote what fails.

    A kernel that raises, gives NaN or errs more than it may loses its kind of mask to `sdpa`, and that to `dense`.
    Returns (and logs as warnings) one line for each demotion. device, dtype: what attention is computed on and in,
    wherever the weights are now. tokens: the longest row the run has; of these at most 256 are tried on a CPU, where
    lengths make no difference and the oracle is slow, and 2048 elsewhere, or as many as BigBird's blocks begin with.
    """
    said: list[str] = []
    for shape, selection in _shapes(model).items():
        table = selection.tables[device.type if device.type in selection.tables else "cpu"]
        for trial in _trials(shape, tokens, device):
            kind = kind_of(trial.mask, trial.queries, trial.keys)
            while (name := table[kind]) != "dense":
                problem = _problem(KERNELS[name], shape, trial, dtype, device)
                if problem is None:
                    break
                table[kind] = "dense" if name == "sdpa" else "sdpa"
                said.append(f"attention kernel {name} for {kind} masks {problem} at {shape}: using {table[kind]}")
                log.warning("%s", said[-1])
    return said


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """What a layer's attention looks like to a kernel, and what its masks may have.

    blocks, grid: the layout or the image it sees. cross: it looks at an encoder's output.
    globals_apart: its global tokens look at the row by projections of their own, a few queries at many keys. bias: by
    distance, learned or not.
    """

    heads: int
    kv_heads: int
    channels: int
    window: int | None = None
    bias: Literal["learned", "fixed"] | None = None
    causal: bool = True
    grid: Grid | None = None
    blocks: BigBirdConfig | None = None
    cross: bool = False
    globals_apart: bool = False


@dataclass(frozen=True)
class Trial:
    """A mask, and the lengths of the rows it is tried with."""

    mask: Mask
    queries: int
    keys: int


def _shapes(model: nn.Module) -> dict[HeadShape, Selection]:
    """The distinct ones among all layers that attend, an encoder's and a tower's too."""
    shapes: dict[HeadShape, Selection] = {}
    for stacked in model.modules():
        config, stack = getattr(stacked, "config", None), getattr(stacked, "stack", None)
        if not isinstance(config, ModelConfig) or not isinstance(stack, nn.Module):
            continue
        for attention in stack.modules():
            if isinstance(attention, Attention | LatentAttention) and isinstance(attention.kernel, Selection):
                shapes[_shape(attention, config)] = attention.kernel
    return shapes


def _shape(attention: Attention | LatentAttention, config: ModelConfig) -> HeadShape:
    heads = HeadShape(heads=attention.heads, kv_heads=attention.kv_heads, channels=attention.head_dim)
    if isinstance(attention, CrossAttention):
        return replace(heads, causal=False, cross=True)
    return replace(
        heads,
        window=attention.window,
        bias=config.position.bias,
        causal=config.causal,
        grid=attention.grid if isinstance(attention, GridAttention) else None,
        blocks=attention.config if isinstance(attention, BigBirdAttention) else None,
        globals_apart=isinstance(attention, LongformerAttention),
    )


SELF = ((), ("documents",), ("prefix",), ("globals",), ("documents", "prefix", "globals"))
BLOCKS = (("drawn",), ("counted",), ("documents", "drawn"), ("documents", "globals", "counted"))
"""What masks of self-attention may have besides direction, window, bias and grid; and those of rows long enough for
blocks."""


def _trials(shape: HeadShape, longest: int, device: torch.device) -> list[Trial]:
    """Everything that a model with such a layer can be asked."""
    tokens = min(longest, 256 if device.type == "cpu" else 2048)
    if shape.cross:
        as_long = Trial(Mask(causal=False), tokens, tokens)  # a kernel may take this for an encoder's own attention
        return [as_long, *_cross_trials(tokens, tokens - tokens // 4, device)]
    mask = Mask(causal=shape.causal, window=shape.window)
    if shape.grid is not None:  # a short text, so that there is an image
        mask = replace(mask, grid=replace(shape.grid, text=min(shape.grid.text, tokens // 4)), block=GRID_BLOCK)
        end = _documents(tokens, device).clamp(max=1)  # a row is one text and its image
        return [Trial(each, tokens, tokens) for each in (mask, replace(mask, documents_BT=end))]
    trials = [_trial(shape, mask, parts, tokens, device) for parts in SELF]
    if shape.blocks is not None and longest > shape.blocks.longest_whole:
        tokens = max(tokens, shape.blocks.longest_whole + 1)
        trials += [_trial(shape, mask, parts, tokens, device) for parts in BLOCKS]
    return trials + (_cross_trials(2, tokens, device) if shape.globals_apart else [])


def _trial(shape: HeadShape, mask: Mask, parts: Sequence[str], tokens: int, device: torch.device) -> Trial:
    """This mask with parts of those names."""
    place_T = torch.arange(tokens, device=device)
    make: dict[str, Callable[[], dict[str, Any]]] = {
        "documents": lambda: {"documents_BT": _documents(tokens, device)},
        "prefix": lambda: {"prefix_B": torch.tensor([tokens // 5], device=device)},
        "globals": lambda: {"globals_BT": (place_T % max(1, tokens // 2) == 0)[None]},
        "drawn": lambda: _layout(shape, tokens, 0, device),
        "counted": lambda: _layout(shape, tokens, None, device),
    }
    for part in parts:
        mask = replace(mask, **make[part]())
    if shape.bias is not None:
        slope_H = 1 / torch.arange(1, shape.heads + 1, device=device)
        bias_HL = -torch.arange(1 - tokens, tokens, device=device).abs() * slope_H[:, None]
        mask = replace(mask, bias_HL=bias_HL.requires_grad_(shape.bias == "learned"))
    return Trial(mask, tokens, tokens)


def _cross_trials(queries: int, keys: int, device: torch.device) -> list[Trial]:
    """Queries that look at other keys: at all, at those that are not padding, at the documents of the same number."""
    of_keys = {"key_documents_BS": _documents(keys, device)}
    of_both = {**of_keys, "documents_BT": _documents(queries, device)}
    asked: tuple[dict[str, Any], ...] = ({}, of_keys, of_both)
    return [Trial(Mask(causal=False, **given), queries, keys) for given in asked]


def _documents(tokens: int, device: torch.device) -> torch.Tensor:
    """documents_BT of one row with two documents, and padding at the end where it is long enough."""
    documents_BT = torch.ones(1, tokens, dtype=torch.int32, device=device)
    documents_BT[:, tokens // 3 :] = 2
    documents_BT[:, tokens - tokens // 8 :] = 0
    return documents_BT


def _layout(shape: HeadShape, tokens: int, seed: int | None, device: torch.device) -> dict[str, Any]:
    assert shape.blocks is not None
    block = shape.blocks.block
    layout_HQJ = layout(shape.heads, -(-tokens // block), shape.blocks.random_blocks, seed)
    return {"layout_HQJ": layout_HQJ.to(device), "block": block}


def _problem(
    kernel: AttentionKernel, shape: HeadShape, trial: Trial, dtype: torch.dtype, device: torch.device
) -> str | None:
    """What is wrong with this kernel, if anything: errors are measured against fp32, beside the oracle's own.

    They may be twice those, and one unit in the last place of `dtype` besides: unlike the oracle, kernels hold scores in
    it, which is twice half a unit, once in each direction; in fp32 sums of many terms in another order want more, 1e-5.
    """
    floor = max(torch.finfo(dtype).eps, 1e-5)
    generator = torch.Generator().manual_seed(0)
    sizes = (trial.queries, shape.heads), (trial.keys, shape.kv_heads), (trial.keys, shape.kv_heads)
    inputs = [
        torch.randn(1, *size, shape.channels, generator=generator).to(device, dtype) for size in (*sizes, sizes[0])
    ]
    exact = _results(dense_attention, [x.float() for x in inputs], trial.mask)
    expected = exact if dtype == torch.float32 else _results(dense_attention, inputs, trial.mask)
    try:
        found = _results(kernel, inputs, trial.mask)
    except Exception as error:  # whatever a kernel of another package raises, this run can do without it
        return f"cannot run ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    for truth, oracle, ours in zip(exact, expected, found, strict=True):
        if not ours.isfinite().all():
            return "gives NaN or infinity"
        distance, allowed = (ours - truth).norm(), 2 * (oracle - truth).norm() + floor * truth.norm()
        if distance > allowed:
            return f"differs from the definition by {distance:.1e}, allowed are {allowed:.1e},"
    return None


def _results(kernel: AttentionKernel, inputs: list[torch.Tensor], mask: Mask) -> list[torch.Tensor]:
    """The output, and the gradients of queries, keys, values and a learned bias."""
    q_BTHC, k_BSKC, v_BSKC, grad_BTHC = (x.detach().requires_grad_() for x in inputs)
    out_BTHC = kernel(q_BTHC, k_BSKC, v_BSKC, mask, grad_BTHC.shape[-1] ** -0.5)
    leaves = [q_BTHC, k_BSKC, v_BSKC]
    if mask.bias_HL is not None and mask.bias_HL.requires_grad:
        leaves.append(mask.bias_HL)
    return [x.detach().float() for x in (out_BTHC, *torch.autograd.grad(out_BTHC, leaves, grad_BTHC))]
