"""The Pairs place: a list of the file's rows, and the editor of the one under the cursor.

It ties the store, the list and the editor together and knows nothing about how rows are kept (`localdpo.data.store`).
Opening, saving, merging, import and export are in `pair_files`.
"""

from __future__ import annotations

import asyncio
import threading
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.events import Resize, ScreenResume
from textual.timer import Timer
from textual.widgets import Input, Static

from localdpo.errors import LocalDPOError
from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.places.pair_tools import PairTools
from localdpo_tui.services.pair_rows import RowLine, can_edit, row_line
from localdpo_tui.shown import inert, one_line
from localdpo_tui.widgets.pair_editor import PairEditor
from localdpo_tui.widgets.pair_list import PairList
from localdpo_tui.widgets.safe_input import SafeInput

if TYPE_CHECKING:
    from localdpo.data.rows import Row
    from localdpo.data.store import PairStore

__all__ = ["PairsPlace", "SearchInput"]

AUTOSAVE_SECONDS = 0.5
SEARCH_SECONDS = 0.12
LONG_ROW = 200_000
"""Bytes of a row that is read on a thread, and not loaded into the editor."""
_GONE = RowLine(" ", "", (0, 0, 0))
SETTLE_SECONDS = 0.06
"""How long the cursor rests before the editor follows: holding an arrow key must not load every pair passed."""


class SearchInput(SafeInput):
    """The line to search with."""

    HELP = """Words search prompts and answers. tag:NAME, state:unsaved and problem:NAME filter; a minus before any of
    them leaves out what matches. Esc shows everything again."""

    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "pairs.search",
        Action("pairs.search.clear", "escape", "All", "Show every pair again."),
        Action("pairs.search.list", "enter,down", "To the list", "Go to the list of what was found."),
    )
    BINDINGS = bindings(ACTIONS)

    def action_clear(self) -> None:
        """Empty the search and go back to the list."""
        self.value = ""
        self.action_list()

    def action_list(self) -> None:
        """Go to the list."""
        self.screen.query_one(PairList).focus()


