"""The arithmetic of line charts: bounded series, smoothing, scales, ticks and braille.

A series keeps at most `CAPACITY` buckets; when they are full their width doubles and neighbours merge, so a run
of any length takes the same memory and the same time to draw, and its peaks stay visible (each bucket holds its
lowest and its highest value). Pure functions and numbers; nothing here knows Textual.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = [
    "CAPACITY",
    "PATTERNS",
    "Bucket",
    "Canvas",
    "Column",
    "Range",
    "Scale",
    "Series",
    "columns",
    "draw",
    "number_text",
    "padded",
    "smoothed",
    "ticks",
]

CAPACITY = 512

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""The bits of a braille cell's left and right dots from the top, added to U+2800."""
_SIDES = [[[sum(side[first : last + 1]) for last in range(4)] for first in range(4)] for side in _DOTS]
"""The bits of a bar in one column of a cell, by side, first and last dot."""

PATTERNS = ((1,), (1, 1, 1, 1, 0, 0), (1, 0), (1, 1, 1, 0, 1, 0))
"""Which columns of dots a line has, so that lines differ without colour: solid, dashed, dotted, dash-dot."""


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


class Scale:
    """From values to dots: `range` becomes 0 to `size` - 1, by logarithms if `log`. Log ranges are above 0."""

    __slots__ = ("_factor", "_low", "log", "range", "size")

    def __init__(self, range: Range, size: int, log: bool = False) -> None:
        self.range, self.size, self.log = range, size, log
        self._low = self._inner(range.low)
        self._factor = (size - 1) / (self._inner(range.high) - self._low)

    def dot(self, value: float) -> int:
        """The dot of a value, which may lie outside."""
        return round(((self._inner(value) if self.log else value) - self._low) * self._factor)

    def value(self, dot: int) -> float:
        """The value in the middle of a dot."""
        inner = self._low + (dot / self._factor if self._factor else 0.0)
        return 10**inner if self.log else inner

    def _inner(self, value: float) -> float:
        return math.log10(max(value, 5e-324)) if self.log else value


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


class Canvas:
    """Braille dots, `columns` x `rows` cells of 2 x 4 dots, y upwards; each cell remembers who drew there last."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.width, self.height = 2 * columns, 4 * rows
        self._bits = [bytearray(columns) for _ in range(rows)]
        self._owner = [[-1] * columns for _ in range(rows)]

    def bar(self, x: int, low: int, high: int, owner: int = 0) -> None:
        """Dots from `low` to `high` in column `x`; what lies outside is cut off."""
        if not 0 <= x < self.width:
            return
        column, dots = x // 2, _SIDES[x % 2]
        top, bottom = self.height - 1 - min(self.height - 1, high), self.height - 1 - max(0, low)
        for row in range(top // 4, bottom // 4 + 1):
            first, last = max(top - 4 * row, 0), min(bottom - 4 * row, 3)
            self._bits[row][column] |= dots[first][last]
            self._owner[row][column] = owner

    def cell(self, column: int, row: int) -> tuple[str, int]:
        """The character of a cell (a blank when nothing is there) and its owner, -1 for nobody."""
        bits = self._bits[row][column]
        return (chr(0x2800 + bits) if bits else " "), self._owner[row][column]

    def text(self, row: int) -> str:
        """A row of cells as text."""
        return "".join(self.cell(column, row)[0] for column in range(self.columns))


Column = tuple[float, float, float]
"""What a line covers in one column of dots, as values of y: lowest, highest, and its height at the right."""


def columns(buckets: Sequence[Bucket], heights: Sequence[float], scale: Scale, spread: bool) -> dict[int, Column]:
    """Gather buckets by their column of dots; `scale` is that of x, which is never logarithmic.

    `heights` are the values of the line at each bucket; with `spread` a column covers the lowest to the
    highest point as well. Columns between two points are filled in by the straight line between them.
    """
    found: dict[int, Column] = {}
    factor, offset = (scale.size - 1) / scale.range.span, scale.range.low
    before_x, before = 0, math.nan
    for bucket, height in zip(buckets, heights, strict=True):
        x = round(((bucket.first + bucket.last) / 2 - offset) * factor)
        low, high = (min(bucket.low, height), max(bucket.high, height)) if spread else (height, height)
        if x - before_x > 1 and before == before:  # nan: this is the first
            slope = (height - before) / (x - before_x)
            for between in range(max(before_x + 1, 0), min(x, scale.size)):
                value = before + slope * (between - before_x)
                found[between] = value, value, value
        old = found.get(x)
        found[x] = (low, high, height) if old is None else (min(low, old[0]), max(high, old[1]), height)
        before_x, before = x, height
    return found


def draw(canvas: Canvas, found: dict[int, Column], scale: Scale, pattern: Sequence[int], owner: int) -> None:
    """Put a line on a canvas: bars that meet, so that steep parts stay connected; `pattern` leaves columns out."""
    before: int | None = None
    for x in sorted(found):
        lowest, highest, last = found[x]
        if scale.log and highest <= 0:
            before = None
            continue
        low, high = scale.dot(lowest), scale.dot(highest)
        if before is not None:
            low, high = min(low, before + 1), max(high, before - 1)
        if pattern[x % len(pattern)]:
            canvas.bar(x, low, high, owner)
        before = scale.dot(last)
