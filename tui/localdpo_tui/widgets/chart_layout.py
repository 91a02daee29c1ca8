"""A line chart as rows of text with roles: axes, reference lines, lines, cursor and legend.

It turns a `ChartModel` and a size into characters. What colour a role has, when a chart is drawn again and
which keys move it is the widget's business (`chart.py`); nothing here knows Textual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len, set_cell_size

from localdpo_tui.widgets.chart_data import (
    PATTERNS,
    Bucket,
    Canvas,
    Range,
    Scale,
    Series,
    columns,
    draw,
    number_text,
    padded,
    smoothed,
    ticks,
)

__all__ = ["ChartModel", "Line", "Part", "layout"]

SMOOTHINGS = (0.0, 0.6, 0.9, 0.97)
LEGEND_MARKS = ("━━", "╍╍", "┅┅", "━╍")
NEAREST_ZOOM = 4.0
"""The shortest view, in steps."""

_AXIS = 8
_LEAST_AXIS_COLUMNS = 36
_LETTER_EVERY = 14

Part = tuple[str, str]
"""Text and its role: line-0 to line-3, axis, reference, cursor, title, muted or empty."""


@dataclass(slots=True)
class Line:
    """A named series. Points of a `sparse` one (evaluations) get a mark each, and no smoothing."""

    label: str
    series: Series = field(default_factory=Series)
    sparse: bool = False
    sign: str = "●"


@dataclass(slots=True)
class ChartModel:
    """What a chart shows and how. `references` are values of y that get a line; `view` None is everything.

    `empty` is what to say while there is no point. `share` is the range of y to show at least.
    """

    title: str
    lines: list[Line]
    references: Sequence[float] = ()
    empty: str = "no steps yet"
    share: Range | None = None
    log: bool = False
    smoothing: float = 0.0
    view: Range | None = None
    cursor: float | None = None

    def add(self, label: str, x: float, y: float) -> None:
        """Append a point to the line `label`."""
        for line in self.lines:
            if line.label == label:
                line.series.add(x, y)

    def clear(self) -> None:
        """Forget all points, and what was looked at."""
        for line in self.lines:
            line.series = Series(capacity=line.series.capacity)
        self.view = self.cursor = None

    def present(self) -> list[tuple[int, Line]]:
        """The lines that have points, with their numbers."""
        return [(index, line) for index, line in enumerate(self.lines) if line.series.buckets]

    def extent(self) -> Range | None:
        """The range of x of all lines, with a length of at least one."""
        bounds = [bounds for line in self.lines if (bounds := line.series.bounds()) is not None]
        if not bounds:
            return None
        low, high = min(b.low for b in bounds), max(b.high for b in bounds)
        return Range(low, max(high, low + 1))

    def shown(self) -> Range | None:
        """The range of x that is shown."""
        extent = self.extent()
        if extent is None or self.view is None:
            return extent
        low = min(max(self.view.low, extent.low), extent.high - 1)
        return Range(low, max(low + 1, min(self.view.high, extent.high)))

    def zoom(self, factor: float, around: float | None = None) -> None:
        """Show `factor` times as much, around the cursor or the middle; everything when that is all."""
        extent, shown = self.extent(), self.shown()
        if extent is None or shown is None:
            return
        middle = around if around is not None else self.cursor
        if middle is None or not shown.low <= middle <= shown.high:
            middle = (shown.low + shown.high) / 2
        least = min(NEAREST_ZOOM, extent.span) / shown.span
        view = shown.zoomed(max(factor, least), middle, extent)
        self.view = None if view.span >= extent.span * 0.999 else view

    def pan(self, share: float) -> None:
        """Move the view by a share of its length."""
        extent, shown = self.extent(), self.shown()
        if self.view is not None and extent is not None and shown is not None:
            self.view = shown.moved(share * shown.span, extent)

    def move_cursor(self, share: float) -> None:
        """Move the cursor by a share of what is shown, from the right edge when there is none; pan at the edges."""
        extent, shown = self.extent(), self.shown()
        if extent is None or shown is None:
            return
        distance = share * shown.span
        if abs(distance) < 1:
            distance = 1 if share > 0 else -1
        start = shown.high if self.cursor is None else self.cursor
        self.cursor = min(max(round(start + distance), extent.low), extent.high)
        if not shown.low <= self.cursor <= shown.high:
            self.view = shown.moved(distance, extent)

    def next_smoothing(self) -> None:
        """Go to the next amount of smoothing, and from the last to none."""
        later = [value for value in SMOOTHINGS if value > self.smoothing]
        self.smoothing = later[0] if later else SMOOTHINGS[0]

    def readout(self) -> str:
        """What the lines are at the cursor, or at their end, in words; the range where a bucket has several."""
        parts = []
        at: float | None = None
        present = [line for _, line in self.present()]
        names = [line.label.split()[0] for line in present]
        if len(set(names)) < len(names):
            names = [line.label for line in present]
        for name, line in zip(names, present, strict=True):
            buckets = line.series.buckets
            bucket = buckets[-1] if self.cursor is None else line.series.nearest(self.cursor)
            if bucket is None:
                continue
            at = bucket.last if at is None else at
            parts.append(f"{name} {_value_text(bucket)}" if len(present) > 1 else _value_text(bucket))
        if at is None:
            return ""
        return f"step {at:.0f}: " + "  ".join(parts)

    def state(self) -> str:
        """What differs from a plain look at everything: smoothing, log scale, zoom."""
        words = [f"smooth {self.smoothing:g}"] if self.smoothing else []
        words += ["log"] if self.log else []
        shown = self.shown()
        if self.view is not None and shown is not None:
            words.append(f"steps {shown.low:.0f} to {shown.high:.0f}")
        return ", ".join(words)


def _value_text(bucket: Bucket) -> str:
    text = number_text(bucket.mean)
    if bucket.count > 1 and bucket.low != bucket.high:
        text += f" ({number_text(bucket.low)} to {number_text(bucket.high)})"
    return text


def layout(model: ChartModel, width: int, height: int) -> list[list[Part]]:
    """The chart in `height` rows of exactly `width` cells each."""
    if width < 1 or height < 1:
        return []
    shown = model.shown()
    if shown is None:
        return _empty(model, width, height)
    legend = len(model.present()) > 1 and height >= 5
    axis = height >= 4
    gutter = _AXIS if width >= _LEAST_AXIS_COLUMNS or width >= 3 * _AXIS else 0
    plot_rows = height - legend - axis
    plot = _Plot(model, shown, width - gutter, plot_rows)
    marks = plot.left_labels(gutter)
    rows = [[(marks[row], "axis"), *plot.row(row)] if gutter else plot.row(row) for row in range(plot_rows)]
    if axis:
        rows.append(_bottom(shown, width, gutter))
    if legend:
        rows.append(_legend(model, width, gutter))
    return rows


def _empty(model: ChartModel, width: int, height: int) -> list[list[Part]]:
    rows: list[list[Part]] = [[(" " * width, "")] for _ in range(height)]
    text = model.empty[:width].center(width)
    rows[height // 2] = [(set_cell_size(text, width), "muted")]
    return rows


class _Plot:
    """The part inside the axes: lines on a canvas, with reference lines and the cursor where it is empty."""

    def __init__(self, model: ChartModel, shown: Range, width: int, rows: int) -> None:
        self.model = model
        self.canvas = Canvas(max(1, width), max(1, rows))
        self.across = Scale(shown, self.canvas.width)
        visible = [(line, line.series.between(shown)) for line in model.lines]
        self.curves = [
            (line, buckets, smoothed(buckets, 0.0 if line.sparse else model.smoothing)) for line, buckets in visible
        ]
        values = self._values(shown)
        log = model.log and any(value > 0 for value in values)
        heights = padded(values, log) or Range(0, 1)
        self.up = Scale(heights, self.canvas.height, log)
        self.letters: dict[tuple[int, int], tuple[str, str]] = {}
        for index, curve in enumerate(self.curves):
            self._draw(index, *curve)

    def _values(self, shown: Range) -> list[float]:
        """What must fit: all points in view, or the smoothed line alone where there is smoothing."""
        values: list[float] = [*self.model.references]
        for line, buckets, heights in self.curves:
            for bucket, height in zip(buckets, heights, strict=True):
                if bucket.last < shown.low or bucket.first > shown.high:
                    continue
                values += [height] if self.model.smoothing and not line.sparse else [bucket.low, bucket.high]
        if self.model.share is not None:
            values += [self.model.share.low, self.model.share.high]
        return values

    def _draw(self, index: int, line: Line, buckets: Sequence[Bucket], heights: Sequence[float]) -> None:
        pattern = PATTERNS[index % len(PATTERNS)]
        found = columns(buckets, heights, self.across, spread=not self.model.smoothing)
        draw(self.canvas, found, self.up, pattern, index)
        role = f"line-{index}"
        if line.sparse:
            for bucket, height in zip(buckets, heights, strict=True):
                self._mark(self.across.dot(bucket.middle), height, line.sign, role)
        elif len([line for _, line in self.model.present() if not line.sparse]) > 1:
            first = 2 * (3 + index * _LETTER_EVERY // 3)
            for x in range(first, self.canvas.width, 2 * _LETTER_EVERY):
                column = found.get(x)
                if column is not None:
                    self._mark(x, column[2], line.label[:1].upper(), role)

    def _mark(self, x: int, value: float, sign: str, role: str) -> None:
        if self.up.log and value <= 0:
            return
        column, row = x // 2, self.canvas.rows - 1 - self.up.dot(value) // 4
        if 0 <= column < self.canvas.columns and 0 <= row < self.canvas.rows:
            self.letters.setdefault((column, row), (sign, role))

    def _row_of(self, value: float) -> int:
        return self.canvas.rows - 1 - self.up.dot(value) // 4

    def left_labels(self, gutter: int) -> list[str]:
        """Numbers at the left: the reference lines first, then round numbers where there is room."""
        wanted = [*self.model.references, *ticks(self.up.range, max(2, self.canvas.rows // 2), self.up.log)]
        labels: dict[int, str] = {}
        for value in wanted:
            row = self._row_of(value)
            near = any(abs(row - other) < 2 for other in labels)
            if 0 <= row < self.canvas.rows and not near and self.up.range.low <= value <= self.up.range.high:
                labels[row] = number_text(value)
        blank = " " * (gutter - 1) + "│"
        return [
            set_cell_size(labels[row].rjust(gutter - 2), gutter - 2) + " ┤" if row in labels else blank
            for row in range(self.canvas.rows)
        ]

    def row(self, row: int) -> list[Part]:
        """One row of cells, equal roles joined."""
        references = {self._row_of(value) for value in self.model.references if not self.up.log or value > 0}
        cursor = self._cursor_column()
        parts: list[list[str]] = []
        for column in range(self.canvas.columns):
            text, role = self._cell(column, row, row in references, column == cursor)
            if parts and parts[-1][1] == role:
                parts[-1][0] += text
            else:
                parts.append([text, role])
        return [(text, role) for text, role in parts]

    def _cursor_column(self) -> int:
        cursor = self.model.cursor
        inside = cursor is not None and self.across.range.low <= cursor <= self.across.range.high
        return self.across.dot(cursor) // 2 if inside and cursor is not None else -1

    def _cell(self, column: int, row: int, reference: bool, cursor: bool) -> Part:
        if (column, row) in self.letters:
            return self.letters[column, row]
        text, owner = self.canvas.cell(column, row)
        if cursor:
            return (text, f"line-{owner}-cursor") if owner >= 0 else ("│", "cursor")
        if owner >= 0:
            return text, f"line-{owner}"
        return ("┄", "reference") if reference else (" ", "")


def _bottom(shown: Range, width: int, gutter: int) -> list[Part]:
    """Round steps below the plot, each centred under its place."""
    room = width - gutter
    line = [" "] * room
    scale = Scale(shown, max(2, room))
    end = 0
    for value in ticks(shown, max(2, room // 6)):
        if value != round(value):
            continue
        text = number_text(value, 4) if abs(value) >= 1e6 else f"{value:.0f}"
        start = min(max(0, scale.dot(value) - len(text) // 2), room - len(text))
        if start >= end and start >= 0:
            line[start : start + len(text)] = text
            end = start + len(text) + 1
    left = " " * (gutter - 1) + "└" if gutter else ""
    return [(left + "".join(line), "axis")]


def _legend(model: ChartModel, width: int, gutter: int) -> list[Part]:
    parts: list[Part] = [(" " * gutter, "")]
    left = width - gutter
    lettered = len([line for _, line in model.present() if not line.sparse]) > 1
    for index, line in model.present():
        mark = line.sign if line.sparse else LEGEND_MARKS[index % len(LEGEND_MARKS)]
        named = line.label[1:2] == " "  # its letter is its name already
        letter = f" {line.label[:1].upper()}" if lettered and not line.sparse and not named else ""
        for text, role in ((f"{mark}{letter} ", f"line-{index}"), (f"{line.label}  ", "muted")):
            room = min(left, cell_len(text))
            parts.append((set_cell_size(text, room), role))
            left -= room
    parts.append((" " * left, ""))
    return parts
