"""Intervals around scores: the bootstrap over whole documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and the 95 % percentile bootstrap interval around it."""

    value: float
    low: float
    high: float


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


def interval(value: float, resampled_R: np.ndarray) -> Interval:
    """`value` between the 2.5 % and 97.5 % quantiles of its resampled twins."""
    low, high = np.quantile(resampled_R, [0.025, 0.975])
    return Interval(float(value), float(low), float(high))


def mean_interval(values_N: Sequence[float], *, resamples: int, seed: int) -> Interval:
    """The mean of independent values and its interval."""
    column_N1 = np.asarray(values_N, np.float64)[:, None]
    sums_R = resample_sums(column_N1, resamples=resamples, seed=seed)[:, 0]
    return interval(float(column_N1.mean()), sums_R / len(column_N1))
