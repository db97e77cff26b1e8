"""What a row asks of the model: pure functions of (row, settings, global row).

An objective that draws at random draws from (its seed, the global row) alone, so that a row asks the same whichever
rank reads it, and after any restart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from data.rows.packing import PackedRows

IGNORED = -100  # the target value that no loss counts


@dataclass(frozen=True, kw_only=True)
class EncoderInputs:
    """What the encoder of an encoder-decoder reads beside some rows: tokens_RS int64; documents_RS int32, 0 padding."""

    tokens_RS: npt.NDArray[np.int64]
    documents_RS: npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Inputs and targets of some rows.

    tokens_RT     int64
    targets_RT    int64, IGNORED where nothing is to be predicted
    documents_RT  int32: 1, 2, … the row's documents, 0 padding
    positions_RT  int64, from 0 within each document's piece
    encoder       of objectives for encoder-decoders
    """

    tokens_RT: npt.NDArray[np.int64]
    targets_RT: npt.NDArray[np.int64]
    documents_RT: npt.NDArray[np.int32]
    positions_RT: npt.NDArray[np.int64]
    encoder: EncoderInputs | None = None


class Objective(Protocol):
    """The seam between rows and the loss. `kind` names it in settings and digests."""

    @property
    def kind(self) -> str:
        """Its name in settings."""

    def __call__(self, rows: PackedRows, global_rows: npt.NDArray[np.int64]) -> Examples: ...


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """Predict each token from those before it in its document.

    Ignored: padding, a document's first token (nothing of it comes before), and what the rows' loss mask leaves out.
    """

    kind: Literal["next_token"] = "next_token"

    def __call__(self, rows: PackedRows, global_rows: npt.NDArray[np.int64]) -> Examples:
        """Columns 0 … T-1 as inputs, 1 … T as targets. Nothing is random here, so `global_rows` is not looked at."""
        numbers_RW = rows.document_numbers()
        targets_RT = rows.tokens_RW[:, 1:].astype(np.int64)
        # Few are ignored: writing to their indices takes a tenth of the time a mask takes.
        targets_RT.reshape(-1)[np.flatnonzero(~rows.valid_targets(numbers_RW))] = IGNORED
        return Examples(
            tokens_RT=rows.tokens_RW[:, :-1].astype(np.int64),
            targets_RT=targets_RT,
            documents_RT=np.ascontiguousarray(numbers_RW[:, :-1]),
            positions_RT=rows.positions(),
        )
