"""Which kernel serves which kind of mask: chosen once, at build."""

from collections.abc import Collection
from typing import Literal

import torch

from conf.refusal import Refusal
from model.kernels.accelerated import flash_attention, flash_installed, flex_attention, varlen_attention
from model.kernels.attention import AttentionKernel, cached_attention, dense_attention, sdpa_attention
from model.kernels.blockwise import banded_attention
from model.kernels.chunked import chunked_attention
from model.masks import Mask

Kind = Literal["plain", "window", "documents", "biased", "sparse", "cross", "paired", "cached"]
KINDS: tuple[Kind, ...] = ("plain", "window", "documents", "biased", "sparse", "cross", "paired", "cached")

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
    "blockwise": frozenset(("plain", "window", "documents", "biased", "paired")),
    "chunked": frozenset(("plain", "window", "documents", "biased", "sparse")),
    "varlen": frozenset(("plain", "window", "documents", "paired")),
    "flex": frozenset(("plain", "window", "documents", "biased", "sparse", "cross", "paired")),
    "flash": frozenset(("plain", "window", "documents", "paired")),
}
"""The kinds of mask that each kernel honours. One that is asked for serves those; the rest goes as with `auto`."""

ANY_CHANNELS = frozenset(("dense", "cached"))
"""Kernels that take values of other channels than keys; for others the narrower ones are filled up with zeros."""


def kind_of(mask: Mask, queries: int, keys: int) -> Kind:
    """What a kernel must be able to do for this mask; each kind includes those before it in `KINDS` up to `sparse`.

    cross: keys are other tokens than the queries; paired: and documents of both are packed, which see one another.
    """
    if mask.slots_BT is not None:
        return "cached"
    if mask.key_documents_BS is not None or queries != keys:
        return "paired" if mask.paired else "cross"
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
        kind, channels = kind_of(mask, q_BTHC.shape[1], k_BSKC.shape[1]), v_BSKC.shape[-1]
        name = self.named(q_BTHC.device.type, kind)
        if channels != q_BTHC.shape[-1] and name not in ANY_CHANNELS:
            widest = max(channels, q_BTHC.shape[-1])
            q_BTHC, k_BSKC, v_BSKC = (
                torch.nn.functional.pad(x, (0, widest - x.shape[-1])) for x in (q_BTHC, k_BSKC, v_BSKC)
            )
        return KERNELS[name](q_BTHC, k_BSKC, v_BSKC, mask, scale)[..., :channels]

    def named(self, device_type: str, kind: Kind) -> str:
        """The name of the kernel that serves a kind of mask on a type of device."""
        return self.tables.get(device_type, self.tables["cpu"])[kind]

    def described(self, device_type: str) -> str:
        """In one line: every kernel and the kinds it serves."""
        served: dict[str, list[str]] = {}
        for kind in KINDS:
            served.setdefault(self.named(device_type, kind), []).append(kind)
        return ", ".join(f"{name} for {' '.join(kinds)}" for name, kinds in served.items())


def select_kernel(name: str = "auto", needs: Collection[Kind] = ()) -> Selection:
    """The kernel of that name where it can serve, else the fastest that runs on the device; `auto` is always these.

    needs: kinds of mask that the model cannot do without. Raises Refusal for an unknown name, or one that lacks them.
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
            "paired": flash or "varlen",
            "cached": "cached",
        },
    }
    if name == "auto":
        return Selection(tables)
    if name not in KERNELS or name == "cached":
        known = ", ".join(sorted(KERNELS.keys() - {"cached"}))
        raise Refusal("kernel", name, "there is no such kernel", f"choose auto, or one of {known}")
    lacking = [kind for kind in needs if kind not in CAN[name]]
    if lacking:
        able = ", ".join(sorted(other for other in KERNELS if set(needs) <= CAN[other]))
        raise Refusal(
            "kernel",
            name,
            f"it has no {' and no '.join(lacking)} masks, and the model needs them",
            f"choose auto or one of {able}",
        )
    for table in tables.values():
        table.update(dict.fromkeys(CAN[name] - ({"cached"} if name == "sdpa" else set()), name))
    return Selection(tables)
