"""What a model remembers of a batch between decoding steps."""

from collections.abc import Sequence

import torch

from model.errors import ModelError
from model.mixers.base import MixerState
from model.positions.position import Rotation

SLOT_QUANTUM = 64


def rounded_slots(slots: int) -> int:
    """Slots are looked at in multiples of 64: on CPUs oneDNN compiles a product anew for every shape it meets."""
    return -(-slots // SLOT_QUANTUM) * SLOT_QUANTUM


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

    def claim(self, tokens: int) -> torch.Tensor:
        """Slots_BT for `tokens` further tokens of every row. Raises ModelError when they do not fit."""
        if self.longest + tokens > self.max_tokens:
            raise ModelError(
                f"{self.longest} remembered and {tokens} new tokens do not fit a cache of {self.max_tokens}: make it "
                "larger with new_cache(max_tokens=...)."
            )
        if self.common_slot is not None:
            slots_T = torch.arange(self.common_slot, self.common_slot + tokens, device=self.device)
            return slots_T.expand(len(self.lengths), -1)
        lengths_B = torch.tensor(self.lengths, device=self.device)
        return lengths_B[:, None] + torch.arange(self.offset, self.offset + tokens, device=self.device)

    def slots_for(self, tokens: int) -> int:
        """How many slots `tokens` further tokens of every row look at, unused ones among them but for a single token of
        rows that are equally long."""
        if tokens == 1 and self.common_slot is not None:
            return self.common_slot + 1
        return rounded_slots(self.offset + (self.max_tokens if self.static else self.longest + tokens))

    def rotation(self, slots_BT: torch.Tensor) -> Rotation | None:
        """The angles of those slots."""
        if self.angles is None:
            return None
        if self.common_slot is not None:
            return self.angles.between(self.common_slot, self.common_slot + slots_BT.shape[1])
        return self.angles.at(slots_BT)

    def advance(self, lengths: Sequence[int]) -> None:
        """Count `lengths[i]` new tokens in row i."""
        self.lengths = [length + new for length, new in zip(self.lengths, lengths, strict=True)]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget all but the first `lengths[i]` tokens of row i, such as a rejected draft.

        Raises ModelError where a layer's state has no place for each token and cannot go back (state space mixers,
        linear attention).
        """
        if list(lengths) != self.lengths and not all(state.rewindable for state in self.states):
            raise ModelError(
                f"a cache of {self.lengths} tokens cannot be rewound to {list(lengths)}: a recurrent layer keeps one state "
                "and none of its past; read the shorter rows into a new cache, or give `lengths` when reading padded rows."
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
