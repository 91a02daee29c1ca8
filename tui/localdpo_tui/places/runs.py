"""The Runs place: every run of the folder in a table, one looked at closely or two side by side, keeping and the trash.

It reads run folders and never a model. Training itself is the Train place's; this one sends the user there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.events import ScreenResume
from textual.widgets import DataTable, Static

from localdpo.console.terminal import bytes_text
from localdpo.errors import LocalDPOError
from localdpo.train.run import RunFolder
from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.places.base import Place
from localdpo_tui.services import run_list
from localdpo_tui.services.kept import Kept, keep_run, read_kept, roll_back
from localdpo_tui.services.reporting import is_stale, make_report
from localdpo_tui.services.run_list import Curves, RunRow, share_text
from localdpo_tui.services.run_view import state_sign
from localdpo_tui.services.viewer import open_file
from localdpo_tui.shown import fit, one_line
from localdpo_tui.widgets.chart import ChartGrid
from localdpo_tui.widgets.run_details import about, differences

POLL_SECONDS = 2.0
_COLUMNS = (
    ("run", 16),
    ("state", 13),
    ("pairs", 5),
    ("steps", 7),
    ("held out", 8),
    ("retained", 8),
    ("size", 7),
    ("verdict", 15),
)
EMPTY = (
    "No runs yet.\n\n"
    "A run is what training leaves: the adapter, its recipe and pairs, its curves and sample answers. Press F3 and r "
    "to train; the run appears here. Two runs can then be compared with Space, and the better one kept with k."
)
_LETTERS = "AB"


class RunsPlace(Place):
    """Table above, charts and details below."""

    NAME = "runs"
    TITLE = "Runs"
    CSS_PATH = "runs.tcss"
    HELP = """Runs: everything trained in this folder. Space marks two runs, which are then drawn in one chart with the
    differences of their recipes; without marks the highlighted run is shown.

    ★ is the run that is kept as the current one. Deleting moves a run to the trash, and Ctrl+Z brings it back.
    "held out" is the accuracy on pairs it did not train on, "retained" how many of the base's right answers are
    right still. The verdict (learned, partly or not; kept, drifted or broken) has its reasons in the details."""
    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "runs",
        Action("runs.compare", "space", "Compare", "Mark this run; two marked ones are compared."),
        Action("runs.keep", "k", "Keep", "Keep this run as the current one."),
        Action("runs.roll_back", "b", "Roll back", "Go back to the run that was kept before."),
        Action("runs.chat", "t", "Talk", "Talk to this run's model."),
        Action("runs.blind", "ctrl+b", "Blind A/B", "Judge two marked runs, or this one and its base, names hidden."),
        Action("runs.watch", "w", "Watch", "Show this run in Train, with all its charts and answers."),
        Action("runs.resume", "g", "Go on", "Go on with this run from its checkpoint."),
        Action("runs.report", "o", "Report", "Make this run's report if need be, and open it."),
        Action("runs.delete", "delete,d", "Delete", "Move this run to the trash."),
        Action("runs.undo", "ctrl+z", "Undo", "Bring back the run deleted last.", footer=False),
        Action("runs.view", "v,f7", "View", "Charts or details, where there is no room for both.", footer=False),
        Action("runs.empty_trash", "", "Empty trash", "Delete what is in the trash for good."),
    )
    BINDINGS = bindings(ACTIONS)

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[RunRow] = []
        self.kept = Kept()
        self.marked: list[Path] = []
        self._deleted: list[Path] = []
        self._curves: dict[Path, tuple[int, Curves]] = {}
        self._wanted = ""

    @property
    def runs_folder(self) -> Path:
        """Where the runs are."""
        return self.workspace.runs_folder

    @property
    def trash(self) -> Path:
        """Where deleted runs go."""
        return self.workspace.trash / "runs"

    # -- laying out

    def compose_body(self) -> ComposeResult:
        """Yield the table above charts and details."""
        with Vertical(id="runs"):
            yield Static(EMPTY, id="empty", classes="empty", markup=False)
            yield DataTable(id="table", cursor_type="row", zebra_stripes=True, classes="pane")
            with Horizontal(id="below"):
                yield ChartGrid([], id="charts")
                with VerticalScroll(id="details", classes="pane"):
                    yield Static(id="said", markup=False)

    def on_mount(self) -> None:
        """Make the columns, and look at the folder now and then."""
        table = self.query_one(DataTable)
        table.border_title = Content("Runs")
        for name, width in _COLUMNS:
            table.add_column(name, width=width, key=name)
        self.query_one("#details").border_title = Content("Details")
        self.set_class(True, "-charts")
        self._look()
        self.set_interval(POLL_SECONDS, self._look_if_shown)

    @on(ScreenResume)
    def _shown_again(self) -> None:
        self._look()

    def _look_if_shown(self) -> None:
        if self.is_current:
            self._look()

    @work(group="look", exclusive=True)
    async def _look(self) -> None:
        rows, kept = await asyncio.to_thread(
            lambda: (run_list.read_rows(self.runs_folder), read_kept(self.runs_folder))
        )
        if self.query(DataTable) and ((rows, kept) != (self.rows, self.kept) or not self.rows):
            self.rows, self.kept = rows, kept
            self.marked = [path for path in self.marked if any(row.path == path for row in rows)]
            self._show_table()
            self._show_below()

    def open_link(self, **link: Any) -> None:
        """Put the cursor on a run: `run="runs/athene"`."""
        self._wanted = Path(str(link.get("run", ""))).name
        self._look()

    # -- the table

    def _show_table(self) -> None:
        table = self.query_one(DataTable)
        self.query_one("#empty").display = not self.rows
        table.display = self.query_one("#below").display = bool(self.rows)
        current = self.current
        wanted = self._wanted or (current.name if current is not None else "")
        names = [row.name for row in self.rows]
        table.clear()
        for row in self.rows:
            table.add_row(*self._cells(row), key=row.name)
        if wanted in names:
            table.move_cursor(row=names.index(wanted), animate=False)
            self._wanted = ""
        trash = f", {len(self._deleted)} in the trash (Ctrl+Z)" if self._deleted else ""
        table.border_subtitle = Content(f"{len(self.rows)} runs{trash}" if len(self.rows) != 1 else f"1 run{trash}")
        if self.rows and self.focused is None:
            table.focus()

    def _cells(self, row: RunRow) -> Iterator[Content]:
        sign = "★" if row.name == self.kept.current else " "
        letter = _LETTERS[self.marked.index(row.path)] if row.path in self.marked else " "
        accuracy = "" if row.accuracy is None else f"{row.accuracy:.0%}"
        pairs = "" if row.pairs is None else f"{row.pairs:,}"
        steps = f"{row.step}/{row.total_steps}" if row.step < row.total_steps else f"{row.step:,}"
        texts = (
            fit(f"{sign}{letter} {one_line(row.name)}", _COLUMNS[0][1]),
            f"{state_sign(row.state)} {one_line(row.state)}",
            pairs.rjust(_COLUMNS[2][1]),
            steps.rjust(_COLUMNS[3][1]),
            accuracy.rjust(_COLUMNS[4][1]),
            share_text(row.retained).rjust(_COLUMNS[5][1]),
            bytes_text(row.bytes).rjust(_COLUMNS[6][1]),
            row.verdict.short if row.verdict is not None else "",
        )
        return map(Content, texts)

    @property
    def current(self) -> RunRow | None:
        """The highlighted run."""
        table = self.query_one(DataTable)
        return self.rows[table.cursor_row] if 0 <= table.cursor_row < min(len(self.rows), table.row_count) else None

    @on(DataTable.RowHighlighted)
    def _highlighted(self) -> None:
        self._show_below()
        self.refresh_bindings()

    @on(DataTable.RowSelected)
    def _selected(self) -> None:
        self.action_watch()

    # -- below the table

    @work(group="below", exclusive=True)
    async def _show_below(self) -> None:
        """Draw the marked runs, or the highlighted one; reading curves may take a while."""
        marked = [row for path in self.marked for row in self.rows if row.path == path]
        current = self.current
        shown = marked if len(marked) == 2 else [current] if current is not None else []
        details = list(differences(*marked)) if len(marked) == 2 else list(about(shown, self.kept.current))
        pane = self.query_one("#details")
        pane.border_title = Content("A and B" if len(marked) == 2 else one_line(shown[0].name if shown else "Details"))
        self.query_one("#said", Static).update(Content("\n").join(details))
        found = [await asyncio.to_thread(self._read_curves, row.path) for row in shown]
        for charts in self.query("#charts").results(ChartGrid):  # none where the screen was taken down meanwhile
            await charts.replace(run_list.compared(found) if found else [])

    def _read_curves(self, path: Path) -> Curves:
        run = RunFolder(path)
        size = run.metrics_file.stat().st_size if run.metrics_file.is_file() else 0
        known = self._curves.get(path)
        if known is None or known[0] != size:
            known = self._curves[path] = size, run_list.curves(run)
        return known[1]

    def action_compare(self) -> None:
        """Mark or unmark the highlighted run; a third mark replaces the first."""
        row = self.current
        if row is None:
            return
        if row.path in self.marked:
            self.marked.remove(row.path)
        else:
            self.marked = [*self.marked[-1:], row.path]
        self._show_table()
        self._show_below()
        if len(self.marked) == 1:
            self.app.tell(f"{row.name} is marked as A. Mark another run to compare.")

    def action_view(self) -> None:
        """Charts or details."""
        charts = self.has_class("-charts")
        self.set_class(not charts, "-charts")

    # -- keeping

    @work(group="change")
    async def action_keep(self) -> None:
        """Keep the highlighted run."""
        row = self.current
        if row is None:
            return
        try:
            await asyncio.to_thread(keep_run, self.runs_folder, row.name)
        except LocalDPOError as error:
            self.app.notify_problem(error)
            return
        self.app.tell(f"{row.name} is the current run now. b goes back to the one before.")
        self._look()

    @work(group="change")
    async def action_roll_back(self) -> None:
        """Go back to the run kept before."""
        try:
            kept = await asyncio.to_thread(roll_back, self.runs_folder)
        except LocalDPOError as error:
            self.app.notify_problem(error, severity="warning")
            return
        self.app.tell(f"{kept.current} is the current run again.")
        self._look()

    # -- the trash

    @work(group="change")
    async def action_delete(self) -> None:
        """Move the highlighted run to the trash."""
        row = self.current
        if row is None:
            return
        try:
            self._deleted.append(await asyncio.to_thread(run_list.delete_run, RunFolder(row.path), self.trash))
        except (LocalDPOError, OSError) as error:
            self.app.notify_problem(error)
            return
        self.app.tell(f"{row.name} is in the trash. Ctrl+Z brings it back.")
        self._look()

    @work(group="change")
    async def action_undo(self) -> None:
        """Bring back the run deleted last."""
        if not self._deleted:
            self.app.notify_problem("No run was deleted since this place was opened.", "warning")
            return
        trashed = self._deleted.pop()
        try:
            restored = await asyncio.to_thread(run_list.restore_run, trashed, self.runs_folder)
        except LocalDPOError as error:
            self.app.notify_problem(error)
            return
        self._wanted = restored.name
        self.app.tell(f"{restored.name} is back.")
        self._look()

    @work(group="change")
    async def action_empty_trash(self) -> None:
        """Delete for good, after a question."""
        size = await asyncio.to_thread(run_list.folder_size, self.trash)
        if not size:
            self.app.tell("The trash is empty.")
            return
        answer = await self.app.ask(
            "Empty the trash?",
            f"{bytes_text(size)} of deleted runs go for good.",
            {"keep": "Keep", "empty": "Empty"},
            danger="empty",
        )
        if answer == "empty":
            try:
                await asyncio.to_thread(run_list.empty_trash, self.trash)
            except LocalDPOError as error:
                self.app.notify_problem(error)
            self._deleted.clear()
            self._look()

    # -- elsewhere

    def _link(self, row: RunRow) -> str:
        return self.workspace.relative(row.path)

    def action_chat(self) -> None:
        """Talk to the highlighted run."""
        row = self.current
        if row is not None:
            self.app.go("chat", run=self._link(row))

    @work(group="blind")
    async def action_blind(self) -> None:
        """Judge two marked runs against each other, else the highlighted one against its base."""
        from localdpo_tui.screens.blind import open_blind

        match self._judged():
            case [only]:
                await open_blind(self.app, only.path)
            case [first, second]:
                await open_blind(self.app, second.path, first.path)

    def _judged(self) -> list[RunRow]:
        if len(self.marked) == 2:
            return [row for path in self.marked for row in self.rows if row.path == path]
        return [self.current] if self.current is not None else []

    def action_watch(self) -> None:
        """Show the highlighted run in Train."""
        row = self.current
        if row is not None:
            self.app.go("train", run=self._link(row))

    def action_resume(self) -> None:
        """Go on with the highlighted run."""
        row = self.current
        if row is not None:
            self.app.go("train", run=self._link(row), resume=True)

    @work(group="report")
    async def action_report(self) -> None:
        """Make the report if there is none of the run as it is now, and open it in the browser."""
        row = self.current
        if row is None:
            return
        if is_stale(row.path):
            self.app.tell("Making the report…")
        try:
            report = await asyncio.to_thread(make_report, row.path)
            if await asyncio.to_thread(open_file, report):
                self.app.tell("The report is open in your browser.")
            else:
                self.app.tell(f"There is no screen for a browser here. The report is {report}")
        except LocalDPOError as error:
            self.app.notify_problem(error)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer what can be done with the highlighted run."""
        if not self.is_mounted:
            return True
        row = self.current
        match action:
            case "keep" | "chat":
                return row is not None and row.adapter
            case "blind":
                return bool(self._judged()) and all(one.adapter for one in self._judged())
            case "resume":
                return row is not None and row.resumable
            case "report":
                return row is not None
            case "roll_back":
                return bool(self.kept.before)
            case "delete":
                return row is not None and not row.running
            case "compare" | "watch" | "view":
                return row is not None
            case "undo":
                return bool(self._deleted)
        return True
