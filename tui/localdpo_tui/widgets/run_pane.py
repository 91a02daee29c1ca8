"""A run on the screen: headline, charts, and what it said and answered. Shows a `RunView`; reads nothing itself."""

from __future__ import annotations

from collections.abc import Iterator

from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Static

from localdpo.train.events import SampleEvent
from localdpo_tui.services.run_view import Note, RunView, chart_models
from localdpo_tui.shown import one_line
from localdpo_tui.widgets.chart import HERTZ, ChartGrid

__all__ = ["RunPane"]

EMPTY = (
    "No run yet. Press r to train with this recipe, or c to check first whether it fits.\n\n"
    "Charts appear with the first step: loss, margin and accuracy against 0 and one half, the rewards of chosen and "
    "rejected answers, learning rate and tokens a second. Warnings and sample answers come below them."
)
_SIGNS = {"warning": "!", "note": "·", "best": "★", "eval": "●", "checkpoint": "·", "end": "■"}
_STYLES = {"warning": "$text-warning", "best": "$text-success", "end": "bold"}


class RunPane(Vertical):
    """Give it a view with `show`, and call `changed` when the view took something in."""

    DEFAULT_CSS = """
    RunPane > #headline { height: auto; max-height: 3; padding: 0 1; }
    RunPane > #notes { height: 30%; min-height: 4; padding: 0 1; }
    RunPane > #notes.warned { min-height: 8; }
    RunPane > #run-empty { padding: 1 2; height: 1fr; }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.view: RunView | None = None
        self._path_shown = ""
        self._dirty = False
        self._awaited = False  # the focus is to go to the charts once there are any

    def compose(self) -> ComposeResult:
        """Lay out headline, charts and notes from top to bottom."""
        yield Static(id="headline", markup=False)
        yield Static(EMPTY, id="run-empty", markup=False)
        yield ChartGrid(chart_models())
        with VerticalScroll(id="notes", classes="pane"):
            yield Static(id="said", markup=False)

    def on_mount(self) -> None:
        """Draw now and then, as the charts do."""
        self.query_one("#notes").border_title = Content("Notes and answers")
        self._show_charts(False)
        self.set_interval(1 / HERTZ, self._tick)

    def show(self, view: RunView, name: str) -> None:
        """Show another run."""
        self.view, self._path_shown = view, name
        for chart, model in zip(self.query_one(ChartGrid).charts, view.charts, strict=True):
            chart.show(model)
        self._draw()

    def changed(self) -> None:
        """Say that the view took something in."""
        self._dirty = True
        self.query_one(ChartGrid).touch()

    def focus_first(self) -> None:
        """Put the focus on the chart that was looked at, where there is one."""
        grid = self.query_one(ChartGrid)
        if grid.display:
            grid.charts[grid.current].focus()
        else:
            self._awaited = True
            self.screen.set_focus(None)

    def _show_charts(self, shown: bool) -> None:
        self.query_one(ChartGrid).display = shown
        self.query_one("#notes").display = shown
        self.query_one("#run-empty").display = not shown

    def _tick(self) -> None:
        if self._dirty and self.is_on_screen:
            self._draw()

    def _draw(self) -> None:
        view = self.view
        if view is None:
            return
        self._dirty = False
        known = view.status is not None or view.last is not None
        if self.query_one(ChartGrid).display != known:
            self._show_charts(known)
            if known and self._awaited and self.screen.focused is None:
                self.focus_first()
            self._awaited = False
        name = Content.styled(one_line(self._path_shown), "bold")
        head = Content.assemble(name, "  ", one_line(view.headline()))
        figures = view.figures()
        self.query_one("#headline", Static).update(
            Content.assemble(head, "\n", (one_line(figures), "$text-muted")) if figures else head
        )
        # Room for a whole sentence and its advice, on the smallest terminal too.
        self.query_one("#notes").set_class(any(note.kind == "warning" for note in view.notes), "warned")
        self.query_one("#said", Static).update(Content("\n").join(_said(view)))


def _said(view: RunView) -> Iterator[Content]:
    """The verdict when it is over, what went wrong, the other notes, the sample answers: the latest of each first."""
    if view.verdict is not None and not view.running:
        yield Content.styled(one_line(f"Verdict: {view.verdict.words}", 2000), "bold")
    for note in sorted(reversed(view.notes), key=lambda note: note.kind != "warning"):
        yield _note(note)
    if not view.notes:
        yield Content.styled("Nothing to say yet.", "$text-muted")
    for sample in reversed(view.samples):
        yield from _sample(sample)


def _note(note: Note) -> Content:
    text = one_line(f"{_SIGNS.get(note.kind, '·')} step {note.step}: {note.text}", 2000)
    return Content.styled(text, _STYLES.get(note.kind, ""))


def _sample(sample: SampleEvent) -> Iterator[Content]:
    question = sample.prompt[-1].get("content", "") if sample.prompt else ""
    mark = {True: "✓ ", False: "✗ ", None: ""}
    yield Content("")
    yield Content.assemble((f"step {sample.step}  ", "$text-muted"), (one_line(question), "bold"))
    yield Content.assemble(("  base   ", "$text-muted"), mark[sample.base_right] + one_line(sample.base))
    yield Content.assemble(("  tuned  ", "$text-muted"), mark[sample.tuned_right] + one_line(sample.tuned))
