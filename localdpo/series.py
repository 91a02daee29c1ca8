"""Curves of any length in bounded memory, and the round numbers to draw them with.

A series keeps at most `CAPACITY` buckets; when they are full their width doubles and neighbours merge, so a run
of any length takes the same memory and the same time to draw, and its peaks stay visible (each bucket holds its
lowest and its highest value). Pure functions and numbers; nothing here knows a screen or a page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

__all__ = ["CAPACITY", "Bucket", "Range", "Series", "number_text", "padded", "smoothed", "ticks"]

CAPACITY = 512


@dataclass(slots=True)
class Bucket:
    """Neighbouring points: `count` of them from `first` to `last` in x; lowest, highest and sum of y."""

    first: float
    last: float
    low: float
    high: float
    total: float
    count: int

    @property
    def mean(self) -> float:
        """The mean of y."""
        return self.total / self.count

    @property
    def middle(self) -> float:
        """Where the bucket stands in x."""
        return (self.first + self.last) / 2

    def merge(self, other: Bucket) -> None:
        """Take in the bucket to the right."""
        self.last = other.last
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.total += other.total
        self.count += other.count


@dataclass(frozen=True, slots=True)
class Range:
    """A closed range of numbers, `low` < `high`."""

    low: float
    high: float

    @property
    def span(self) -> float:
        """Its length."""
        return self.high - self.low

    def moved(self, distance: float, within: Range) -> Range:
        """The range shifted, and stopped at the ends of `within`."""
        distance = min(max(distance, within.low - self.low), within.high - self.high)
        return Range(self.low + distance, self.high + distance)

    def zoomed(self, factor: float, around: float, within: Range) -> Range:
        """The range `factor` times as long with `around` where it was, no longer than `within`."""
        span = min(self.span * factor, within.span)
        share = (around - self.low) / self.span
        low = min(max(around - share * span, within.low), within.high - span)
        return Range(low, low + span)


@dataclass(slots=True)
class Series:
    """Points (x, y) with x rising, in buckets. Values that are not finite are left out and counted."""

    capacity: int = CAPACITY
    width: float = 1.0
    buckets: list[Bucket] = field(default_factory=list)
    count: int = 0
    not_finite: int = 0

    def add(self, x: float, y: float) -> None:
        """Append a point; x below the last one starts the series again from there (a run was resumed)."""
        if not (math.isfinite(x) and math.isfinite(y)):
            self.not_finite += 1
            return
        if self.buckets and x < self.buckets[-1].last:
            self.cut(x)
        self.count += 1
        point = Bucket(x, x, y, y, y, 1)
        if self.buckets and self._key(x) == self._key(self.buckets[-1].first):
            self.buckets[-1].merge(point)
            return
        self.buckets.append(point)
        while len(self.buckets) > self.capacity:
            self._double()

    def extend(self, points: Iterable[tuple[float, float]]) -> None:
        """Append points in order."""
        for x, y in points:
            self.add(x, y)

    def cut(self, x: float) -> None:
        """Forget everything from `x` on."""
        while self.buckets and self.buckets[-1].last >= x:
            self.count -= self.buckets.pop().count

    def thinned(self, most: int) -> Series:
        """A copy with at most `most` (at least 1) buckets, each wider where need be."""
        copy = Series(most, self.width, [replace(bucket) for bucket in self.buckets], self.count, self.not_finite)
        while len(copy.buckets) > most:
            copy._double()
        return copy

    def between(self, view: Range) -> Sequence[Bucket]:
        """The buckets that touch `view`, and one more at each side so that lines reach the edge."""
        start = self._index(view.low) - 1
        stop = self._index(math.nextafter(view.high, math.inf)) + 1
        return self.buckets[max(0, start) : stop]

    def nearest(self, x: float) -> Bucket | None:
        """The bucket at `x`, or the one next to it."""
        index = self._index(x)
        around = self.buckets[max(0, index - 1) : index + 1]
        return min(around, key=lambda bucket: max(bucket.first - x, x - bucket.last, 0.0), default=None)

    def bounds(self) -> Range | None:
        """The range of x, None when there is nothing."""
        return Range(self.buckets[0].first, self.buckets[-1].last) if self.buckets else None

    def _key(self, x: float) -> int:
        return math.floor(x / self.width)

    def _index(self, x: float) -> int:
        """The first bucket that ends at or after `x`."""
        low, high = 0, len(self.buckets)
        while low < high:
            middle = (low + high) // 2
            if self.buckets[middle].last < x:
                low = middle + 1
            else:
                high = middle
        return low

    def _double(self) -> None:
        self.width *= 2
        merged: list[Bucket] = []
        for bucket in self.buckets:
            if merged and self._key(merged[-1].first) == self._key(bucket.first):
                merged[-1].merge(bucket)
            else:
                merged.append(bucket)
        self.buckets = merged


def smoothed(buckets: Sequence[Bucket], factor: float) -> list[float]:
    """The exponential moving average of the points, at each bucket, corrected for its start.

    `factor` in [0, 1) is what a value keeps at the next point; 0 gives the means as they are. A bucket of n
    points counts as its mean n times, which is exact for buckets of one point.
    """
    if factor <= 0:
        return [bucket.mean for bucket in buckets]
    result = []
    value = weight = 0.0
    for bucket in buckets:
        kept = factor**bucket.count
        value = kept * value + (1 - kept) * bucket.mean
        weight = kept * weight + (1 - kept)
        result.append(value / weight)
    return result


def padded(values: Iterable[float], log: bool = False) -> Range | None:
    """A range a little wider than `values`, with a length even when they are all the same; None for none."""
    kept = [value for value in values if value > 0] if log else list(values)
    if not kept:
        return None
    low, high = min(kept), max(kept)
    if log:
        return Range(low / 1.1, high * 1.1)
    margin = (high - low) * 0.04 or abs(high) * 0.1 or 0.5
    return Range(low - margin, high + margin)


def ticks(within: Range, count: int, log: bool = False) -> list[float]:
    """At most `count` round numbers in a range, evenly apart (powers of ten on a log scale where there are two)."""
    if count < 1:
        return []
    if log:
        powers = [10.0**n for n in range(math.ceil(math.log10(within.low)), math.floor(math.log10(within.high)) + 1)]
        if len(powers) >= 2:
            return powers[:: math.ceil(len(powers) / count)]
    step = _round_step(within.span / count)
    first = math.ceil(within.low / step - 1e-9)
    last = math.floor(within.high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _round_step(least: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= least * (1 - 1e-9)), 10 * power)


def number_text(value: float, digits: int = 3) -> str:
    """A number in about `digits` figures and at most seven cells: 0.512, 1200, 1.5e-05, 34k, 1.2M."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    size = abs(value)
    if size < 1e-3:
        return f"{value:.{max(0, digits - 2)}e}".replace("e-0", "e-")
    if size >= 1e4:
        for unit, limit in (("k", 1e6), ("M", 1e9), ("G", 1e12)):
            if size < limit:
                return f"{value / limit * 1e3:.{digits}g}{unit}"
        return f"{value:.1e}"
    return f"{value:.{digits}g}" if size < 10**digits else f"{value:.0f}"
