"""Which kernel serves which kind of mask: chosen once at build, checked against the oracle before training."""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from model.errors import ModelError
from model.kernels.accelerated import flash_attention, flash_installed, flex_attention, varlen_attention
from model.kernels.attention import AttentionKernel, cached_attention, dense_attention, sdpa_attention
from model.kernels.blockwise import banded_attention
from model.kernels.chunked import chunked_attention
from model.masks import Mask

log = logging.getLogger("athanor.model")

Kind = Literal["plain", "window", "documents", "biased", "sparse", "cross", "cached"]
KINDS: tuple[Kind, ...] = ("plain", "window", "documents", "biased", "sparse", "cross", "cached")

KERNELS: dict[str, AttentionKernel] = {
    "dense": dense_attention,
    "sdpa": sdpa_attention,
    "cached": cached_attention,
    "blockwise": banded_attention,
    "chunked": chunked_attention,
    "varlen": varlen_attention,
    "flex": flex_attention,
    "flash": flash_attention,
}

CAN: dict[str, frozenset[Kind]] = {
    "dense": frozenset(KINDS),
    "sdpa": frozenset(KINDS),
    "cached": frozenset(("cached",)),
    "blockwise": frozenset(("plain", "window", "documents", "biased")),
    "chunked": frozenset(("plain", "window", "documents", "biased", "sparse")),
    "varlen": frozenset(("plain", "window", "documents")),
    "flex": frozenset(("plain", "window", "documents", "biased", "sparse", "cross")),
    "flash": frozenset(("plain", "window", "documents")),
}
"""The kinds of mask that each kernel honours. One that is asked for serves those; the rest goes as with `auto`."""


def kind_of(mask: Mask, queries: int, keys: int) -> Kind:
    """What a kernel must be able to do for this mask; each kind includes those before it in `KINDS` up to `sparse`."""
    if mask.slots_BT is not None:
        return "cached"
    if mask.key_documents_BS is not None or queries != keys:
        return "cross"
    if mask.sparse:
        return "sparse"
    if mask.bias_HL is not None:
        return "biased"
    if mask.documents_BT is not None:
        return "documents"
    return "plain" if mask.window is None else "window"


class Selection:
    """A kernel made of kernels: for each type of device, the one that serves each kind of mask."""

    def __init__(self, tables: dict[str, dict[Kind, str]]) -> None:
        self.tables = tables

    def __call__(
        self, q_BTHC: torch.Tensor, k_BSKC: torch.Tensor, v_BSKC: torch.Tensor, mask: Mask, scale: float
    ) -> torch.Tensor:
        kind = kind_of(mask, q_BTHC.shape[1], k_BSKC.shape[1])
        return KERNELS[self.named(q_BTHC.device.type, kind)](q_BTHC, k_BSKC, v_BSKC, mask, scale)

    def named(self, device_type: str, kind: Kind) -> str:
        return self.tables.get(device_type, self.tables["cpu"])[kind]

    def described(self, device_type: str) -> str:
        """In one line: every kernel and the kinds it serves."""
        served: dict[str, list[str]] = {}
        for kind in KINDS:
            served.setdefault(self.named(device_type, kind), []).append(kind)
        return ", ".join(f"{name} for {' '.join(kinds)}" for name, kinds in served.items())


def select_kernel(name: str = "auto", needs: Collection[Kind] = ()) -> Selection:
    """The kernel of that name where it can serve, else the fastest that runs on the device; `auto` is always these.

    needs: kinds of mask that the model cannot do without. Raises ModelError for an unknown name, or one that lacks them.
    """
    flash = "flash" if flash_installed() else None
    tables: dict[str, dict[Kind, str]] = {
        "cpu": {
            **dict.fromkeys(KINDS, "blockwise"),
            "sparse": "chunked",
            "cross": "sdpa",
            "cached": "cached",
        },
        "cuda": {
            "plain": flash or "sdpa",
            "window": flash or "varlen",
            "documents": flash or "varlen",
            "biased": "flex",
            "sparse": "flex",
            "cross": "sdpa",
            "cached": "cached",
        },
    }
    if name == "auto":
        return Selection(tables)
    if name not in KERNELS or name == "cached":
        known = ", ".join(sorted(KERNELS.keys() - {"cached"}))
        raise ModelError(f"kernel is {name!r}: choose auto, or one of {known}.")
    lacking = [kind for kind in needs if kind not in CAN[name]]
    if lacking:
        able = ", ".join(sorted(other for other in KERNELS if set(needs) <= CAN[other]))
        raise ModelError(
            f"kernel is {name!r}, which has no {' and no '.join(lacking)} masks, and the model needs them: choose auto "
            f"or one of {able}."
        )
    for table in tables.values():
        table.update(dict.fromkeys(CAN[name] - ({"cached"} if name == "sdpa" else set()), name))
    return Selection(tables)


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """What a layer's attention looks like to a kernel."""

    heads: int
    kv_heads: int
    channels: int
    window: int | None = None
    biased: bool = False
    causal: bool = True


def check_selection(
    selection: Selection, shapes: Iterable[HeadShape], *, device: torch.device, dtype: torch.dtype, tokens: int
) -> list[str]:
    """Run what was selected against the oracle, forward and backward, at these shapes; demote what differs.

    A kernel that raises, gives NaN or errs more than it may loses its kind of mask to `sdpa`, and that to `dense`.
    Returns (and logs as warnings) one line for each demotion. tokens: the longest row worth trying; at most 256 on a
    CPU, where lengths make no difference and the oracle is slow.
    """
    tokens = min(tokens, 256 if device.type == "cpu" else 2048)
    said: list[str] = []
    for shape in dict.fromkeys(shapes):
        for mask in _trial_masks(shape, tokens, device):
            kind = kind_of(mask, tokens, tokens)
            while (name := selection.named(device.type, kind)) != "dense":
                problem = _problem(KERNELS[name], shape, mask, dtype, tokens, device)
                if problem is None:
                    break
                instead = "dense" if name == "sdpa" else "sdpa"
                selection.tables[device.type if device.type in selection.tables else "cpu"][kind] = instead
                said.append(f"attention kernel {name} for {kind} masks {problem} at {shape}: using {instead}")
                log.warning("%s", said[-1])
    return said


def _trial_masks(shape: HeadShape, tokens: int, device: torch.device) -> list[Mask]:
    """Without and with packed documents, padding at the end."""
    bias_HL = None
    if shape.biased:
        bias_HL = -torch.arange(1 - tokens, tokens, device=device).abs() / torch.arange(1, shape.heads + 1)[:, None]
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
