"""Charts by numbers: buckets, smoothing, scales, ticks, braille, and what ends up in which cell."""

from __future__ import annotations

import asyncio
import functools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from localdpo_tui.widgets.chart import Chart, ChartGrid
from localdpo_tui.widgets.chart_data import (
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
from localdpo_tui.widgets.chart_layout import ChartModel, Line, layout
from rich.cells import cell_len
from textual.app import App


def filled(points, capacity=512):
    series = Series(capacity=capacity)
    series.extend(points)
    return series


def test_points_are_kept_one_by_one_until_there_are_too_many():
    series = filled(((x, x * x) for x in range(8)), capacity=8)
    assert [(b.first, b.last, b.low, b.high, b.count) for b in series.buckets] == [
        (x, x, x * x, x * x, 1) for x in range(8)
    ]
    series.add(8, 64)
    assert series.width == 2
    assert [(b.first, b.last, b.low, b.high, b.total, b.count) for b in series.buckets] == [
        (0, 1, 0, 1, 1, 2),
        (2, 3, 4, 9, 13, 2),
        (4, 5, 16, 25, 41, 2),
        (6, 7, 36, 49, 85, 2),
        (8, 8, 64, 64, 64, 1),
    ]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(2, 32))
def test_memory_is_bounded_and_peaks_mean_and_count_survive(values, capacity):
    series = filled(enumerate(values), capacity)
    assert len(series.buckets) <= capacity
    assert series.count == sum(b.count for b in series.buckets) == len(values)
    assert min(b.low for b in series.buckets) == min(values)
    assert max(b.high for b in series.buckets) == max(values)
    assert math.fsum(b.total for b in series.buckets) == pytest.approx(math.fsum(values), abs=1e-3)
    edges = [(b.first, b.last) for b in series.buckets]
    assert edges == sorted(edges)
    assert series.bounds() == Range(0, len(values) - 1)


def test_a_resumed_run_goes_back_to_its_checkpoint():
    series = filled((x, float(x)) for x in range(1, 11))
    series.add(6, -1.0)
    assert [(b.last, b.mean) for b in series.buckets][-2:] == [(5, 5.0), (6, -1.0)]
    assert series.count == 6


def test_what_is_not_finite_is_left_out_and_counted():
    series = filled([(1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)])
    assert (series.count, series.not_finite) == (2, 2)


def test_between_takes_one_more_at_each_side():
    series = filled((x, 0.0) for x in range(10))
    assert [b.first for b in series.between(Range(3, 5))] == [2, 3, 4, 5, 6]
    assert [b.first for b in series.between(Range(-9, 0.5))] == [0, 1]
    assert series.nearest(4.4).first == 4
    assert series.nearest(99).first == 9
    assert Series().nearest(1) is None


def test_smoothing_is_a_corrected_moving_average():
    buckets = [Bucket(x, x, y, y, y, 1) for x, y in enumerate([1.0, 3.0, 5.0])]
    # 1; (0.5*3 + 0.25*1) / 0.75; (0.5*5 + 0.25*3 + 0.125*1) / 0.875
    assert smoothed(buckets, 0.5) == pytest.approx([1.0, 7 / 3, 27 / 7])
    assert smoothed(buckets, 0) == [1.0, 3.0, 5.0]


def test_a_bucket_counts_for_its_points_when_smoothed():
    single = [Bucket(x, x, 2.0, 2.0, 2.0, 1) for x in range(4)] + [Bucket(4, 4, 6.0, 6.0, 6.0, 1)]
    merged = [Bucket(0, 3, 2.0, 2.0, 8.0, 4), Bucket(4, 4, 6.0, 6.0, 6.0, 1)]
    assert smoothed(merged, 0.9)[-1] == pytest.approx(smoothed(single, 0.9)[-1])


@pytest.mark.parametrize("log", [False, True])
def test_scale_goes_from_edge_to_edge_and_back(log):
    scale = Scale(Range(1, 100), 21, log)
    assert (scale.dot(1), scale.dot(100)) == (0, 20)
    assert scale.dot(10) == (10 if log else 2)
    assert scale.value(scale.dot(10)) == pytest.approx(10 if log else 10.9)
    assert scale.dot(0 if log else -4) < 0


