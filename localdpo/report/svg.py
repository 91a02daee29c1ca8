"""Charts as SVG, inside a page or as files of their own.

A line is drawn smoothed over what was measured: a faint line where every point is drawn, a faint band from the lowest
to the highest where points share a place. Lines differ by dashes as well as colour. No script, no style attribute, no
reference to anything outside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from localdpo.report.charts import Chart, Line
from localdpo.report.markup import Markup, joined, tag
from localdpo.report.palette import LIGHT, chart_css
from localdpo.series import Bucket, Range, number_text, padded, smoothed, ticks

__all__ = ["chart_file", "chart_svg", "interval_svg"]

WIDTH, HEIGHT = 380, 216
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 26, 34
_TITLE = 26
_ROW = 16
_LABEL = 34
_HITS = 50


class _Frame:
    """Where values stand in the picture; `top` leaves room for the names of the lines."""

    def __init__(self, x: Range, y: Range, top: int) -> None:
        self.x, self.y, self.top = x, y, top

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x.low) / self.x.span
        up = (y - self.y.low) / self.y.span
        return (
            round(_LEFT + across * (WIDTH - _LEFT - _RIGHT), 1),
            round(HEIGHT - _BOTTOM - up * (HEIGHT - self.top - _BOTTOM), 1),
        )


def chart_svg(chart: Chart) -> Markup:
    """The chart as an SVG element for a page that has the style of `palette.chart_css`."""
    return tag(
        "svg",
        _drawing(chart),
        class_="chart",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=chart.summary(),
    )


def chart_file(chart: Chart) -> Markup:
    """The chart as an SVG file: with its title, the colours of paper, and a text alternative."""
    return tag(
        "svg",
        tag("title", chart.title),
        tag("desc", chart.summary()),
        tag("style", chart_css(lambda name: LIGHT[name])),
        tag("rect", width=WIDTH, height=HEIGHT + _TITLE, fill=LIGHT["card"]),
        tag("text", chart.title, x=12, y=20, font_size=14, font_weight=600, font_family="system-ui, sans-serif",
            fill=LIGHT["text"]),
        tag("g", _drawing(chart), class_="chart", transform=f"translate(0 {_TITLE})"),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {HEIGHT + _TITLE}",
        width=2 * WIDTH,
        height=2 * (HEIGHT + _TITLE),
        role="img",
    )  # fmt: skip


def _drawing(chart: Chart) -> Markup:
    keys, rows = _keys(chart)
    frame = _Frame(_across(chart), _upright(chart), _TOP + (rows - 1) * _ROW)
    return joined(
        [
            keys,
            _grid(frame),
            [_reference(frame, value) for value in chart.references if frame.y.low <= value <= frame.y.high],
            [_under(frame, line) for line in chart.lines],
            [_over(frame, line) for line in chart.lines],
            _hits(frame, chart),
        ]
    )


def _across(chart: Chart) -> Range:
    bounds = [bound for line in chart.lines if (bound := line.series.bounds())]
    low, high = min(bound.low for bound in bounds), max(bound.high for bound in bounds)
    return Range(low, high) if high > low else Range(low - 0.5, high + 0.5)


def _upright(chart: Chart) -> Range:
    values = [value for line in chart.lines for bucket in line.series.buckets for value in (bucket.low, bucket.high)]
    if chart.share is not None:
        values += [chart.share.low, chart.share.high]
    span = max(values) - min(values)
    # A reference is shown where it does not squeeze what was measured into a corner.
    values += [r for r in chart.references if min(values) - span / 2 <= r <= max(values) + span / 2]
    found = padded(values)
    assert found is not None  # a chart has lines, and lines have points
    return found


def _keys(chart: Chart) -> tuple[list[Markup], int]:
    """The names of the lines beside a piece of each, and how many rows they take."""
    drawn: list[Markup] = []
    x, row = _LEFT, 0
    for line in chart.lines:
        label = line.label if len(line.label) <= _LABEL else line.label[: _LABEL - 1] + "…"
        width = 23 + round(len(label) * 6.1)
        if x > _LEFT and x + width > WIDTH:
            x, row = _LEFT, row + 1
        y = 11 + row * _ROW
        drawn.append(tag("line", x1=x, y1=y, x2=x + 18, y2=y, class_=f"line s{line.colour} d{line.dash}"))
        if line.sparse:
            drawn.append(tag("circle", cx=x + 9, cy=y, r=2.6, class_=f"f{line.colour}"))
        drawn.append(tag("text", label, x=x + 23, y=y + 4, class_="key"))
        x += width + 12
    return drawn, row + 1


def _grid(frame: _Frame) -> Iterator[Markup]:
    for value in ticks(frame.y, 5):
        _, y = frame.at(frame.x.low, value)
        yield tag("line", x1=_LEFT, y1=y, x2=WIDTH - _RIGHT, y2=y, class_="grid")
        yield tag("text", number_text(value), x=_LEFT - 6, y=y + 3.5, class_="end")
    base = HEIGHT - _BOTTOM
    yield tag("line", x1=_LEFT, y1=base, x2=WIDTH - _RIGHT, y2=base, class_="axis")
    for value in ticks(frame.x, 5):
        if value != round(value):
            continue  # there is no half of a step
        x, _ = frame.at(value, frame.y.low)
        yield tag("text", f"{value:,.0f}" if value < 1e4 else number_text(value), x=x, y=base + 14, class_="middle")
    yield tag("text", "step", x=WIDTH - _RIGHT, y=HEIGHT - 4, class_="end")


def _reference(frame: _Frame, value: float) -> Markup:
    _, y = frame.at(frame.x.low, value)
    return tag("line", x1=_LEFT, y1=y, x2=WIDTH - _RIGHT, y2=y, class_="reference")


def _under(frame: _Frame, line: Line) -> Markup | None:
    """What was measured, where the line over it is smoother."""
    buckets = line.series.buckets
    if any(bucket.count > 1 for bucket in buckets):
        top = [frame.at(bucket.middle, bucket.high) for bucket in buckets]
        bottom = [frame.at(bucket.middle, bucket.low) for bucket in reversed(buckets)]
        return tag("path", d=_path([*top, *bottom]) + "Z", class_=f"band f{line.colour}")
    if line.smoothing <= 0 or len(buckets) < 3:
        return None
    return tag("path", d=_path([frame.at(b.middle, b.mean) for b in buckets]), class_=f"raw s{line.colour}")


def _over(frame: _Frame, line: Line) -> Iterator[Markup]:
    buckets = line.series.buckets
    heights = smoothed(buckets, line.smoothing)
    points = [frame.at(bucket.middle, height) for bucket, height in zip(buckets, heights, strict=True)]
    yield tag("path", d=_path(points), class_=f"line s{line.colour} d{line.dash}")
    if len(points) == 1 or (line.sparse and len(points) <= 40):
        yield from (tag("circle", cx=x, cy=y, r=2.6, class_=f"f{line.colour}") for x, y in points)


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _hits(frame: _Frame, chart: Chart) -> Iterator[Markup]:
    """Invisible columns whose tooltips say the values there: no script is needed for them."""
    count = min(_HITS, max(len(line.series.buckets) for line in chart.lines))
    width = frame.x.span / count
    for number in range(count):
        middle = frame.x.low + (number + 0.5) * width
        near = [(line.label, line.series.nearest(middle)) for line in chart.lines]
        said = [f"{label} {number_text(b.mean)} ({_steps(b)})" for label, b in near if b is not None]
        x, _ = frame.at(frame.x.low + number * width, frame.y.low)
        end, _ = frame.at(frame.x.low + (number + 1) * width, frame.y.low)
        yield tag(
            "rect",
            tag("title", "\n".join(said)),
            x=x,
            y=frame.top,
            width=round(end - x, 1),
            height=HEIGHT - frame.top - _BOTTOM,
            class_="hit",
        )


def _steps(bucket: Bucket) -> str:
    if bucket.first == bucket.last:
        return f"step {bucket.first:,.0f}"
    return f"steps {bucket.first:,.0f} to {bucket.last:,.0f}"


def interval_svg(value: float, low: float | None, high: float | None, threshold: float | None) -> Markup:
    """A figure on a line: a dot, its interval as a bar, and the threshold that it is held against as a stroke.

    It repeats what stands beside it in words, so it is hidden from screen readers.
    """
    marks = [mark for mark in (value, low, high, threshold) if mark is not None]
    share = all(0 <= mark <= 1 for mark in marks)
    bounds = Range(0.0, 1.0) if share else padded([0.0, *marks]) or Range(0.0, 1.0)

    def at(mark: float) -> float:
        return round(6 + 108 * (mark - bounds.low) / bounds.span, 1)

    parts = [tag("line", x1=6, y1=9, x2=114, y2=9, class_="axis")]
    if threshold is not None:
        parts.append(tag("line", x1=at(threshold), y1=1, x2=at(threshold), y2=17, class_="threshold"))
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        parts.append(tag("line", x1=at(low), y1=9, x2=at(high), y2=9, class_="interval"))
    parts.append(tag("circle", cx=at(value), cy=9, r=4, class_="dot"))
    return tag("svg", parts, class_="gauge", viewBox="0 0 120 18", aria_hidden="true")
