"""The file behind the Pairs place: opening, saving, what others do to it, import and export.

Everything that reads or writes the file runs on a thread; the store is one object for the life of an open file.
"""

from __future__ import annotations

import asyncio
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textual.content import Content

from localdpo.errors import EnvironmentFault, LocalDPOError
from localdpo_tui.places.base import Place
from localdpo_tui.shown import one_line

if TYPE_CHECKING:
    from localdpo.data.store import Choice, Conflict, PairStore, SaveResult
    from localdpo_tui.services.pair_rows import RowLine
    from localdpo_tui.services.workspace import Workspace

__all__ = ["PairFiles"]

WATCH_SECONDS = 2.0
LAST_FILE = "pairs_file"


class PairFiles(Place):
    """What the Pairs place does with files. The place itself gives `commit`, `refresh_list` and `forget_row`."""

    def __init__(self) -> None:
        super().__init__()
        self.store: PairStore | None = None
        self._missing = False
        self._open_one = asyncio.Lock()
        self._looking = False
        self._arrivals = _Arrivals()
        self._indexing = threading.Event()  # set: whoever indexes the file that was open shall stop

    def commit(self) -> bool:
        """Put what stands in the editor into the store."""
        raise NotImplementedError

    def refresh_list(self, at: int | None = None) -> None:
        """Show the rows as they are now."""
        raise NotImplementedError

    def refresh_rows(self) -> None:
        """Draw the rows again."""
        raise NotImplementedError

    def show_preview(self, file: Path, first: dict[int, RowLine]) -> None:
        """Show the first rows of a file that is about to be opened."""
        raise NotImplementedError

    def forget_row(self) -> None:
        """Have the editor read its row again."""
        raise NotImplementedError

    # -- opening

    def begin(self) -> None:
        """Open the workspace's first file, or show how to begin."""
        self.set_interval(WATCH_SECONDS, self.look_for_changes)
        self.spawn(self._begin, exclusive=True, group="file")

    async def _begin(self) -> None:
        file, first = await asyncio.to_thread(_first_look, self.workspace, self.app.size.height)
        if self.store is not None or self._open_one.locked():
            return
        if file is None:
            self._welcome()
            return
        self.show_preview(file, first)
        painted = asyncio.Event()
        self.call_after_refresh(painted.set)
        await painted.wait()
        if self.store is None and not self._open_one.locked():  # else a link was faster
            await self.open_file(file)

    def _welcome(self) -> None:
        from localdpo_tui.widgets.welcome import Welcome

        self.add_class("-welcome")
        if not self.query(Welcome):
            self.mount(Welcome(id="welcome"), after="#body")
            self.call_after_refresh(lambda: self.query_one("#begin-example").focus())

    def _leave_welcome(self) -> None:
        if self.has_class("-welcome"):
            self.remove_class("-welcome")
            self.query("#welcome").remove()
            self.query_one("#list").focus()

    async def open_file(self, path: Path, create: bool = False) -> bool:
        """Open a file in place of the one that is open. Tells what is wrong and returns False when it cannot."""
        async with self._open_one:  # what was asked for last stays open
            return await self._open(path, create)

    async def _open(self, path: Path, create: bool) -> bool:
        if not self.commit():
            return False
        try:
            store = await asyncio.to_thread(self._arrivals.open, path, create)
        except (LocalDPOError, OSError) as error:
            self.app.notify_problem(error)
            if self.store is None:
                self._welcome()
            return False
        if not self._arrivals.taken(store):
            return False
        self._indexing.set()
        old, self.store, self._missing = self.store, store, False
        self._leave_welcome()
        self.forget_row()
        self.refresh_list()
        self.show_title()
        self.refresh_bindings()
        if old is not None:
            await asyncio.to_thread(old.close)
        await asyncio.to_thread(_remember, self.workspace, store.path)
        self._tell_recovered(store)
        return True

    def _tell_recovered(self, store: PairStore) -> None:
        found = store.recovered
        if found is not None and found.rows:
            when = _ago(time.time() - found.time)
            self.app.notify_problem(
                f"Found {found.rows:,} unsaved {'change' if found.rows == 1 else 'changes'} of {when}, marked ~ in the "
                "list. Ctrl+S writes them into the file; Discard drafts in the palette forgets them.",
                "warning",
            )
        if found is not None and found.unreadable is not None:
            self.app.notify_problem(
                f"Some drafts could not be read; they were put aside in {found.unreadable}.", "warning"
            )
        if store.drafts_problem:
            self.app.notify_problem(
                f"Drafts cannot be kept beside this file, so save often: {store.drafts_problem}", "warning"
            )

    def reindex(self) -> None:
        """Look for what is wrong between rows, on a thread."""
        self._indexing.set()
        self._indexing = threading.Event()
        if self.store is not None:
            self.spawn(self._index, self.store, self._indexing, group="index", exclusive=True)

    async def _index(self, store: PairStore, over: threading.Event) -> None:
        """Find duplicates and the other problems between rows, then show them."""
        try:
            await asyncio.to_thread(store.build_index, over.is_set)
        except LocalDPOError as error:
            self.app.notify_problem(error, "warning")
        except (KeyError, ValueError, OSError):
            if not over.is_set():  # else the file was closed between two batches
                raise
        if store is self.store:
            self.refresh_rows()
            self.show_title()

    def show_title(self, shown: int | None = None, total: int | None = None) -> None:
        """Say in the list's frame which file it is, how many pairs are shown, and whether all is saved."""
        pane = self.query_one("#list-pane")
        store = self.store
        if store is None:
            pane.border_title = "Pairs"
            return
        if shown is None:
            shown = len(self.query_one("#list").keys)  # type: ignore[attr-defined]
        total = len(store)
        count = f"{total:,}" if shown >= total else f"{shown:,} of {total:,}"
        title = f"{one_line(store.path.name)} · {count} {'pair' if total == 1 else 'pairs'}"
        pane.border_title = Content(title)
        pane.border_subtitle = "not saved yet: Ctrl+S" if store.dirty else "saved"

    # -- finding rows

    def find(self, query: str, also: set[int], cancelled: Callable[[], bool]) -> tuple[Sequence[int], Sequence[int]]:
        """Return the keys of the rows that match `query` or are in `also`, and their places. For a thread.

        Raises `InputError` for a filter that there is not.
        """
        import numpy as np

        from localdpo_tui.services.pair_query import parse_query

        if self.store is None:
            return (), ()
        asked = parse_query(query)
        found = self.store.search(asked.text, asked.tag, asked.state, asked.problem, cancelled)
        everything = self.store.keys
        wanted = np.isin(everything, found)
        if also:
            wanted |= np.isin(everything, np.fromiter(also, np.int64))
        return array("q", everything[wanted].tobytes()), array("q", np.flatnonzero(wanted).tobytes())

    # -- saving, and what others do

    def action_save(self) -> None:
        """Write the drafts into the file."""
        if self.store is not None and self.commit():
            self.spawn(self.save, group="save")

    async def save(self) -> bool:
        """Save; asks where somebody else changed the same pairs. Returns whether the file has everything."""
        store = self.store
        if store is None:
            return True
        result = await self._settled(store, store.save)
        if result is None:
            return False
        if result.merged:
            self.forget_row()
            self.refresh_list()
        else:
            self.query_one("#list").refresh()
        self.show_title()
        self.refresh_bindings()
        extra = f" {result.merged:,} changes by others were taken in." if result.merged else ""
        self.app.tell(f"Saved {result.rows:,} pairs in {store.path.name}.{extra}")
        return True

    async def _settled(self, store: PairStore, work: Any) -> SaveResult | None:
        """Do `work` (save or reload) on a thread, and again with the user's decisions after a conflict."""
        choices: dict[Conflict, Choice] = {}
        while True:
            try:
                result: SaveResult = await asyncio.to_thread(work, choices)
            except (LocalDPOError, OSError) as error:
                self.app.notify_problem(error)
                return None
            if result.status != "conflict":
                return result
            decision = await self._decide(store, result.conflicts)
            if decision is None:
                return None
            choices.update(dict.fromkeys(result.conflicts, decision))

    async def _decide(self, store: PairStore, conflicts: Sequence[Conflict]) -> Choice | None:
        count = len(conflicts)
        shown = "\n\n".join(_conflict_text(conflict) for conflict in conflicts[:3])
        more = f"\n\nand {count - 3:,} more." if count > 3 else ""
        answer = await self.app.ask(
            f"{store.path.name} was changed elsewhere",
            f"{count:,} {'pair was' if count == 1 else 'pairs were'} changed there and here. Which do you keep?\n\n"
            f"{shown}{more}\n\nEsc decides nothing: your changes stay as drafts.",
            {"both": "Both", "ours": "Mine", "theirs": "Theirs"},
        )
        decisions: dict[str, Choice] = {"both": "both", "ours": "ours", "theirs": "theirs"}
        return decisions.get(answer or "")

    def look_for_changes(self) -> None:
        """See on a thread whether somebody else wrote the file."""
        if self.store is not None and self.app.screen is self and not self._looking:
            self.spawn(self._look, self.store, group="watch")

    async def _look(self, store: PairStore) -> None:
        # One at a time, and never cancelled: else nobody would hear the answer to what it may ask.
        self._looking = True
        try:
            await self._take_in(store)
        finally:
            self._looking = False

    async def _take_in(self, store: PairStore) -> None:
        if not await asyncio.to_thread(store.changed_on_disk) or store is not self.store:
            return
        if not await asyncio.to_thread(store.path.exists):
            if not self._missing:
                self._missing = True
                self.app.notify_problem(
                    f"{store.path.name} was moved or deleted elsewhere. Ctrl+S writes it again.", "warning"
                )
            return
        if not self.commit() or self.app.screen is not self:
            return
        result = await self._settled(store, store.reload)
        self._missing = False
        if result is not None and result.status == "reloaded" and store is self.store:
            self.forget_row()
            self.refresh_list()
            kept = " Your unsaved changes are kept." if store.dirty else ""
            self.app.tell(f"{store.path.name} was changed elsewhere: {result.merged:,} changes were taken in.{kept}")

    def sync_drafts(self) -> None:
        """Push the drafts to the disk on a thread."""
        if self.store is not None:
            self.spawn(self._sync, self.store, group="drafts", exclusive=True)

    async def _sync(self, store: PairStore) -> None:
        try:
            await asyncio.to_thread(store.flush)
        except EnvironmentFault as error:
            self.app.notify_problem(error)

    def action_discard(self) -> None:
        """Forget the drafts, after asking."""
        self.spawn(self._discard, group="save", exclusive=True)

    async def _discard(self) -> None:
        store = self.store
        if store is None or not self.commit():
            return
        answer = await self.app.ask(
            "Forget every unsaved change?",
            f"{store.path.name} is read again as it is on disk. This cannot be taken back.",
            {"keep": "Keep them", "discard": "Forget"},
            danger="discard",
        )
        if answer == "discard":
            await asyncio.to_thread(store.discard)
            self.forget_row()
            self.refresh_list()

    def unsaved(self) -> str:
        """Say what is not in the file yet."""
        if self.store is None or not self.store.dirty:
            return ""
        return f"{self.store.path.name} has changes that are not saved. They are kept as drafts either way."

    async def save_all(self) -> bool:
        """Save, because the user is leaving. Returns whether that went well."""
        return self.commit() and await self.save()

    def close(self) -> None:
        """Let go of the file; drafts stay."""
        self._indexing.set()
        self._arrivals.close()
        store, self.store = self.store, None
        if store is not None:
            store.close()


