"""Who may look at whom: a mask is data, which each attention kernel lowers for itself."""

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Mask:
    """The rule of visibility between queries and keys.

    causal: a token sees itself and what stands before it.
    documents_BT: int32 document number of every token, 0 for padding; a document is one unbroken run of its number.
        A token sees its own document only; padding sees nothing and is seen by nothing.
    key_documents_BS: the documents of the keys, where these are an encoder's output and not the queries' own row. A
        token sees the same document there; all but padding where its own row has no documents.
    slots_BT: for cached decoding, the cache slot of every query; key `s` is visible to it when `s <= slot`.
    keys: in cached decoding, how many slots are looked at.
    """

    causal: bool = True
    documents_BT: torch.Tensor | None = None
    key_documents_BS: torch.Tensor | None = None
    slots_BT: torch.Tensor | None = None
    keys: int = 0

    def __post_init__(self) -> None:
        assert self.documents_BT is None or self.slots_BT is None, "cached decoding knows one document per row"

    @cached_property
    def hidden(self) -> torch.Tensor:
        """Of cached decoding, bool [B, T, S]: true where the query may not look; made once for all layers."""
        assert self.slots_BT is not None
        return torch.arange(self.keys, device=self.slots_BT.device) > self.slots_BT[..., None]


def dense(mask: Mask, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """The oracle's lowering: bool [B or 1, T, S], True where the query may look at the key."""
    if mask.slots_BT is not None:
        return ~mask.hidden
    key_S = torch.arange(keys, device=device)
    if mask.causal:
        visible_BTS = (key_S <= torch.arange(queries, device=device)[:, None])[None]
    else:
        visible_BTS = torch.ones(1, queries, keys, dtype=torch.bool, device=device)
    key_BS = mask.documents_BT if mask.key_documents_BS is None else mask.key_documents_BS
    if mask.documents_BT is None and key_BS is not None:
        visible_BTS = visible_BTS & (key_BS != 0)[:, None]
    elif mask.documents_BT is not None and key_BS is not None:
        query_BT1, key_B1S = mask.documents_BT[:, :, None], key_BS[:, None, :]
        visible_BTS = visible_BTS & (query_BT1 == key_B1S) & (query_BT1 != 0)
    return visible_BTS
