"""How curves become braille: scales, columns of dots and the canvas they are drawn on.

Pure functions and numbers; nothing here knows Textual. The curves are `localdpo.series`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from localdpo.series import CAPACITY, Bucket, Range, Series, number_text, padded, smoothed, ticks

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

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""The bits of a braille cell's left and right dots from the top, added to U+2800."""
_SIDES = [[[sum(side[first : last + 1]) for last in range(4)] for first in range(4)] for side in _DOTS]
"""The bits of a bar in one column of a cell, by side, first and last dot."""

PATTERNS = ((1,), (1, 1, 1, 1, 0, 0), (1, 0), (1, 1, 1, 0, 1, 0))
"""Which columns of dots a line has, so that lines differ without colour: solid, dashed, dotted, dash-dot."""


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
