"""A list of pairs that scrolls any number of rows: it draws the lines that are seen and asks for no others.

It is told which rows to show and asks a function for each row as text; it knows nothing about stores or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.events import Click
from textual.geometry import Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.services.pair_rows import RowLine
from localdpo_tui.shown import fit

__all__ = ["PairList", "short_count"]

HEADER = 1
_TROUBLE = ("muted", "warning", "bad")
_SIGNS = ("·", "!", "✗")


@lru_cache(maxsize=4096)
def short_count(count: int) -> str:
    """Return a count in at most four characters: 950, 1.2k, 34k, 1.2M."""
    if count < 1000:
        return str(count)
    for unit in ("k", "M", "G"):
        value = count / 1000
        if value < 999.5:
            return f"{value:.1f}{unit}" if value < 9.95 else f"{value:.0f}{unit}"
        count //= 1000
    return "lots"


@dataclass(frozen=True, slots=True)
class Columns:
    """Widths in cells of the columns that fit; 0 for one that does not."""

    number: int
    prompt: int
    length: int
    tags: int
    problem: int

    @classmethod
    def of(cls, width: int, rows: int) -> Columns:
        """Share `width` cells among the columns for a file of `rows` rows."""
        number = max(2, len(str(rows)))
        length = 5 if width >= 52 else 0
        problem = 24 if width >= 100 else 14 if width >= 66 else 2
        tags = 18 if width >= 110 else 10 if width >= 74 else 0
        rest = width - 4 - number - 3 * length - (length > 0) - problem - 1 - (tags + 1 if tags else 0)
        return cls(number, max(4, rest), length, tags, problem)


class PairList(ScrollView, can_focus=True):
    """The rows of a file in an order, one a line, under a line of column names."""

    HELP = """The pairs of the open file. The sign before the number is the state of the row: ~ not saved yet, ! cannot
    be read. Lengths are characters of the prompt, the chosen and the rejected answer.

    Space marks rows; what then is done to pairs is done to all marked ones."""

    COMPONENT_CLASSES = {  # noqa: RUF012
        "pairlist--header",
        "pairlist--row",
        "pairlist--cursor",
        "pairlist--cursor-blurred",
        "pairlist--muted",
        "pairlist--state",
        "pairlist--warning",
        "pairlist--bad",
    }
    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "pairs.list",
        Action("pairs.list.edit", "enter,e", "Edit", "Edit the pair under the cursor."),
        Action("pairs.list.mark", "space", "Mark", "Mark the row, and go to the next one.", footer=False),
        Action("pairs.list.mark_all", "a", "Mark all", "Mark every row of the list, or none.", footer=False),
        Action("pairs.list.up", "up,k", "Up", "The row above.", footer=False),
        Action("pairs.list.down", "down,j", "Down", "The row below.", footer=False),
        Action("pairs.list.page_up", "pageup", "Page up", "A page up.", footer=False),
        Action("pairs.list.page_down", "pagedown", "Page down", "A page down.", footer=False),
        Action("pairs.list.first", "home,g", "First", "The first row.", footer=False),
        Action("pairs.list.last", "end,G", "Last", "The last row.", footer=False),
    )
    BINDINGS = bindings(ACTIONS)

    cursor: reactive[int] = reactive(0, repaint=False)

    class Moved(Message):
        """The cursor is on another row, or its row shows something else."""

    class Opened(Message):
        """The row under the cursor is to be edited."""

    def __init__(self, line_of: Callable[[int], RowLine], id: str | None = None) -> None:
        super().__init__(id=id)
        self._line_of = line_of
        self._keys: Sequence[int] = ()
        self._numbers: Sequence[int] | None = None
        self._columns = Columns.of(80, 0)
        self._total = 0
        self.marked: set[int] = set()

    # -- what is shown

    @property
    def keys(self) -> Sequence[int]:
        """The rows shown, in order."""
        return self._keys

    @property
    def current(self) -> int | None:
        """The key of the row under the cursor; None in an empty list."""
        return self._keys[self.cursor] if 0 <= self.cursor < len(self._keys) else None

    @property
    def chosen(self) -> list[int]:
        """The marked rows in the order shown; without marks the one under the cursor."""
        if self.marked:
            return [key for key in self._keys if key in self.marked]
        return [] if self.current is None else [self.current]

    def show(
        self, keys: Sequence[int], total: int, at: int | None = None, numbers: Sequence[int] | None = None
    ) -> None:
        """Show the rows `keys` of a file of `total` rows, the cursor on `at`, else where it was if it is there.

        `numbers` are the rows' places in the file from 0; without them the list shows the whole file.
        """
        before, old = self.current, self.cursor
        wanted = before if at is None else at
        self._keys, self._numbers, self._total = keys, numbers, total
        if self.marked:
            self.marked.intersection_update(keys)
        self._lay_out()
        place = _index(keys, wanted, old)
        self.set_reactive(PairList.cursor, place)
        self._scroll_to_cursor()
        self.refresh()
        if self.current != before:
            self.post_message(self.Moved())

    def go_to(self, key: int) -> bool:
        """Put the cursor on a row; return whether it is shown."""
        place = _index(self._keys, key, -1)
        if place >= 0:
            self.cursor = place
        return place >= 0

    def refresh_row(self, key: int) -> None:
        """Draw a row again whose text has changed."""
        if key in self._keys[self._first : self._first + self.size.height]:
            self.refresh()

    @property
    def _first(self) -> int:
        return round(self.scroll_offset.y)

    def _lay_out(self) -> None:
        self._columns = Columns.of(self.size.width, self._total)
        self.virtual_size = Size(self.size.width, len(self._keys) + HEADER)

    def on_resize(self) -> None:
        """Share the width anew."""
        self._lay_out()
        self._scroll_to_cursor()

    # -- drawing

    def render_line(self, y: int) -> Strip:
        """Draw one line: the header, or a row."""
        width = self.size.width
        if y == 0:
            return self._header().adjust_cell_length(width, self._style("header"))
        index = self._first + y - HEADER
        if index >= len(self._keys):
            return Strip.blank(width, self._style("row"))
        return self._row(index).adjust_cell_length(width, self._style("row"))

    def _style(self, name: str) -> Style:
        return self.get_component_rich_style(f"pairlist--{name}")

    def _header(self) -> Strip:
        columns = self._columns
        cells = ["   " + "#".rjust(columns.number) + " ", fit("Prompt", columns.prompt)]
        if columns.length:
            cells += [" ", *(name.rjust(columns.length) for name in ("Pr", "Ch", "Re"))]
        if columns.tags:
            cells += [" ", fit("Tags", columns.tags)]
        cells += [" ", fit("Problem" if columns.problem > 7 else "!", columns.problem)]
        return Strip([Segment("".join(cells), self._style("header"))])

    def _row(self, index: int) -> Strip:
        key = self._keys[index]
        line, columns = self._line_of(key), self._columns
        number = 1 + (index if self._numbers is None else self._numbers[index])
        base = self._style("row")
        if index == self.cursor:
            base = self._style("cursor" if self.has_focus else "cursor-blurred")
        here = index == self.cursor
        muted = base if here else self._style("muted")
        trouble = base if here else self._style(_TROUBLE[line.trouble])
        segments = [
            Segment("›" if here else " ", base),
            Segment("•" if key in self.marked else " ", base),
            Segment(line.state, base if here else self._style("state")),
            Segment(str(number).rjust(columns.number) + " ", muted),
            Segment(fit(line.prompt, columns.prompt), base),
        ]
        if columns.length:
            counts = "".join(short_count(count).rjust(columns.length) for count in line.lengths)
            segments.append(Segment(" " + counts, muted))
        if columns.tags:
            segments.append(Segment(" " + fit(line.tags, columns.tags), muted))
        segments.append(Segment(" " + fit(_trouble(line), columns.problem), trouble))
        return Strip(segments)

    # -- moving

    def validate_cursor(self, value: int) -> int:
        """Keep the cursor on a row."""
        return max(0, min(value, len(self._keys) - 1))

    def watch_cursor(self, old: int, new: int) -> None:
        """Bring the cursor's row into view and say so."""
        if old != new:
            self._scroll_to_cursor()
            self.refresh()
            self.post_message(self.Moved())

    def _scroll_to_cursor(self) -> None:
        page = max(1, self.size.height - HEADER)
        if self.cursor < self._first:
            self.scroll_to(y=self.cursor, animate=False, force=True, immediate=True)
        elif self.cursor >= self._first + page:
            self.scroll_to(y=self.cursor - page + 1, animate=False, force=True, immediate=True)

    @property
    def _page(self) -> int:
        return max(1, self.size.height - HEADER - 1)

    def action_up(self) -> None:
        """Go up."""
        self.cursor -= 1

    def action_down(self) -> None:
        """Go down."""
        self.cursor += 1

    def action_page_up(self) -> None:
        """Go up a page."""
        self.cursor -= self._page

    def action_page_down(self) -> None:
        """Go down a page."""
        self.cursor += self._page

    def action_first(self) -> None:
        """Go to the first row."""
        self.cursor = 0

    def action_last(self) -> None:
        """Go to the last row."""
        self.cursor = len(self._keys) - 1

    def action_edit(self) -> None:
        """Edit this row."""
        if self.current is not None:
            self.post_message(self.Opened())

    def action_mark(self) -> None:
        """Mark this row, or take the mark away."""
        if self.current is not None:
            self.marked ^= {self.current}
            self.refresh()
            self.cursor += 1

    def action_mark_all(self) -> None:
        """Mark all rows shown, or none."""
        self.marked = set() if self.marked else set(self._keys)
        self.refresh()

    def on_focus(self) -> None:
        """Show the cursor as the one that moves."""
        self.refresh()

    def on_blur(self) -> None:
        """Show the cursor as resting."""
        self.refresh()

    def on_click(self, event: Click) -> None:
        """Go to the row that was clicked; a double click edits it."""
        y = event.get_content_offset(self)
        if y is None or y.y < HEADER:
            return
        index = self._first + y.y - HEADER
        if index < len(self._keys):
            self.cursor = index
            if event.chain == 2:
                self.action_edit()


def _trouble(line: RowLine) -> str:
    return f"{_SIGNS[line.trouble]} {line.problem}" if line.problem else ""


def _index(keys: Sequence[int], wanted: int | None, otherwise: int) -> int:
    if wanted is not None:
        with suppress(ValueError):
            return keys.index(wanted)
    return min(otherwise, len(keys) - 1) if otherwise > 0 else min(otherwise, 0)
