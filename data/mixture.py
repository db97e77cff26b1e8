"""Which source each global row comes from: exact quotas, laid out evenly, found by arithmetic.

Weights become whole numbers of rows in a repeating period; the rows of a period are laid out as evenly as they go. The
source of row n, and how many rows of it came before, are then one table look-up away, for any n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from conf.refusal import Refusal

# Weights whose common denominator is larger are rounded to this many rows: shares are then off by at most 1e-5.
LONGEST_PERIOD_ROWS = 100_000


@dataclass(frozen=True, kw_only=True)
class MixturePhase:
    """From this many tokens of the run on, rows are drawn in proportion to these weights (any scale)."""

    from_tokens: int = 0
    """Tokens of the run after which the phase begins; 0 for the first."""
    weights: dict[str, float] = field(default_factory=dict)
    """Source → weight, on any scale; a source that is not named gets none."""


@dataclass(frozen=True, kw_only=True)
class MixtureSettings:
    """The sources' weights over the run. No phase: every source in proportion to its size."""

    phases: tuple[MixturePhase, ...] = ()
    """Weights from given tokens on; none: every source in proportion to its size."""

    def __post_init__(self) -> None:
        starts = [phase.from_tokens for phase in self.phases]
        if starts and (starts[0] != 0 or sorted(set(starts)) != starts):
            rule = f"they start at {starts} tokens, and the first must start at 0, each other later than the last"
            raise Refusal("phases", starts, rule, "give their from_tokens in rising order")
        for number, phase in enumerate(self.phases):
            where = f"phases[{number}].weights"
            for name, weight in phase.weights.items():
                if not (math.isfinite(weight) and weight >= 0):
                    raise Refusal(f"{where}.{name}", weight, "must be a number that is not negative")
            if not any(phase.weights.values()):
                rule = f"from {phase.from_tokens} tokens on no weight is above 0"
                raise Refusal(where, phase.weights, rule, "give one source a weight")


class Mixture:
    """Settings made concrete for named sources of known sizes and rows of `seq_len` tokens."""

    def __init__(self, settings: MixtureSettings, sources: Mapping[str, int], *, seq_len: int) -> None:
        """`sources` maps each name to its rows, in the order that numbers them."""
        names = list(sources)
        phases = settings.phases or (MixturePhase(weights={name: float(rows) for name, rows in sources.items()}),)
        for phase in phases:
            if unknown := sorted(set(phase.weights) - set(names)):
                rule = f"a weight is given to {', '.join(unknown)}, and the sources are {', '.join(names)}"
                raise Refusal("mixture.phases", phase.weights, rule, "use the sources' names")
        self._periods = [_Period([phase.weights.get(name, 0.0) for name in names]) for phase in phases]
        # A row belongs to the phase its first token falls in.
        self._starts = np.array([-(-phase.from_tokens // seq_len) for phase in phases], dtype=np.int64)
        self._before = np.zeros((len(phases), len(names)), dtype=np.int64)
        for i in range(1, len(phases)):
            length = int(self._starts[i] - self._starts[i - 1])
            self._before[i] = self._before[i - 1] + self._periods[i - 1].rows_before(length)

    def locate(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Number of the source of each global row, and how many rows of that source precede it."""
        source, nth = np.empty_like(rows), np.empty_like(rows)
        phase_of_row = np.searchsorted(self._starts, rows, side="right") - 1
        for phase in np.unique(phase_of_row):
            here = phase_of_row == phase
            source[here], nth[here] = self._periods[phase].locate(rows[here] - self._starts[phase])
            nth[here] += self._before[phase][source[here]]
        return source, nth

    def rows_before(self, row: int) -> list[int]:
        """How many rows of each source come before global row `row`."""
        phase = int(np.searchsorted(self._starts, row, side="right")) - 1
        counts = self._before[phase] + self._periods[phase].rows_before(row - int(self._starts[phase]))
        return [int(count) for count in counts]


class _Period:
    """The repeating layout of one phase.

    The j-th of a source's q rows in a period of P wants to lie at (j + 1/2) P / q; sorting these wishes lays them out.
    With S sources and share w, any prefix of n rows then holds n w rows of the source within 1/2 + w S / 2.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.quota_S = np.array(_quotas(weights), dtype=np.int64)
        self.rows = int(self.quota_S.sum())
        source_P = np.repeat(np.arange(len(self.quota_S)), self.quota_S)
        nth_P = np.arange(self.rows) - np.repeat(np.cumsum(self.quota_S) - self.quota_S, self.quota_S)
        order = np.argsort((nth_P + 0.5) / self.quota_S[source_P], kind="stable")
        self.source_P, self.nth_P = source_P[order], nth_P[order]

    def locate(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        period, i = np.divmod(rows, self.rows)
        source = self.source_P[i]
        return source, period * self.quota_S[source] + self.nth_P[i]

    def rows_before(self, row: int) -> npt.NDArray[np.int64]:
        period, i = divmod(row, self.rows)
        return period * self.quota_S + np.bincount(self.source_P[:i], minlength=len(self.quota_S))


def _quotas(weights: Sequence[float]) -> list[int]:
    """Whole rows per period: exact for weights written with few decimals, else the nearest (largest remainders first).

    A weight above zero never rounds to no row at all.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= LONGEST_PERIOD_ROWS:
        return [int(share * period) for share in shares]
    wanted = [share * LONGEST_PERIOD_ROWS for share in shares]
    quotas = [math.floor(want) for want in wanted]
    by_remainder = sorted(range(len(wanted)), key=lambda s: (quotas[s] - wanted[s], s))
    for source in by_remainder[: LONGEST_PERIOD_ROWS - sum(quotas)]:
        quotas[source] += 1
    return [max(quota, 1) if weight > 0 else 0 for quota, weight in zip(quotas, weights, strict=True)]