@pytest.mark.parametrize(
    ("low", "high", "count", "log", "expected"),
    [
        (0, 1, 5, False, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-0.3, 0.42, 4, False, [-0.2, 0.0, 0.2, 0.4]),
        (1, 64, 3, False, [50]),
        (1, 64, 4, False, [20, 40, 60]),
        (1e-5, 2e-4, 4, False, [5e-5, 1e-4, 1.5e-4, 2e-4]),
        (0.02, 50, 5, True, [0.1, 1, 10]),
        (2, 5, 3, True, [2, 3, 4, 5]),
        (0, 1, 0, False, []),
    ],
)
def test_ticks_are_round(low, high, count, log, expected):
    assert ticks(Range(low, high), count, log) == pytest.approx(expected)


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9), st.integers(1, 20))
def test_ticks_are_few_and_inside(low, span, count):
    span = max(span, abs(low) * 1e-6)
    found = ticks(Range(low, low + span), count)
    assert len(found) <= count + 1
    assert all(low - 1e-6 * span <= value <= low + span * (1 + 1e-6) for value in found)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.5123, "0.512"),
        (-2.0, "-2"),
        (1234.5, "1234"),
        (1.5e-5, "1.5e-5"),
        (0.0015, "0.0015"),
        (12_300, "12.3k"),
        (1_200_000, "1.2M"),
        (1e13, "1.0e+13"),
    ],
)
def test_numbers_are_short(value, text):
    assert number_text(value) == text
    assert len(text) <= 7


def test_padding_gives_a_flat_line_some_room():
    assert padded([2.0, 2.0]) == Range(1.8, 2.2)
    assert padded([0.0]) == Range(-0.5, 0.5)
    assert padded([-1.0, 0.0, 10.0], log=True).low == pytest.approx(10 / 1.1)
    assert padded([]) is None
    assert padded([-1.0], log=True) is None


def test_canvas_sets_the_dots_of_braille():
    canvas = Canvas(2, 1)
    canvas.bar(0, 0, 0)
    canvas.bar(1, 3, 3)
    canvas.bar(2, -9, 99, owner=1)
    canvas.bar(7, 0, 3)
    assert canvas.text(0) == chr(0x2800 + 0x40 + 0x08) + chr(0x2800 + 0x47)
    assert [canvas.cell(column, 0)[1] for column in (0, 1)] == [0, 1]
    assert Canvas(1, 1).cell(0, 0) == (" ", -1)


def test_a_steep_line_stays_connected():
    buckets = [Bucket(x, x, y, y, y, 1) for x, y in ((0, 0.0), (1, 11.0), (2, 0.0))]
    canvas = Canvas(2, 3)
    across, up = Scale(Range(0, 2), 3), Scale(Range(0, 11), 12)
    draw(canvas, columns(buckets, [0.0, 11.0, 0.0], across, spread=True), up, (1,), 0)
    assert [canvas.text(row) for row in range(3)] == ["⢸⡆", "⢸⡇", "⡸⡇"]


def test_columns_without_points_are_filled_by_a_straight_line():
    buckets = [Bucket(0, 0, 0.0, 0.0, 0.0, 1), Bucket(10, 10, 5.0, 5.0, 5.0, 1)]
    found = columns(buckets, [0.0, 5.0], Scale(Range(0, 10), 11), spread=True)
    assert [found[x][2] for x in range(11)] == pytest.approx([x / 2 for x in range(11)])


def test_a_column_covers_all_its_points():
    buckets = [Bucket(x, x, y, y, y, 1) for x, y in enumerate([1.0, 9.0, -3.0, 2.0])]
    found = columns(buckets, [b.mean for b in buckets], Scale(Range(0, 100), 2), spread=True)
    assert found == {0: (-3.0, 9.0, 2.0)}


def model_of(values, **options):
    model = ChartModel("loss", [Line("loss")], **options)
    for x, value in enumerate(values, 1):
        model.add("loss", x, value)
    return model


def texts(model, width, height):
    rows = layout(model, width, height)
    assert len(rows) == height
    joined = ["".join(text for text, _ in row) for row in rows]
    assert [cell_len(text) for text in joined] == [width] * height
    return joined


@pytest.mark.parametrize("size", [(80, 20), (36, 6), (30, 5), (20, 4), (10, 3), (3, 2), (1, 1)])
@pytest.mark.parametrize("lines", [1, 3])
def test_every_size_is_filled_exactly(size, lines):
    model = ChartModel("t", [Line(name) for name in ("chosen", "rejected", "held")[:lines]], references=(0.0,))
    texts(model, *size)
    for line in model.lines:
        line.series.extend((x, math.sin(x / 5)) for x in range(50))
    model.cursor = 10
    texts(model, *size)
    assert layout(model, 0, 5) == []


def test_a_reference_line_is_drawn_and_labelled():
    rows = texts(model_of([1.0, 2.0, 3.0], references=(0.5,)), 50, 10)
    marked = [row for row in rows if "┄" in row]
    assert len(marked) == 1
    assert marked[0].startswith("   0.5 ┤")
    roles = {role for row in layout(model_of([1.0, 2.0], references=(0.5,)), 50, 10) for _, role in row}
    assert "reference" in roles