def _first_look(workspace: Workspace, count: int) -> tuple[Path | None, dict[int, RowLine]]:
    files = workspace.pair_files()
    if not files:
        return None, {}
    from localdpo_tui.services.pair_preview import preview

    last = workspace.folder / str(workspace.state().get(LAST_FILE, ""))
    file = last if last in files else _likely(files)
    return file, preview(file, count)


def _remember(workspace: Workspace, path: Path) -> None:
    with suppress(LocalDPOError, OSError):
        workspace.remember(**{LAST_FILE: workspace.relative(path)})


def _likely(files: Sequence[Path]) -> Path:
    """Return the file a person most likely means: not the prompts that recipes keep beside their pairs."""
    return min(
        files, key=lambda path: (any(word in path.stem for word in ("probe", "everyday", "retain", "prompt")), path)
    )


def _ago(seconds: float) -> str:
    minutes = max(0, round(seconds / 60))
    if minutes < 1:
        return "just now"
    if minutes < 120:
        return f"{minutes} {'minute' if minutes == 1 else 'minutes'} ago"
    hours = round(minutes / 60)
    return f"{hours} hours ago" if hours < 48 else f"{round(hours / 24)} days ago"


def _conflict_text(conflict: Conflict) -> str:
    ours, theirs = conflict.our_row, conflict.their_row
    sides = []
    for name, row in (("mine", ours), ("theirs", theirs)):
        text = "deleted" if row is None else one_line(f"{row.chosen} ✗ {row.rejected}", 160)
        sides.append(f"  {name}: {text}")
    row = ours or theirs
    prompt = one_line(row.prompt[-1]["content"], 80) if row is not None and row.prompt else ""
    return "\n".join([f"“{prompt}”", *sides])


class _Arrivals:
    """Stores opened on a thread that nobody has taken yet: the app may end between the two."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[PairStore] = []
        self._closed = False

    def open(self, path: Path, create: bool) -> PairStore:
        """Open a file, for a thread. Raises LocalDPOError."""
        from localdpo.data.store import PairStore  # numpy: after the first paint

        store = PairStore.open(path, create=create)
        with self._lock:
            if self._closed:
                store.close()
            else:
                self._waiting.append(store)
        return store

    def taken(self, store: PairStore) -> bool:
        """Leave a store to whoever asked for it; return False when it was closed because the app ends."""
        with self._lock:
            if store not in self._waiting:
                return False
            self._waiting.remove(store)
            return True

    def close(self) -> None:
        """Close what nobody took, and whatever is still to come."""
        with self._lock:
            self._closed = True
            for store in self._waiting:
                store.close()
            self._waiting.clear()
