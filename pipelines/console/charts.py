"""The report's pictures as SVG text: curves over tokens, and scores between their intervals.

Drawn by hand: one page needs no plotting library, colours follow the page's style sheet, and the same numbers give the
same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

POINTS = 500
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line: its points, and the style-sheet class that colours it."""

    xs: Sequence[float]
    ys: Sequence[float]
    style: str


def curves(
    lines: Sequence[Curve],
    *,
    label: str,
    width: int = 460,
    height: int = 100,
    y_text: Callable[[float], str] | None = None,
) -> str:
    """Lines over a common x axis in tokens. `label` names the picture for those who cannot see it."""
    xs = [x for line in lines for x in line.xs]
    ys = [y for line in lines for y in line.ys if math.isfinite(y)]
    if not xs or not ys:
        return '<p class="quiet">No points.</p>'
    x_low, x_high = 0.0, max(xs)
    y_low, y_high = padded(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / ((x_high - x_low) or 1) * (width - LEFT - RIGHT),
            TOP + (y_high - y) / (y_high - y_low) * (height - TOP - BOTTOM),
        )

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">']
    for y in ticks(y_low, y_high, 5):
        _, at = place(0, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{(y_text or plain)(y)}</text>'
        )
    for x in ticks(x_low, x_high, 6):
        at, _ = place(x, y_low)
        parts.append(f'<text class="tick" x="{at:.1f}" y="{height - 8}" text-anchor="middle">{count(x)}</text>')
    for line in lines:
        shown = [place(x, y) for x, y in zip(*thinned(line.xs, line.ys), strict=True) if math.isfinite(y)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shown)
        parts.append(f'<polyline class="{line.style}" points="{points}"/>')
    return "".join([*parts, "</svg>"])


def intervals(
    rows: Sequence[tuple[str, float, float | None, float | None, str]], *, label: str, unit: str = "", width: int = 640
) -> str:
    """One line per (name, value, low, high, style): a dot between its whiskers, the value written beside it; a dot alone
    where there is no interval."""
    left, right, step = 128, 64, 30
    ends = [x for _, *numbers, _ in rows for x in numbers if isinstance(x, float | int)]
    low, high = padded(min(ends), max(ends))
    height = TOP + step * len(rows) + BOTTOM

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">']
    for value in ticks(low, high, 6):
        at = place(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{height - 8}" text-anchor="middle">{plain(value)}</text>')
    for number, (name, value, lowest, highest, style) in enumerate(rows):
        y = TOP + step * (number + 0.5)
        parts.append(f'<text class="name" x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        if lowest is not None and highest is not None:
            ends_at = f'x1="{place(lowest):.1f}" x2="{place(highest):.1f}"'
            parts.append(f'<line class="whisker {style}" {ends_at} y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot {style}" cx="{place(value):.1f}" cy="{y}" r="5"/>')
        parts.append(f'<text class="value" x="{width - right + 10}" y="{y + 4:.1f}">{value:.3f}{unit}</text>')
    return "".join([*parts, "</svg>"])


def smoothed(ys: Sequence[float], window: int) -> list[float]:
    """An exponential mean over about `window` points, started without bias."""
    keep, mean, weight, out = 1 - 1 / max(1, window), 0.0, 0.0, []
    for y in ys:
        if math.isfinite(y):
            mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        out.append(mean / weight if weight else y)
    return out


def thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most POINTS points: means over equal stretches, the last point always among them."""
    stretch = -(-len(xs) // POINTS)
    if stretch <= 1:
        return list(xs), list(ys)
    starts = range(0, len(xs), stretch)
    return (
        [xs[min(start + stretch, len(xs)) - 1] for start in starts],
        [sum(ys[start : start + stretch]) / len(ys[start : start + stretch]) for start in starts],
    )


def padded(low: float, high: float) -> tuple[float, float]:
    """A little more than the range, and never an empty one."""
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) between low and high."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def plain(value: float) -> str:
    """A number without needless digits."""
    return f"{value:.4g}"


def count(value: float) -> str:
    """1234567 → '1.23 M'."""
    for unit in ("", " k", " M", " G", " T"):
        if abs(value) < 1000 or unit == " T":
            return f"{value:.3g}{unit}"
        value /= 1000
    raise AssertionError("unreachable")
