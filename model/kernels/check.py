"""Before training, attention kernels are held to the oracle at the run's own head shapes; what fails is replaced."""

import logging
from dataclasses import dataclass, replace

import torch
from torch import nn

from model.config import ModelConfig
from model.grid import Grid
from model.kernels.attention import AttentionKernel, dense_attention
from model.kernels.select import KERNELS, Selection, kind_of
from model.masks import Mask
from model.mixers.attention import Attention
from model.mixers.grid import BLOCK, GridAttention
from model.mixers.latent import LatentAttention
from model.position import AlibiConfig, RelativePositionConfig

log = logging.getLogger("athanor.model")


def check_kernels(model: nn.Module, *, device: torch.device, dtype: torch.dtype, tokens: int) -> list[str]:
    """Run what was selected against the oracle, forward and backward, for every attention of `model`; demote what fails.

    A kernel that raises, gives NaN or errs more than it may loses its kind of mask to `sdpa`, and that to `dense`.
    Returns (and logs as warnings) one line for each demotion. device, dtype: what attention is computed on and in,
    wherever the weights are now. tokens: the longest row worth trying; at most 256 on a CPU, where lengths make no
    difference and the oracle is slow.
    """
    tokens = min(tokens, 256 if device.type == "cpu" else 2048)
    said: list[str] = []
    for shape, selection in _shapes(model).items():
        table = selection.tables[device.type if device.type in selection.tables else "cpu"]
        for mask in _trial_masks(shape, tokens, device):
            kind = kind_of(mask, tokens, tokens)
            while (name := table[kind]) != "dense":
                problem = _problem(KERNELS[name], shape, mask, dtype, tokens, device)
                if problem is None:
                    break
                table[kind] = "dense" if name == "sdpa" else "sdpa"
                said.append(f"attention kernel {name} for {kind} masks {problem} at {shape}: using {table[kind]}")
                log.warning("%s", said[-1])
    return said


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """What a layer's attention looks like to a kernel."""

    heads: int
    kv_heads: int
    channels: int
    window: int | None
    biased: bool
    causal: bool
    grid: Grid | None = None


def _shapes(model: nn.Module) -> dict[HeadShape, Selection]:
    """The distinct ones among the layers that attend to their own row."""
    shapes: dict[HeadShape, Selection] = {}
    for stacked in model.modules():
        config = getattr(stacked, "config", None)
        if not isinstance(config, ModelConfig):
            continue
        for attention in stacked.modules():
            if isinstance(attention, Attention | LatentAttention) and isinstance(attention.kernel, Selection):
                shape = HeadShape(
                    heads=attention.heads,
                    kv_heads=attention.kv_heads,
                    channels=attention.head_dim,
                    window=attention.window,
                    biased=isinstance(config.position, AlibiConfig | RelativePositionConfig),
                    causal=config.causal,
                    grid=attention.grid if isinstance(attention, GridAttention) else None,
                )
                shapes[shape] = attention.kernel
    return shapes


def _trial_masks(shape: HeadShape, tokens: int, device: torch.device) -> list[Mask]:
    """Without and with packed documents, padding at the end."""
    bias_HL = None
    if shape.biased:
        bias_HL = -torch.arange(1 - tokens, tokens, device=device).abs() / torch.arange(1, shape.heads + 1)[:, None]
    if shape.grid is not None:  # a short text, so that there is an image
        return [Mask(grid=replace(shape.grid, text=min(shape.grid.text, tokens // 4)), block=BLOCK)]
    mask = Mask(causal=shape.causal, window=shape.window, bias_HL=bias_HL)
    documents_BT = torch.ones(1, tokens, dtype=torch.int32, device=device)
    documents_BT[:, tokens // 3 :] = 2
    documents_BT[:, tokens - tokens // 8 :] = 0
    return [mask, replace(mask, documents_BT=documents_BT)]


def _problem(
    kernel: AttentionKernel, shape: HeadShape, mask: Mask, dtype: torch.dtype, tokens: int, device: torch.device
) -> str | None:
    """What is wrong with this kernel, if anything: errors are measured against fp32, beside the oracle's own."""
    generator = torch.Generator().manual_seed(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    inputs = [torch.randn(1, tokens, n, shape.channels, generator=generator).to(device, dtype) for n in heads]
    exact = _results(dense_attention, [x.float() for x in inputs], mask)
    expected = exact if dtype == torch.float32 else _results(dense_attention, inputs, mask)
    try:
        found = _results(kernel, inputs, mask)
    except Exception as error:  # whatever a kernel of another package raises, this run can do without it
        return f"cannot run ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    for truth, oracle, ours in zip(exact, expected, found, strict=True):
        if not ours.isfinite().all():
            return "gives NaN or infinity"
        distance, allowed = (ours - truth).norm(), 2 * (oracle - truth).norm() + 1e-5 * truth.norm()
        if distance > allowed:
            return f"differs from the definition by {distance:.1e}, allowed are {allowed:.1e},"
    return None


def _results(kernel: AttentionKernel, inputs: list[torch.Tensor], mask: Mask) -> list[torch.Tensor]:
    q_BTHC, k_BTKC, v_BTKC, grad_BTHC = (x.detach().requires_grad_() for x in inputs)
    out_BTHC = kernel(q_BTHC, k_BTKC, v_BTKC, mask, grad_BTHC.shape[-1] ** -0.5)
    gradients = torch.autograd.grad(out_BTHC, (q_BTHC, k_BTKC, v_BTKC), grad_BTHC)
    return [x.detach().float() for x in (out_BTHC, *gradients)]