def test_lines_differ_without_colour():
    model = ChartModel("rewards", [Line("chosen"), Line("rejected"), Line("held out", sparse=True)])
    for x in range(60):
        model.add("chosen", x, 1.0)
        model.add("rejected", x, -1.0)
    model.add("held out", 30, 0.0)
    rows = texts(model, 60, 12)
    assert "━━ C chosen" in rows[-1]
    assert "╍╍ R rejected" in rows[-1]
    chosen = next(row for row in rows if "C" in row and "chosen" not in row)
    rejected = next(row for row in rows if "R" in row and "rejected" not in row)
    blanks = [row[8:].count(" ") for row in (chosen, rejected)]
    assert blanks[0] == 0
    assert blanks[1] > 10  # dashes
    assert sum(row.count("●") for row in rows[:-1]) == 1


def test_a_logarithmic_scale_leaves_out_what_has_no_logarithm():
    model = model_of([100.0, 10.0, 1.0, -5.0, 0.1], log=True)
    rows = texts(model, 50, 12)
    labels = [row[:6].strip() for row in rows if "┤" in row]
    assert labels == ["100", "10", "1", "0.1"]
    assert model.state() == "log"
    negative = model_of([-1.0, -2.0], log=True)
    assert any("┤" in row for row in texts(negative, 50, 12))


def test_zoom_pan_and_reset_keep_within_the_run():
    model = model_of([float(x) for x in range(1, 101)])
    model.cursor = 80
    model.zoom(0.5)
    assert model.view.span == pytest.approx(49.5)
    assert model.view.low < 80 < model.view.high
    share = (80 - model.view.low) / model.view.span
    assert share == pytest.approx(79 / 99)
    model.pan(9)
    assert model.view.high == 100
    for _ in range(20):
        model.zoom(0.5)
    assert model.view.span == pytest.approx(4)
    for _ in range(20):
        model.zoom(2)
    assert model.view is None


def test_the_cursor_moves_by_whole_steps_and_reads_the_values():
    model = model_of([0.5, 0.25, 0.125])
    assert model.readout() == "step 3: 0.125"
    model.move_cursor(-0.02)
    assert model.cursor == 2
    assert model.readout() == "step 2: 0.25"
    model.move_cursor(-1)
    model.move_cursor(-1)
    assert model.cursor == 1


def test_the_cursor_takes_the_view_along():
    model = model_of([float(x) for x in range(100)])
    model.view = Range(40, 50)
    model.cursor = 50
    model.move_cursor(0.2)
    assert model.cursor == 52
    assert model.view == Range(42, 52)


def test_a_bucket_of_many_points_reads_as_a_range():
    model = ChartModel("loss", [Line("loss", Series(capacity=2))])
    for x, y in enumerate([1.0, 3.0, 2.0, 8.0]):
        model.add("loss", x, y)
    assert model.readout() == "step 3: 5 (2 to 8)"


def test_smoothing_goes_round():
    model = model_of([1.0])
    seen = []
    for _ in range(5):
        model.next_smoothing()
        seen.append(model.smoothing)
    assert seen == [0.6, 0.9, 0.97, 0.0, 0.6]


def test_an_empty_chart_says_so():
    assert any("no steps yet" in row for row in texts(ChartModel("x", [Line("x")]), 30, 6))


def test_a_hundred_thousand_points_take_as_many_buckets_as_a_thousand():
    series = filled((x, math.sin(x)) for x in range(100_000))
    assert len(series.buckets) <= 512
    assert series.width == 256


def piloted(test):
    """Run an async test to its end."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return run


class ChartApp(App[None]):
    def compose(self):
        yield ChartGrid([model_of([1.0, 2.0, 4.0] * 20), ChartModel("margin", [Line("margin")], references=(0.0,))])


@pytest.mark.parametrize("size", [(80, 24), (120, 36)])
@piloted
async def test_keys_look_closer_in_all_charts_and_show_one_alone(size):
    app = ChartApp()
    async with app.run_test(size=size) as pilot:
        grid = app.query_one(ChartGrid)
        first, second = grid.charts
        first.focus()
        await pilot.press("left", "left", "plus", "s", "l")
        assert first.model.cursor == second.model.cursor == 58
        assert first.model.view == second.model.view
        assert first.model.smoothing == 0.6
        assert str(first.border_title).startswith("loss: smooth 0.6, log, steps ")
        assert str(first.border_subtitle) == "step 58: 1"
        await pilot.press("escape")
        assert first.model.view is None
        assert second.size.area > 0
        await pilot.press("m")
        await pilot.pause()
        assert second.display is False
        await pilot.press("n")
        await pilot.pause()
        assert second.has_focus
        assert (first.display, second.display) == (False, True)


@piloted
async def test_a_chart_is_drawn_again_only_when_something_changed():
    app = ChartApp()
    async with app.run_test(size=(80, 24)) as pilot:
        chart = app.query(Chart).first()
        await pilot.pause()
        chart.redraw()
        before = chart._changes
        chart._tick()
        assert chart._changes == before
        chart.model.add("loss", 61, 9.0)
        chart.touch()
        chart._tick()
        assert chart._changes == before + 1
        assert str(chart.border_subtitle) == "step 61: 9"