class PairsPlace(PairTools):
    """Write, search and put right the pairs of one file."""

    NAME = "pairs"
    TITLE = "Pairs"
    CSS_PATH = "pairs.tcss"
    HELP = """Pairs teach the model what you prefer: a prompt, the answer you want and one you don't. Above is the list
    of the open file, below the pair under the cursor. What you write is kept at once as a draft, which survives a
    crash; Ctrl+S writes the drafts into the file.

    Undo (Ctrl+Z) in the list takes back the last thing done to any pair, in a text the last thing typed."""

    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "pairs",
        Action("pairs.search", "slash", "Search", "Search and filter the list."),
        Action("pairs.new", "ctrl+n,n", "New", "Write a new pair."),
        Action("pairs.save", "ctrl+s", "Save", "Write the drafts into the file."),
        Action("pairs.generate", "ctrl+g", "Generate", "Let the model answer the prompts of the marked pairs."),
        Action("pairs.rank", "ctrl+r", "Rank", "Choose between generated answers, unseen which is whose."),
        Action("pairs.undo", "ctrl+z,u", "Undo", "Take back the last thing done to the list."),
        Action("pairs.redo", "ctrl+y,ctrl+shift+z", "Redo", "Do again what was taken back.", footer=False),
        Action("pairs.delete", "delete,d", "Delete", "Delete the marked pairs; undo brings them back."),
        Action("pairs.duplicate", "c", "Copy", "Duplicate the pair.", footer=False),
        Action("pairs.swap", "x", "Swap", "Swap chosen and rejected of the marked pairs.", footer=False),
        Action(
            "pairs.difference", "v,f10", "Compare", "Show both answers as one text, differences marked.", footer=False
        ),
        Action("pairs.open", "o", "Open", "Open another file of this workspace, or make one.", footer=False),
        Action("pairs.import", "i", "Import", "Bring in pairs from JSONL, CSV or JSON of other tools.", footer=False),
        Action(
            "pairs.export", "ctrl+shift+s", "Export", "Write the pairs as JSONL or CSV for other tools.", footer=False
        ),
        Action("pairs.repair", "", "Repair", "Close a row that was cut off, so that it can be read again."),
        Action("pairs.raw", "", "Edit as JSON", "Edit the row's line itself in your own editor."),
        Action("pairs.discard", "", "Discard drafts", "Forget every unsaved change and read the file again."),
    )
    BINDINGS = bindings(ACTIONS)

    def __init__(self) -> None:
        super().__init__()
        self._shown: int | None = None
        self._pending: Timer | None = None
        self._settling: Timer | None = None
        self._searching: Timer | None = None
        self._editor: PairEditor | None = None
        self._edit_when_open = False
        self._lines: dict[int, RowLine] = {}
        self._lines_of = (0, 0)
        self._fresh: set[int] = set()  # rows made during this search: shown whether they match or not

    @property
    def editor(self) -> PairEditor:
        """The editor. It is mounted when it is first needed: the list is on the screen sooner without it."""
        if self._editor is None:
            self._editor = PairEditor(id="editor")
            self.query_one("#body").mount(self._editor)
        return self._editor

    def compose_body(self) -> ComposeResult:
        """List above, editor below; one of them where there is no room for both."""
        with Vertical(id="body"), Vertical(id="list-pane", classes="pane"):
            yield SearchInput(
                placeholder="/ searches: words  tag:name  state:unsaved  problem:same", id="search", compact=True
            )
            yield PairList(self._line_of, id="list")
            yield Static(id="nothing", markup=False)

    def on_mount(self) -> None:
        """Open the workspace's first file; the editor comes when the list is on the screen."""
        self.query_one(PairList).focus()
        self.begin()

    @property
    def rows(self) -> PairList:
        """The list."""
        return self.query_one(PairList)

    @property
    def editing(self) -> bool:
        """Whether the editor is on the screen, and so follows the cursor."""
        return not self.has_class("-one-pane") or self.has_class("-editing")

    @property
    def shown_key(self) -> int | None:
        """The key of the row in the editor."""
        return self._shown

    def forget_row(self) -> None:
        """Have the editor read its row again with the next `refresh_list`."""
        self._shown = None
        self.rows.marked.clear()

    def chosen_keys(self) -> list[int]:
        """Return the keys of the marked rows, or of the one under the cursor."""
        return self.rows.chosen

    @on(Resize)
    def _resized(self, event: Resize) -> None:
        one = event.size.width < 100 or event.size.height < 26
        if one != self.has_class("-one-pane"):
            self.set_class(one, "-one-pane")
            self._follow()

    @on(ScreenResume)
    def _resumed(self) -> None:
        self.look_for_changes()

    # -- the list

    def _line_of(self, key: int) -> RowLine:
        store = self.store
        if store is None:
            return self._lines.get(key, _GONE)
        if self._lines_of != (id(store), store.version):
            self._lines_of = id(store), store.version
            self._lines.clear()
        line = self._lines.get(key)
        if line is None:
            try:
                if len(store.raw(key)) > LONG_ROW:
                    self.spawn(self._read_long, store, key, group="long")
                    line = RowLine(" ", "… a very long row is being read", (0, 0, 0))
                else:
                    line = row_line(store, key)
            except KeyError:
                return _GONE
            self._lines[key] = line
        return line

    async def _read_long(self, store: PairStore, key: int) -> None:
        line = await asyncio.to_thread(row_line, store, key)
        if store is self.store:
            self._lines[key] = line
            self.rows.refresh_row(key)

    def show_preview(self, file: Path, first: dict[int, RowLine]) -> None:
        """Show the first rows of a file that is about to be opened."""
        if first:
            self._lines = first
            self.rows.show(list(first), len(first))
        self.query_one("#list-pane").border_title = Content(one_line(file.name))

    def refresh_rows(self) -> None:
        """Draw the rows again: what is known of them has changed, though they have not."""
        self._lines.clear()
        self.rows.refresh()

    def row(self, key: int) -> Row | None:
        """Return a row of the open file, None when it is gone."""
        try:
            return self.store.row(key) if self.store is not None else None
        except KeyError:
            return None

    def refresh_list(self, at: int | None = None) -> None:
        """Show what the store holds now: at once without a search, found again on a thread with one."""
        if self.store is None:
            return
        query = self.query_one(SearchInput).value.strip()
        if query:
            self._search(query, at)
        else:
            self._fresh.clear()
            self._show_keys(array("q", self.store.keys.tobytes()), None, at)
            self.reindex()

    def _show_keys(self, keys: Sequence[int], numbers: Sequence[int] | None, at: int | None) -> None:
        total = len(self.store) if self.store is not None else 0
        self.set_class(not keys, "-nothing")
        if not keys:
            self.query_one("#nothing", Static).update(_nothing_text(total))
        self.rows.show(keys, total, at, numbers)
        self.show_title(len(keys), total)
        if self._edit_when_open:
            self.action_edit()
        else:
            self._moved()

    @on(Input.Changed, "#search")
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        if self._searching is not None:
            self._searching.stop()
        self._searching = self.set_timer(SEARCH_SECONDS, self.refresh_list)

    def _search(self, query: str, at: int | None) -> None:
        self.spawn(self._find, query, at, exclusive=True, group="search")

    async def _find(self, query: str, at: int | None) -> None:
        store = self.store
        if store is None:
            return
        over = threading.Event()
        try:
            keys, numbers = await asyncio.to_thread(self.find, query, set(self._fresh), over.is_set)
        except LocalDPOError as error:
            self.query_one(SearchInput).tooltip = inert(str(error))
            self.query_one("#list-pane").border_subtitle = Content(one_line(str(error), 70))
            return
        except (KeyError, ValueError, OSError):
            if store is self.store:
                raise
            return  # the file was closed meanwhile
        finally:
            over.set()  # also when a newer search takes this one's place
        if store is self.store and query == self.query_one(SearchInput).value.strip():
            self._show_keys(keys, numbers, at)

    @on(PairList.Moved)
    def _moved(self) -> None:
        if self._settling is not None:
            self._settling.stop()
        self._settling = self.set_timer(SETTLE_SECONDS, self._follow)

    def _follow(self) -> None:
        """Have the editor show the row under the cursor."""
        if not self.editing or (self.store is None and self._editor is None):
            return
        self.commit()
        key = self.rows.current
        row = None if key is None else self.row(key)
        self._shown = None if row is None else row.key
        if row is None or self.store is None:
            self.editor.load(None)
            self.editor.show_findings(())
        else:
            self.editor.load(row.draft())
            self.editor.locked = not can_edit(row, self.store.raw(row.key))
        self.recount()

    @on(PairList.Opened)
    def action_edit(self) -> None:
        """Go into the editor, the prompt first where it is blank, else the chosen answer."""
        self._edit_when_open = self.store is None
        if self.rows.current is None or self.store is None:
            return
        self.add_class("-editing")
        self._follow()
        self.editor.focus_text()

    @on(PairEditor.Left)
    def _back(self) -> None:
        self.commit()
        self.remove_class("-editing")
        self.rows.focus()

    # -- what is written is kept

    @on(PairEditor.Changed)
    def _edited(self) -> None:
        if self._pending is not None:
            self._pending.stop()
        self._pending = self.set_timer(AUTOSAVE_SECONDS, self._autosave)
        self.recount()

    def _autosave(self) -> None:
        self.commit()
        self.sync_drafts()
        self.reindex()

    def commit(self) -> bool:
        """Put what stands in the editor into the store, which journals it. Returns False when it cannot be."""
        if self._pending is not None:
            self._pending.stop()
            self._pending = None
        key = self._shown
        if key is None or self.store is None or self.editor.locked:
            return True
        draft = self.editor.draft
        if draft is None:
            return True
        try:
            before = self.store.version
            self.store.update(key, draft)
        except KeyError:
            # Deleted elsewhere while it was being edited: what was typed becomes a pair again.
            self._shown = self.store.insert(draft)
        except LocalDPOError as error:
            self.app.notify_problem(error)
            return False
        self.editor.accept(draft)
        if self.store.version != before:
            if self._shown != key:
                self.refresh_list(self._shown)
            self.rows.refresh_row(key)
            self.show_title()
        return True

    def flush(self) -> None:
        """Keep what was typed."""
        self.commit()
        if self.store is not None:
            self.store.flush()

    # -- things to do

    def action_search(self) -> None:
        """Go to the search line."""
        self.remove_class("-editing")
        self.query_one(SearchInput).focus()

    def action_new(self) -> None:
        """Add an empty pair after the cursor and edit it."""
        from localdpo.data.rows import PairDraft

        if self.store is None or not self.commit():
            return
        self._made(self.store.insert(PairDraft.of(""), after=self.rows.current))
        self.call_after_refresh(self.action_edit)

    def action_duplicate(self) -> None:
        """Copy the pair under the cursor."""
        if self.store is not None and self.rows.current is not None and self.commit():
            self._made(self.store.duplicate(self.rows.current))

    def _made(self, key: int) -> None:
        self._fresh.add(key)
        self.refresh_list(key)
        self.show_title()

    def action_delete(self) -> None:
        """Delete the marked pairs."""
        keys = self.chosen_keys()
        if self.store is None or not keys or not self.commit():
            return
        self._shown = None
        self.store.delete(keys)
        self.refresh_list()
        self.app.tell(f"Deleted {_pairs(len(keys))}. Ctrl+Z brings {'it' if len(keys) == 1 else 'them'} back.")

    def action_swap(self) -> None:
        """Swap the answers of the marked pairs."""
        if self.store is None or not self.commit():
            return
        try:
            for key in self.chosen_keys():
                self.store.swap(key)
        except LocalDPOError as error:
            self.app.notify_problem(error)
        self._reshow()

    def action_undo(self) -> None:
        """Take back the last step."""
        self._step(back=True)

    def action_redo(self) -> None:
        """Do it again."""
        self._step(back=False)

    def _step(self, back: bool) -> None:
        if self.store is None or not self.commit():
            return
        step = self.store.undo() if back else self.store.redo()
        if step is None:
            self.app.tell("There is nothing to take back." if back else "There is nothing to do again.")
            return
        self._shown = None
        if step.key >= 0:
            self._fresh.add(step.key)
        self.refresh_list(step.key)
        self._follow()
        self.app.tell(f"{'Took back' if back else 'Did again'}: {step.text}.")

    def _reshow(self) -> None:
        self._shown = None
        self.rows.refresh()
        self._follow()
        self.show_title()

    def action_difference(self) -> None:
        """Show both answers as one text."""
        from localdpo_tui.screens.difference import DifferenceScreen

        draft = self.editor.draft if self._shown == self.rows.current else None
        row = self.row(self.rows.current) if self.rows.current is not None else None
        if row is not None:
            chosen, rejected = (draft.chosen, draft.rejected) if draft is not None else (row.chosen, row.rejected)
            self.app.push_screen(DifferenceScreen(chosen, rejected))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer what makes sense: nothing about pairs before a file is open, repairs only for broken rows."""
        if action in _NEEDS_FILE and self.store is None:
            return False
        if action == "repair":
            key = self.rows.current
            row = self.row(key) if key is not None else None
            return row is not None and row.problem is not None
        if action == "discard":
            return self.store is not None and self.store.dirty
        return True

    def open_link(self, **link: Any) -> None:
        """Open `file`, and show the row `key` or search for `query` in it."""
        self.open_linked(**link)


_NEEDS_FILE = {
    "search", "new", "save", "generate", "rank", "undo", "redo", "delete", "duplicate", "swap", "difference",
    "export", "raw",
}  # fmt: skip


def _pairs(count: int) -> str:
    return "1 pair" if count == 1 else f"{count:,} pairs"


def _nothing_text(total: int) -> str:
    if total:
        return f"None of the {_pairs(total)} matches. Esc in the search line shows all of them again."
    return (
        "This file has no pairs yet.\n\n"
        "n writes the first one: a prompt, the answer you want, one you don't. i imports pairs from another file. "
        "Once there are prompts, Ctrl+G lets the model answer them, and you only pick or correct."
    )
