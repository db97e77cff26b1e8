"""Intervals around scores: the bootstrap over whole documents, Wilson's for shares, and none below FEWEST.

interval(1.2, resampled_R, count=35, of="documents")     # 1.2 between two quantiles
wilson(0, 60, of="examples")                             # 0 between 0 and 0.06
interval(1.2, resampled_R, count=1, of="documents")      # low and high are None, `missing` says why
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FEWEST = 5
"""Fewest documents or examples for an interval: a bootstrap of one has no width, of four hardly one."""
Z = 1.959963984540054
"""Standard deviations on either side of a normal mean that hold 95 %."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its 95 % interval; low and high are None where there is none, and then `missing` says why."""

    value: float
    low: float | None
    high: float | None
    missing: str = ""


def bounds(name: str, figure: Mapping[str, Any]) -> dict[str, float]:
    """`NAME_low` and `NAME_high` of a figure with an interval; else empty."""
    return {} if figure["low"] is None else {f"{name}_low": figure["low"], f"{name}_high": figure["high"]}


def resample_sums(columns_NK: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Column sums over `resamples` draws of N rows with replacement: [resamples, K].

    Rows are whole documents, because the tokens of one document are anything but independent (Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993). All columns of a draw see the same documents, so ratios and differences made
    of them are paired.
    """
    rng, count = np.random.default_rng(seed), len(columns_NK)
    sums_RK = np.empty((resamples, columns_NK.shape[1]))
    for resample in range(resamples):
        times_N = np.bincount(rng.integers(count, size=count), minlength=count)
        sums_RK[resample] = times_N @ columns_NK
    return sums_RK


def interval(value: float, resampled_R: np.ndarray, *, count: int, of: str) -> Interval:
    """`value` between the 2.5 % and 97.5 % quantiles of its bootstrap values over `count` documents.

    of: what was resampled, for the message. No interval where they are fewer than FEWEST, or all alike: a width of
    nothing would claim certainty.
    """
    value = float(value)
    if count < FEWEST:
        return Interval(value, None, None, too_few(count, of))
    if not (math.isfinite(value) and np.isfinite(resampled_R).all()):
        return Interval(value, None, None, f"not every draw of {of} gives a number")
    low, high = np.quantile(resampled_R, [0.025, 0.975])
    if low == high:
        return Interval(value, None, None, f"every draw of {of} gives the same")
    return Interval(value, float(low), float(high))


def too_few(count: int, of: str) -> str:
    """Why there is no interval."""
    return f"{count} {of if count != 1 else of.removesuffix('s')}, and an interval takes at least {FEWEST}"


def wilson(right: float, count: int, *, of: str) -> Interval:
    """The share `right / count` with Wilson's score interval, which has a width at 0 and 1 too (Wilson, JASA 22, 1927)."""
    right = float(right)
    share = right / count
    if count < FEWEST:
        return Interval(share, None, None, too_few(count, of))
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    # At 0 and 1 the formula gives its own end exactly, but for rounding.
    return Interval(share, 0.0 if right <= 0 else middle - half, 1.0 if right >= count else middle + half)


def share_interval(right: float, total: float, resampled_R: np.ndarray, *, count: int, of: str) -> Interval:
    """`right / total` whose parts come in `count` documents: the bootstrap over them, and where that has no width (none or
    all are right) Wilson's, as if each document were one trial."""
    found = interval(right / total, resampled_R, count=count, of=of)
    if found.low is None and count >= FEWEST:
        return wilson(right / total * count, count, of=of)
    return found


def resample_aggregate(
    aggregate: Callable[[list[Any]], float], groups: Sequence[Sequence[Any]], *, resamples: int, seed: int
) -> np.ndarray:
    """Values of `aggregate` over `resamples` draws of groups with replacement: [resamples].

    Items that come of one document are one group, for the reason above; independent items are groups of one.
    """
    rng = np.random.default_rng(seed)
    return np.array(
        [
            aggregate([item for place in rng.integers(len(groups), size=len(groups)) for item in groups[place]])
            for _ in range(resamples)
        ],
        np.float64,
    )
