"""Who may look at whom, and how far a distance is discounted: a mask is data, which each kernel lowers for itself."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from model.positions.grid import Grid


@dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """The rule of visibility between queries and keys, said once in `allows`, and a bias on their scores.

    causal: a token sees itself and what stands before it.
    window: a query sees keys less than this many tokens away, itself included: behind it, and before it if not causal.
    documents_BT: int32 document number of every token, 0 for padding; a document is one unbroken run of its number.
        A token sees its own document only; padding sees nothing and is seen by nothing.
    key_documents_BS: the same of the keys, where they are other tokens than the queries (cross-attention); documents of
        one row and number belong together, whatever their lengths and order.
    prefix_B: int64, how many first tokens of each row every token sees, whatever direction and window say.
    globals_BT: bool, tokens that see and are seen by all whatever the window and the layout say.
    layout_HQJ: [H or 1, query blocks, key blocks], which blocks of `block` tokens see each other (block-sparse): bool,
        or how many times each key of the block counts.
    grid: a text and the tokens of an image, which see what its pattern reaches; of a causal mask.
    bias_HL: added to the scores by distance: entry [h, key - query + (L - 1) / 2]; L is odd and at least 2S - 1.
        Gradients flow into it.
    slots_BT: for cached decoding, the cache slot of every query, its place among the keys.
    keys: in cached decoding, how many slots are looked at; at_end: the last of them is every query's own.
    """

    causal: bool = True
    window: int | None = None
    documents_BT: torch.Tensor | None = None
    key_documents_BS: torch.Tensor | None = None
    prefix_B: torch.Tensor | None = None
    globals_BT: torch.Tensor | None = None
    layout_HQJ: torch.Tensor | None = None
    block: int = 64
    grid: Grid | None = None
    bias_HL: torch.Tensor | None = None
    slots_BT: torch.Tensor | None = None
    keys: int = 0
    at_end: bool = False
    _lowered: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        alone = self.slots_BT is None or (self.documents_BT is None and self.globals_BT is None)
        assert self.grid is None or self.causal
        assert alone, "cached decoding knows one document per row and no global tokens"

    @property
    def plain(self) -> bool:
        """Nothing but the direction decides who sees whom."""
        parts = (self.documents_BT, self.key_documents_BS, self.prefix_B, self.globals_BT, self.layout_HQJ, self.grid)
        return self.window is None and self.slots_BT is None and all(part is None for part in parts)

    @property
    def full(self) -> bool:
        """In cached decoding: every query sees all that is looked at."""
        parts = (self.key_documents_BS, self.layout_HQJ, self.grid)
        return self.at_end and (self.window or self.keys) >= self.keys and all(part is None for part in parts)

    @property
    def only_key_padding(self) -> bool:
        """Nothing but padding among the keys of another row decides who sees whom (cross-attention)."""
        parts = (self.documents_BT, self.prefix_B, self.globals_BT, self.layout_HQJ, self.bias_HL, self.slots_BT)
        free = not self.causal and self.window is None and all(part is None for part in parts)
        return free and self.key_documents_BS is not None

    @property
    def paired(self) -> bool:
        """Nothing but the documents of queries and of other keys decides who sees whom (cross-attention)."""
        parts = (self.prefix_B, self.globals_BT, self.layout_HQJ, self.grid, self.bias_HL, self.slots_BT)
        free = not self.causal and self.window is None and all(part is None for part in parts)
        return free and self.documents_BT is not None and self.key_documents_BS is not None

    @property
    def sparse(self) -> bool:
        """Parts of it are neither a band around the diagonal nor documents."""
        return any(part is not None for part in (self.prefix_B, self.globals_BT, self.layout_HQJ, self.grid))

    def lowered(self, key: Any, lower: Callable[[], Any]) -> Any:
        """What `lower` makes of this mask, made once for all layers; a compiled graph shares such work by itself."""
        if torch.compiler.is_compiling():
            return lower()
        if key not in self._lowered:
            self._lowered[key] = lower()
        return self._lowered[key]

    def allows(
        self, row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:  # the signature of FlexAttention's mask_mod
        """bool: may this query of this row and head look at this key; integer tensors of any shapes that broadcast."""
        place = query if self.slots_BT is None else self.slots_BT[row, query]
        distance = key - place
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.window is not None:
            seen = seen & (distance.abs() < self.window)
        if self.layout_HQJ is not None:
            seen = seen & (self._met(head, place, key) > 0)
        if self.grid is not None:
            seen = seen & self.grid.sees(place, key)
        if self.globals_BT is not None:
            seen = seen | self.globals_BT[row, query] | self.globals_BT[row, key]
        if self.causal:
            seen = seen & (distance <= 0)
        if self.prefix_B is not None:
            seen = seen | (key < self.prefix_B[row])
        if self.documents_BT is not None:
            seen = seen & (self.documents_BT[row, query] != 0)
        key_documents_BS = self.documents_BT if self.key_documents_BS is None else self.key_documents_BS
        if key_documents_BS is not None:
            seen = seen & (key_documents_BS[row, key] != 0)
            if self.documents_BT is not None:
                seen = seen & (self.documents_BT[row, query] == key_documents_BS[row, key])
        return seen

    def bias(
        self, row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor | None:
        """What is added to the scores of these pairs, if anything; a key that counts n times has log n more."""
        place = query if self.slots_BT is None else self.slots_BT[row, query]
        bias: torch.Tensor | None = None
        if self.bias_HL is not None:
            bias = self.bias_HL[head, key - place + (self.bias_HL.shape[1] - 1) // 2]
        if self.layout_HQJ is not None and self.layout_HQJ.dtype != torch.bool:
            times = self._met(head, place, key).clamp(min=1).log()
            bias = times if bias is None else bias + times
        return bias

    def _met(self, head: torch.Tensor, place: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        assert self.layout_HQJ is not None
        return self.layout_HQJ[head % self.layout_HQJ.shape[0], place // self.block, key // self.block]


def dense(mask: Mask, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """The oracle's lowering: bool [B or 1, H or 1, T, S], True where the query may look at the key."""

    def lower() -> torch.Tensor:
        return mask.allows(*_pairs(mask, queries, keys, device))

    visible_BHTS: torch.Tensor = mask.lowered(("dense", queries, keys), lower)
    return visible_BHTS


def dense_bias(mask: Mask, queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
    """The bias of every pair, [B or 1, H, T, S]."""

    def lower() -> torch.Tensor | None:
        row, head, query, key = _pairs(mask, queries, keys, device)
        if mask.bias_HL is not None:
            head = torch.arange(len(mask.bias_HL), device=device)[:, None, None]
        return mask.bias(row, head, query, key)

    # A learned bias is lowered by every layer: sharing would hand a recomputed layer a graph that is not its own.
    learned = mask.bias_HL is not None and mask.bias_HL.requires_grad
    bias_BHTS: torch.Tensor | None = lower() if learned else mask.lowered(("bias", queries, keys), lower)
    return bias_BHTS


def _pairs(mask: Mask, queries: int, keys: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Row, head, query and key numbers that broadcast to [B or 1, H or 1, T, S]."""
    of_rows = (mask.documents_BT, mask.key_documents_BS, mask.prefix_B, mask.globals_BT, mask.slots_BT)
    rows = max([len(x) for x in of_rows if x is not None], default=1)
    heads = 1 if mask.layout_HQJ is None else len(mask.layout_HQJ)
    row, head, query, key = (torch.arange(count, device=device) for count in (rows, heads, queries, keys))
    return row[:, None, None, None], head[:, None, None], query[None, None, :, None], key
