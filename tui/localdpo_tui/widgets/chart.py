"""A line chart in braille, and a grid of them: zoom, pan, cursor, smoothing and a logarithmic scale by key.

A chart is drawn again at most `HERTZ` times a second, only when its points or its look have changed and only
while it is shown. The drawing itself is in `chart_layout.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.app import ComposeResult
from textual.containers import Container
from textual.content import Content
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.shown import one_line
from localdpo_tui.widgets.chart_layout import ChartModel, layout

__all__ = ["Chart", "ChartGrid"]

HERTZ = 3
_ZOOM = 0.5
_STEP, _PAN = 0.02, 0.25
_ROLES = ("line-0", "line-1", "line-2", "line-3", "axis", "reference", "cursor", "muted")


class Chart(Widget, can_focus=True):
    """Draws a `ChartModel`; call `touch` after points were added to it."""

    HELP = """A chart. ← → move a cursor and read the values there, + and - zoom, Shift+← → move the view, s smooths
    (the average keeps 0.6, 0.9 or 0.97 of itself at each step), l makes the scale logarithmic, Esc shows everything.

    Lines differ by pattern and letter, not by colour alone; ● are evaluations on held-out pairs; ┄ marks a value
    to compare with: a margin of 0, an accuracy of one half."""
    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "chart",
        Action("chart.left", "left", "Cursor", "Move the cursor left and read the values there."),
        Action("chart.right", "right", "Cursor right", "Move the cursor right.", footer=False),
        Action("chart.zoom_in", "plus,equals_sign", "Zoom", "Show fewer steps, around the cursor."),
        Action("chart.zoom_out", "minus", "Out", "Show more steps."),
        Action("chart.pan_left", "shift+left", "Earlier", "Move the view to earlier steps.", footer=False),
        Action("chart.pan_right", "shift+right", "Later", "Move the view to later steps.", footer=False),
        Action("chart.smooth", "s", "Smooth", "Smooth the lines more, and from the most to not at all."),
        Action("chart.log", "l", "Log", "Make the scale logarithmic, or plain again."),
        Action("chart.reset", "escape", "All", "Show all steps, without a cursor.", footer=False),
    )
    BINDINGS = bindings(ACTIONS)
    COMPONENT_CLASSES = {f"chart--{role}" for role in _ROLES}  # noqa: RUF012 - Textual declares the type
    ALLOW_SELECT = False
    DEFAULT_CSS = """
    Chart { height: 1fr; width: 1fr; min-height: 5; }
    Chart > .chart--line-0 { color: $accent; }
    Chart > .chart--line-1 { color: $primary; }
    Chart > .chart--line-2 { color: $success; text-style: bold; }
    Chart > .chart--line-3 { color: $error; }
    Chart > .chart--axis { color: $text-muted; }
    Chart > .chart--reference { color: $text-muted; }
    Chart > .chart--cursor { color: $foreground; text-style: bold; }
    Chart > .chart--muted { color: $text-muted; }
    """

    class Looked(Message):
        """The cursor or the view of a chart was changed by the user."""

        def __init__(self, chart: Chart) -> None:
            super().__init__()
            self.chart = chart

        @property
        def control(self) -> Chart:
            """The chart."""
            return self.chart

    def __init__(self, model: ChartModel, *, id: str | None = None, classes: str | None = "pane") -> None:
        super().__init__(id=id, classes=classes)
        self.model = model
        self.border_title = Content(one_line(model.title))
        self.place = ""
        self._dirty = True
        self._drawn: list[Strip] = []
        self._drawn_for: tuple[object, ...] = ()
        self._changes = 0

    def on_mount(self) -> None:
        """Draw now and then."""
        self.set_interval(1 / HERTZ, self._tick)

    def show(self, model: ChartModel) -> None:
        """Draw another model with the smoothing and the scale of the one before."""
        model.smoothing, model.log = self.model.smoothing, self.model.log
        self.model = model
        self.redraw()

    def touch(self) -> None:
        """Say that the model has changed; it is drawn at the next occasion."""
        self._dirty = True

    def _tick(self) -> None:
        if self._dirty and self.is_on_screen and self.size.area:
            self.redraw()

    def redraw(self) -> None:
        """Draw at once, as after a key."""
        self._dirty = False
        self._changes += 1
        state, readout = self.model.state(), self.model.readout()
        title = f"{self.model.title}: {state}" if state else self.model.title
        self.border_title = Content(one_line(f"{title} {self.place}"))
        self.border_subtitle = Content(one_line(readout))
        self.refresh()

    def render_line(self, y: int) -> Strip:
        """Return a row, from the drawing of this size and look."""
        wanted = (self.size, self._changes, self.app.theme, self.app.ansi_color)
        if wanted != self._drawn_for:
            self._drawn = self._draw()
            self._drawn_for = wanted
        return self._drawn[y] if y < len(self._drawn) else Strip.blank(self.size.width, self.rich_style)

    def _draw(self) -> list[Strip]:
        base = self.rich_style
        styles: dict[str, Style] = {"": base}
        for role in _ROLES:
            styles[role] = base + self.get_component_rich_style(f"chart--{role}", partial=True)
            styles[f"{role}-cursor"] = styles[role] + Style(reverse=True)
        width, height = self.size
        return [
            Strip([Segment(text, styles.get(role, base)) for text, role in row], width)
            for row in layout(self.model, width, height)
        ]

    def _looked(self) -> None:
        self.redraw()
        self.post_message(self.Looked(self))

    def action_left(self) -> None:
        """Move the cursor left."""
        self.model.move_cursor(-_STEP)
        self._looked()

    def action_right(self) -> None:
        """Move the cursor right."""
        self.model.move_cursor(_STEP)
        self._looked()

    def action_zoom_in(self) -> None:
        """Show half as much."""
        self.model.zoom(_ZOOM)
        self._looked()

    def action_zoom_out(self) -> None:
        """Show twice as much."""
        self.model.zoom(1 / _ZOOM)
        self._looked()

    def action_pan_left(self) -> None:
        """Go to earlier steps."""
        self.model.pan(-_PAN)
        self._looked()

    def action_pan_right(self) -> None:
        """Go to later steps."""
        self.model.pan(_PAN)
        self._looked()

    def action_smooth(self) -> None:
        """Smooth more."""
        self.model.next_smoothing()
        self.redraw()

    def action_log(self) -> None:
        """Switch the scale."""
        self.model.log = not self.model.log
        self.redraw()

    def action_reset(self) -> None:
        """Show everything."""
        self.model.view = self.model.cursor = None
        self._looked()

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Zoom in."""
        event.stop()
        self.action_zoom_in()

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Zoom out."""
        event.stop()
        self.action_zoom_out()

    def on_click(self, event: events.Click) -> None:
        """Put the cursor where the click was."""
        shown, offset = self.model.shown(), event.get_content_offset(self)
        if shown is None or offset is None:
            return
        gutter = 8
        share = (offset.x - gutter) / max(1, self.size.width - gutter - 1)
        self.model.cursor = round(shown.low + min(max(share, 0.0), 1.0) * shown.span)
        self._looked()


class ChartGrid(Container):
    """Charts side by side in two columns, or one at a time; they share cursor and view, since steps are the same."""

    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "charts",
        Action("charts.next", "n", "Next chart", "Go to the next chart."),
        Action("charts.previous", "p", "Previous chart", "Go to the chart before.", footer=False),
        Action("charts.single", "m", "One/all", "Show one chart alone, or all of them."),
    )
    BINDINGS = bindings(ACTIONS)
    DEFAULT_CSS = """
    ChartGrid { layout: grid; grid-size: 2; grid-gutter: 0; height: 1fr; }
    ChartGrid.-single { grid-size: 1; }
    """

    single: reactive[bool] = reactive(False)
    LEAST_COLUMNS, LEAST_ROWS = 64, 7

    def __init__(self, models: Sequence[ChartModel], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.charts = [Chart(model) for model in models]
        self.current = 0

    def compose(self) -> ComposeResult:
        """Put the charts in."""
        yield from self.charts

    def on_mount(self) -> None:
        """Mark the first chart."""
        self._mark()

    def on_resize(self) -> None:
        """Show one chart at a time where all of them would be too small."""
        self._choose_single()

    def _choose_single(self) -> None:
        rows = -(-len(self.charts) // 2) * self.LEAST_ROWS
        self.single = self.size.width < self.LEAST_COLUMNS or self.size.height < rows

    def watch_single(self, single: bool) -> None:
        """Show one or all."""
        self.set_class(single, "-single")
        self._mark()
        for number, chart in enumerate(self.charts, 1):
            chart.place = f"({number} of {len(self.charts)}, n next)" if single else ""
            chart.redraw()

    async def replace(self, models: Sequence[ChartModel]) -> None:
        """Show other models, looked at as those before: the same smoothing, scale and chart."""
        if len(models) == len(self.charts):
            for chart, model in zip(self.charts, models, strict=True):
                chart.show(model)
            return
        await self.remove_children()
        self.charts = [Chart(model) for model in models]
        self.current = min(self.current, max(0, len(models) - 1))
        await self.mount(*self.charts)
        self._mark()
        self._choose_single()
        self.watch_single(self.single)

    def touch(self) -> None:
        """Say that the models have changed."""
        for chart in self.charts:
            chart.touch()

    def redraw(self) -> None:
        """Draw all that is shown at once."""
        for chart in self.charts:
            chart.redraw()

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        """Remember the chart the user is at."""
        if isinstance(event.widget, Chart) and event.widget is self.screen.focused:
            self.current = self.charts.index(event.widget)
            self._mark()

    def on_chart_looked(self, event: Chart.Looked) -> None:
        """Have the other charts look at the same steps."""
        for chart in self.charts:
            if chart is not event.chart:
                chart.model.view, chart.model.cursor = event.chart.model.view, event.chart.model.cursor
                chart.touch()

    def _mark(self) -> None:
        # At once, not by a class: styles of a class come with the next refresh, and what is hidden till then
        # can't take the focus, which would then go somewhere else.
        for number, chart in enumerate(self.charts):
            chart.display = not self.single or number == self.current

    def _go(self, distance: int) -> None:
        if not self.charts:
            return
        self.current = (self.current + distance) % len(self.charts)
        chart = self.charts[self.current]
        chart.display = True
        self.screen.set_focus(chart)  # before the one that has it is hidden
        self._mark()

    def action_next(self) -> None:
        """Go on by one chart."""
        self._go(1)

    def action_previous(self) -> None:
        """Go back by one chart."""
        self._go(-1)

    def action_single(self) -> None:
        """Show one, or all."""
        self.single = not self.single
        if self.charts:
            self.charts[self.current].focus()
