"""What a model remembers of a batch between decoding steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from conf.refusal import NO_VALUE, Refusal
from model.mixers.base import MixerState
from model.positions.base import Rotation

SLOT_QUANTUM = 64


def rounded_slots(slots: int) -> int:
    """Slots are looked at in multiples of 64: on CPUs oneDNN compiles a product anew for every shape it meets."""
    return -(-slots // SLOT_QUANTUM) * SLOT_QUANTUM


@dataclass(frozen=True)
class Claim:
    """Places of a call's tokens in a cache.

    slots_BT: where each is remembered, which is its position too. common_slot: the first of them, if all rows have the
    same. rotation: the angles of those slots, where the model rotates. keys: how many slots are looked at; 0 where the
    new tokens are all there is to see. at_end: the last slot that is looked at is every query's own.
    """

    slots_BT: torch.Tensor
    common_slot: int | None
    rotation: Rotation | None
    keys: int
    at_end: bool


class Cache:
    """One state per layer, and how many tokens of each row they hold.

    memory_documents_BS: of an encoder's output, whose keys and values the states hold: 0 for padding.
    lengths: tokens remembered of each row, as plain numbers so that decoding never waits for the device; a row's next
        token goes to the slot of that number.
    angles: of rotary positions, for every slot, made once. static: every step looks at all slots and addresses them by a
        tensor, so that its shapes never change, for compiled steps and CUDA graphs; else it looks at those in use.
    offset: slots before the first token of every row, which hold a learned prefix.
    """

    def __init__(
        self,
        states: list[MixerState],
        rows: int,
        max_tokens: int,
        device: torch.device,
        *,
        angles: Rotation | None = None,
        static: bool = False,
        offset: int = 0,
    ) -> None:
        self.states = states
        self.max_tokens = max_tokens
        self.lengths = [0] * rows
        self.memory_documents_BS: torch.Tensor | None = None
        self.device = device
        self.angles = angles
        self.static = static
        self.offset = offset

    @property
    def longest(self) -> int:
        """Tokens of the fullest row."""
        return max(self.lengths)

    @property
    def common_slot(self) -> int | None:
        """Where the next token of every row goes, if they all hold equally many and shapes may tell."""
        return None if self.static or min(self.lengths) != max(self.lengths) else self.lengths[0] + self.offset

    def claim(self, tokens: int) -> Claim:
        """Places for `tokens` further tokens of every row. Raises Refusal when they do not fit."""
        if self.longest + tokens > self.max_tokens:
            raise Refusal(
                "model",
                NO_VALUE,
                f"{self.longest} remembered and {tokens} new tokens do not fit a cache of {self.max_tokens}",
                "make it larger with new_cache(max_tokens=...)",
            )
        first = self.common_slot
        if first is not None:
            slots_BT = torch.arange(first, first + tokens, device=self.device).expand(len(self.lengths), -1)
            rotation = None if self.angles is None else self.angles.between(first, first + tokens)
        else:
            lengths_B = torch.tensor(self.lengths, device=self.device)
            slots_BT = lengths_B[:, None] + torch.arange(self.offset, self.offset + tokens, device=self.device)
            rotation = None if self.angles is None else self.angles.at(slots_BT)
        # Of an empty cache the new tokens are all there is to see.
        keys = self._keys(tokens) if self.longest or self.static or self.offset else 0
        return Claim(slots_BT, first, rotation, keys, at_end=tokens == 1 and first is not None)

    def _keys(self, tokens: int) -> int:
        """How many slots `tokens` further tokens of every row look at, unused ones among them but for a single token of
        rows that are equally long."""
        if tokens == 1 and self.common_slot is not None:
            return self.common_slot + 1
        return rounded_slots(self.offset + (self.max_tokens if self.static else self.longest + tokens))

    def advance(self, lengths: Sequence[int]) -> None:
        """Count `lengths[i]` new tokens in row i."""
        self.lengths = [length + new for length, new in zip(self.lengths, lengths, strict=True)]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget all but the first `lengths[i]` tokens of row i, such as a rejected draft.

        Raises Refusal where a layer's state has no place for each token and cannot go back (state space mixers,
        linear attention).
        """
        if list(lengths) != self.lengths and not all(state.rewindable for state in self.states):
            raise Refusal(
                "model",
                NO_VALUE,
                (
                    f"a cache of {self.lengths} tokens cannot be rewound to {list(lengths)}: a recurrent layer"
                    " keeps one state and none of its past"
                ),
                "read the shorter rows into a new cache, or give `lengths` when reading padded rows",
            )
        self.lengths = list(lengths)

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` was; rows may be dropped or repeated."""
        rows_B = torch.tensor(rows, device=self.device)
        for state in self.states:
            state.reorder(rows_B)
        if self.memory_documents_BS is not None:
            self.memory_documents_BS = self.memory_documents_BS[rows_B]
        self.lengths = [self.lengths[row] for row in rows]
