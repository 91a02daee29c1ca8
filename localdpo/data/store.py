"""A file of pairs that is being edited: nothing acknowledged is lost, nothing untouched changes.

`PairStore` shows a JSONL file as rows with stable keys. An edit changes one line in memory and is in a journal on disk
before it returns (`drafts`); `save` writes the file whole or not at all, every untouched line byte for byte as it
was, and merges by row what others wrote meanwhile. All methods may be called from any thread; `open`, `save`,
`save_as`, `reload`, `discard`, `build_index` and `search` belong on a worker thread, everything else answers at once.

    sheet       the lines in order, edits and their reverse      ground      the file, drafts, saving and merging
    rows        one line taken apart and put together            rowlist     rows parsed, summed up and searched

It does not know how rows are shown, what a model makes of them, or whose edits they are.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from localdpo.data.drafts import DraftFolder, hidden_folder
from localdpo.data.ground import Ground, Recovered, SaveResult, check_file, pair_file_lock
from localdpo.data.rowindex import RowSummary
from localdpo.data.rowlist import RowList
from localdpo.data.rows import PairDraft, Row, repaired, write_row
from localdpo.data.segments import Ints
from localdpo.data.sheet import Edit, Sheet
from localdpo.data.threeway import Choice, Conflict
from localdpo.errors import EnvironmentFault, InputError, LocalDPOError, Problem
from localdpo.files import atomic_write, environment_faults

__all__ = [
    "Choice", "Conflict", "PairDraft", "PairStore", "Recovered", "Row", "RowSummary", "SaveResult", "Step",
    "pair_file_lock",
]  # fmt: skip

_SAME_EDIT_SECONDS = 3.0
_MAX_UNDO = 1000


class Step(NamedTuple):
    """What an undo or redo did, and the row to show."""

    text: str
    key: int


class PairStore:
    """An open file of pairs. Made by `open`; `close` it, or use it as a context manager.

    `recovered` says what an earlier session left unsaved, None for nothing. `drafts_problem` is a sentence when
    drafts cannot be kept beside the file, so that unsaved edits would not survive the program. `version` grows with
    every change.
    """

    def __init__(self, path: Path, name: str, folder: DraftFolder) -> None:
        self.path = path
        self.name = name
        self.recovered: Recovered | None = None
        self.drafts_problem: str | None = None
        self.version = 0
        self._lock = threading.RLock()
        self._sheet = Sheet()
        self._list = RowList(self._sheet, self._lock, folder.folder)
        self._ground = Ground(path, name, folder, self._sheet, self._lock, self._moved)
        self._ground.needed = self._needed
        self._undo: list[Edit] = []
        self._redo: list[Edit] = []
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    # -- opening and closing

    @classmethod
    def open(cls, path: str | Path, *, create: bool = False, drafts: str | Path | None = None) -> PairStore:
        """Open a file; `create` makes an empty one where there is none. `drafts` is where unsaved edits are kept.

        Raises `InputError` when it cannot be read or is not UTF-8 text, `EnvironmentFault` when it cannot be made.
        """
        target = Path(os.path.realpath(path))
        if create and not target.exists():
            with environment_faults(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(target, b"")
        check_file(target, str(path))
        place = Path(drafts) if drafts is not None else hidden_folder(target) / "drafts"
        orphans = DraftFolder.orphans(place, target)
        unreadable = None
        for number, orphan in enumerate(orphans):
            store = cls(target, str(path), orphan)
            try:
                found = store._ground.recover()
            except (OSError, ValueError, KeyError, TypeError, LocalDPOError):
                store._sheet.close()
                unreadable = orphan.set_aside()
                continue
            if found is None:
                store.close()
                continue
            for other in orphans[number + 1 :]:
                other.close()
            store.recovered = replace(found, unreadable=unreadable, others=len(orphans) - number - 1)
            return store
        store = cls._fresh(target, str(path), place)
        if unreadable is not None:
            store.recovered = Recovered(unreadable=unreadable)
        return store

    @classmethod
    def _fresh(cls, target: Path, shown: str, place: Path) -> PairStore:
        temporary, problem = None, None
        try:
            folder = DraftFolder.create(place, target)
        except EnvironmentFault as fault:
            temporary, problem = tempfile.TemporaryDirectory(prefix="localdpo-"), str(fault)
            folder = DraftFolder.create(Path(temporary.name), target)
        store = cls(target, shown, folder)
        store._temporary, store.drafts_problem = temporary, problem
        try:
            store._ground.read()
        except BaseException:
            store._ground.folder.remove()
            raise
        return store

    def close(self) -> None:
        """Let go of the file. Unsaved edits stay as drafts, which the next `open` recovers."""
        self._ground.close()
        self._sheet.close()
        self._list.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> PairStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _moved(self, changed: Iterable[int], reordered: bool) -> None:
        """The file's lines are others than before, or were saved."""
        if reordered:
            # Positions in the list changed under the steps: the history starts anew.
            self._undo.clear()
            self._redo.clear()
        self._list.forget(changed)
        self._list.saved()
        self.version += 1

    def _needed(self) -> list[int]:
        edits = (*self._undo, *self._redo)
        return [int(key) for edit in edits for part in (edit.cut, edit.put) if part is not None for key in part[1]]

    # -- reading

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def keys(self) -> Ints:
        """The keys of the rows in order, as an int64 array that is not to be changed. A key stays its row's own."""
        with self._lock:
            return self._sheet.keys

    @property
    def dirty(self) -> bool:
        """Whether there are unsaved edits."""
        with self._lock:
            return self._sheet.changed

    def raw(self, key: int) -> bytes:
        """Return the bytes of a row's line, without its end. Raises KeyError for a row that is not there."""
        return self._list.raw(key)

    def row(self, key: int) -> Row:
        """Return a row. Raises KeyError for one that is not there."""
        return self._list.row(key)

    def repair(self, key: int) -> bytes | None:
        """Return the line that would put a cut-off row right, for `update_raw`; None when there is none."""
        return repaired(self.raw(key))

    # -- the list

    @property
    def max_tokens(self) -> int | None:
        """The limit above which rows are "too_long" (see `note_tokens`); None for none."""
        return self._list.max_tokens

    @max_tokens.setter
    def max_tokens(self, limit: int | None) -> None:
        self._list.max_tokens = limit

    def summary(self, key: int) -> RowSummary:
        """Return what the list shows of a row. Raises KeyError for one that is not there.

        "duplicate" and its like are told of rows that are indexed (see `build_index`).
        """
        return self._list.summary(key)

    def note_tokens(self, counts: Mapping[int, int]) -> None:
        """Remember how many tokens rows have (prompt and the longer answer), as a model counts them."""
        self._list.note_tokens(counts)

    def build_index(
        self,
        cancelled: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] | None = None,
        *,
        checks: bool = True,
    ) -> bool:
        """Index the rows that are not indexed yet; return whether all are. On a worker thread.

        First comes what searching needs, then, with `checks`, what is wrong with each row. `progress` gets rows done
        and rows in all. A search does what it needs of this by itself; a list does it once it is shown.
        """
        return self._list.build_index(cancelled, progress, checks=checks)

    def search(
        self,
        text: str = "",
        tag: str | None = None,
        state: str | None = None,
        problem: str | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Ints:
        """Return the keys, in order, of the rows that fit all that is given. On a worker thread.

        Every word of `text` must be in the prompt or an answer, whatever its case; "what is quoted" is one. `tag` is
        a tag, `state` one of `rowindex.State`, "dirty" or "clean", `problem` a code of `check.findings.KINDS` or
        "any". When `cancelled` becomes true, the answer is empty.
        """
        return self._list.search(text, tag, state, problem, cancelled)

    def tags(self) -> dict[str, int]:
        """Return every tag with how many rows have it, as far as rows are indexed."""
        return self._list.tags()

    def problems(self) -> dict[str, int]:
        """Return every code with how many rows have it, as far as rows are indexed."""
        return self._list.problems()

    # -- editing

    def insert(self, draft: PairDraft, after: int | None = None) -> int:
        """Add a row after the row `after`, at the end without one; return its key. Raises InputError, KeyError."""
        return self._insert(write_row(None, draft), after, "add a pair")

    def duplicate(self, key: int) -> int:
        """Add a copy of a row after it; return its key. Raises KeyError."""
        return self._insert(self.raw(key), key, "duplicate a pair")

    def _insert(self, raw: bytes, after: int | None, text: str) -> int:
        with self._lock:
            order = self._sheet.order
            position = len(order) if after is None else self._sheet.position(after) + 1
            key = self._sheet.new_key()
            put = np.array([position], np.int64), np.array([key], np.int64)
            self._do(Edit(text, key, {key: (raw, raw)}, put=put))
            return key

    def update(self, key: int, draft: PairDraft) -> None:
        """Make a row hold `draft`; what does not differ keeps its bytes. Raises InputError, KeyError.

        Quick successive updates of one row are one step for `undo`.
        """
        with self._lock:
            before = self.raw(key)
            self._set(key, before, write_row(before, draft), "edit a pair")

    def update_raw(self, key: int, raw: bytes | str) -> None:
        """Make a row's line hold `raw`, whatever it is. Raises InputError for one with a line end in it, KeyError."""
        line = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else bytes(raw)
        if b"\n" in line or not line.strip():
            raise InputError(Problem(self.name, "a row is one line that is not blank", "Take out the line breaks"))
        with self._lock:
            self._set(key, self.raw(key), line.removesuffix(b"\r"), "edit a row's text")

    def swap(self, key: int) -> None:
        """Exchange a row's chosen and rejected answer. Raises InputError for a row that is no pair, KeyError."""
        row = self.row(key)
        if row.problem is not None:
            raise InputError(Problem(f"{self.name}, this row", row.problem, "Repair it first"))
        draft = row.draft()
        with self._lock:
            before = self.raw(key)
            swapped = PairDraft(
                draft.messages, draft.rejected, draft.chosen, draft.tags, draft.weight, draft.extra, draft.id
            )
            self._set(key, before, write_row(before, swapped), "swap the answers", alone=True)

    def _set(self, key: int, before: bytes, after: bytes, text: str, alone: bool = False) -> None:
        if before != after:
            self._do(Edit(text, key, {key: (before, after)}, time=0.0 if alone else time.monotonic()))

    def delete(self, keys: int | Sequence[int] | Ints) -> None:
        """Delete rows. Raises KeyError when one is not there."""
        wanted = np.atleast_1d(np.asarray(keys, np.int64))
        with self._lock:
            order = self._sheet.order
            positions = np.flatnonzero(np.isin(order, wanted))
            if len(positions) != len(np.unique(wanted)):
                raise KeyError(int(wanted[~np.isin(wanted, order)][0]))
            if len(positions):
                many = f"delete {len(positions):,} pairs" if len(positions) > 1 else "delete a pair"
                self._do(Edit(many, int(order[positions[0]]), cut=(positions, order[positions])))

    def undo(self) -> Step | None:
        """Take back the last step; returns what that was and the row to show, None when there is nothing."""
        return self._step(self._undo, self._redo, back=True)

    def redo(self) -> Step | None:
        """Do again what was taken back last; returns what that was and the row to show, None for nothing."""
        return self._step(self._redo, self._undo, back=False)

    def _step(self, source: list[Edit], target: list[Edit], back: bool) -> Step | None:
        with self._lock:
            if not source:
                return None
            edit = source.pop()
            target.append(edit)
            self._apply(edit.reversed() if back else edit)
            show = edit.show if self._sheet.has(edit.show) else self._near(edit)
            return Step(edit.text, show)

    def _near(self, edit: Edit) -> int:
        """Return the key of the row where one went away; -1 in an empty list."""
        keys, gone = self._sheet.keys, edit.cut or edit.put
        if not len(keys):
            return -1
        order = self._sheet.order
        position = min(int(gone[0][0]), len(order) - 1) if gone is not None else 0
        near = np.flatnonzero(np.isin(keys, order[position:]))
        return int(keys[near[0]]) if len(near) else int(keys[-1])

    def _do(self, edit: Edit) -> None:
        self._apply(edit)
        self._redo.clear()
        last = self._undo[-1] if self._undo else None
        if last is not None and _goes_on(last, edit):
            edit.contents = {edit.show: (last.contents[edit.show][0], edit.contents[edit.show][1])}
            self._undo.pop()
        self._undo.append(edit)
        del self._undo[:-_MAX_UNDO]

    def _apply(self, edit: Edit) -> None:
        self._sheet.apply(edit)
        self._list.forget(edit.contents)
        self.version += 1
        record = edit.to_record()
        if edit.put is not None:
            # What an undo brings back after a save is in no base: the journal has to hold it.
            extra = self._sheet.foreign(edit.put[1])
            record["set"] = [*Edit(contents={**extra, **edit.contents}).to_record().get("set", ())]
        self._ground.log(record)

    # -- the file

    def flush(self) -> None:
        """Push every edit so far to the disk. Raises EnvironmentFault when the disk does not take them.

        Edits survive a kill of the process without it; this is for the machine's own death.
        """
        self._ground.flush()

    def changed_on_disk(self) -> bool:
        """Whether somebody else wrote, replaced or deleted the file since it was read or saved: one `stat`."""
        return self._ground.changed_on_disk()

    def save(self, choices: Mapping[Conflict, Choice] | None = None) -> SaveResult:
        """Write the file, with what others wrote meanwhile merged in by row.

        A row that was edited on both sides is a conflict: nothing is written until `choices` says what to keep.
        Raises `EnvironmentFault` (a full disk, no permission, another writer that does not end) and `InputError`
        (the file is no text any more); the edits stay as they are.
        """
        return self._ground.save(choices)

    def reload(self, choices: Mapping[Conflict, Choice] | None = None) -> SaveResult:
        """Take in what others wrote, and keep our unsaved edits on top; nothing is written to the file.

        Conflicts as for `save`. Raises `InputError` when the file is gone or is no text any more.
        """
        return self._ground.reload(choices)

    def discard(self) -> None:
        """Forget all unsaved edits and read the file again; rows get new keys. Raises `InputError`."""
        self._ground.discard()
        self.recovered = None

    def save_as(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write what the rows are now to another file; this one and its edits stay as they are.

        Raises `InputError` when the file is there and `overwrite` is false, `EnvironmentFault`.
        """
        return self._ground.save_as(path, overwrite=overwrite)


def _goes_on(last: Edit, edit: Edit) -> bool:
    """Whether an edit goes on with the last one: somebody is typing."""
    same = last.show == edit.show and last.text == edit.text
    return same and bool(edit.time and last.time) and edit.time - last.time < _SAME_EDIT_SECONDS
