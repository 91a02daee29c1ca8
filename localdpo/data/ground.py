"""The file under a `Sheet`, and the drafts beside it: opening, recovering, saving, merging.

A save writes a copy of what the sheet stands for to the drafts (which becomes the next base), says so in the journal,
and replaces the file by it; should the process die in between, either the journal or the file has every edit. When the
file is not the base any more, others' edits are merged first (`threeway`). Bases and journals are numbered by
generation. This module knows nothing about rows as people see them.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from filelock import FileLock, Timeout

from localdpo.data.drafts import DraftFolder
from localdpo.data.segments import Ints, Layout, chunks_of, copy_lines, digest_of, lines_of
from localdpo.data.sheet import Frozen, Sheet, runs_of
from localdpo.data.threeway import Choice, Conflict, Merge, align_files, merge
from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.files import atomic_file, environment_faults, require_space

__all__ = ["Ground", "Recovered", "SaveResult", "check_file", "pair_file_lock"]

LOCK_SECONDS = 10.0
_TRIES = 5
_ROTATE_BYTES = 32 << 20

Signature = tuple[int, int, int]
Choices = Mapping[Conflict, Choice]


@dataclass(frozen=True, slots=True)
class SaveResult:
    """What `save` or `reload` did.

    `merged` counts rows that others added, changed or deleted and that were taken in. With "conflict" nothing was
    written and nothing changed: call again with a choice for each of `conflicts`.
    """

    status: Literal["saved", "unchanged", "reloaded", "conflict"]
    rows: int = 0
    merged: int = 0
    conflicts: tuple[Conflict, ...] = ()


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was found of a session that ended without saving.

    `rows` counts the rows that differ from the file, `time` is when the last edit was made (seconds since 1970).
    `unreadable` is where drafts were put that could not be read, `others` how many more sessions left drafts; the
    next `open` after a save finds those.
    """

    rows: int = 0
    time: float = 0.0
    unreadable: Path | None = None
    others: int = 0


class _ChangedMeanwhile(Exception):
    pass


@contextmanager
def pair_file_lock(path: str | Path, timeout: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the lock that every writer of a file of pairs takes. Raises EnvironmentFault when another holds on to it."""
    target = Path(os.path.realpath(path))
    lock = FileLock(target.with_name(f".{target.name}.lock"), thread_local=False, mode=0o600)
    with environment_faults(target):
        try:
            lock.acquire(timeout=timeout, poll_interval=0.02)
        except Timeout:  # an OSError too
            problem = Problem(str(path), "another program is writing this file", "Try again when it is done")
            raise EnvironmentFault(problem) from None
    try:
        yield
    finally:
        lock.release()


class Ground:
    """The file at `path` (`name` as the user wrote it) with its drafts in `folder`, under `sheet`.

    `lock` guards the sheet. `moved` is called, under it, when the sheet stands on another base: with the keys whose
    contents may differ and whether the positions of rows may too.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        folder: DraftFolder,
        sheet: Sheet,
        lock: threading.RLock,
        moved: Callable[[Iterable[int], bool], None],
    ) -> None:
        self.path = path
        self.name = name
        self.folder = folder
        self._sheet = sheet
        self._lock = lock
        self._moved = moved
        self._saving = threading.Lock()
        self._generation = 0
        self._digest = ""
        self._signature: Signature | None = None
        self._journal_late = False
        self.needed: Callable[[], Iterable[int]] = lambda: ()
        """The keys that an undo may bring back."""

    # -- opening

    def read(self) -> None:
        """Read the file. Raises InputError, EnvironmentFault."""
        layout, file, signature = self._snapshot(0)
        self._sheet.set_base(layout, np.arange(len(layout), dtype=np.int64), file)
        self._sheet.order = self._sheet.base_order
        self._digest, self._signature = layout.digest, signature

    def recover(self) -> Recovered | None:
        """Take up where the process that left this folder ended; None when it left nothing unsaved.

        Raises OSError, ValueError, KeyError and LocalDPOError for drafts that cannot be read.
        """
        number, changed = self.folder.generation, self.folder.changed
        if number is None:
            raise ValueError("no journal")
        header, *records = self.folder.resume(number)
        runs = [np.arange(first, first + count, dtype=np.int64) for first, count in header["keys"]]
        keys = np.concatenate([*runs, np.empty(0, np.int64)])
        with self.folder.base(number).open("rb") as file:
            layout = lines_of(file, self.name)
        if layout.digest != header["digest"] or len(layout) != len(keys):
            raise ValueError("the base is not whole")
        self._sheet.set_base(layout, keys, self.folder.base(number).open("rb"))
        self._sheet.order = self._sheet.base_order
        self._generation, self._digest = number, layout.digest
        self._replay(records)
        if self._signature is None and self._disk_digest() == self._digest:
            self._signature = self._stat()
        edit = self._sheet.net_edit()
        touched = len(edit.contents) + (len(edit.cut[0]) if edit.cut is not None else 0)
        return Recovered(touched, changed) if touched else None

    def _replay(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Do the journal's edits. Where a save got as far as the file itself, that is the base from there on.

        A save writes what the rows were at "frozen" and, before it replaces the file, which digest that has.
        """
        disk = self._disk_digest()
        marks = {record["frozen"] for record in records if disk is not None and record.get("saving") == disk}
        for record in records:
            if "saving" in record:
                continue
            if "frozen" not in record:
                self._sheet.replay(record)
            elif record["frozen"] in marks:
                self._stand_on_disk()
        if marks:
            self._start_generation(self._generation + 1)

    def _stand_on_disk(self) -> None:
        number = self._generation + 1
        layout, file, signature = self._snapshot(number)
        if len(layout) != len(self._sheet.order):
            file.close()
            raise ValueError("the file is not what was saved")
        self._sheet.rebase(layout, self._sheet.order, file, self._sheet.order, {})
        self._digest, self._signature = layout.digest, signature

    def close(self) -> None:
        """Let go of the file; unsaved edits stay as drafts."""
        with self._saving, self._lock:
            if self._sheet.changed:
                with suppress(EnvironmentFault):
                    self.flush()
                self.folder.close()
            else:
                self.folder.remove()

    # -- the journal

    def log(self, record: dict[str, Any]) -> None:
        """Write down an edit that was just done. Never raises: what the disk does not take, `flush` tells."""
        if self._journal_late:
            return  # the next flush writes everything
        if self.folder.writing:
            self.folder.append(record)
            return
        try:
            self._start_generation(self._generation)
        except EnvironmentFault:
            self._journal_late = True

    def _start_generation(self, number: int) -> None:
        """Start journal `number` with what differs from its base now, and drop the one before."""
        before = self._generation
        header = {"path": str(self.path), "digest": self._digest, "keys": runs_of(self._sheet.base_order)}
        if self._sheet.changed:
            self.folder.begin(number, header, [self._sheet.net_edit().to_record()])
        self._generation = number
        self._journal_late = False
        if before != number:
            self.folder.drop(before)

    def flush(self) -> None:
        """Push every edit so far to the disk. Raises EnvironmentFault when the disk does not take them.

        Edits survive a kill of the process without it; this is for the machine's own death.
        """
        with self._lock:
            if self._journal_late:
                self._start_generation(self._generation)
            self.folder.sync()
            # A save counts on the generation: this can wait until it is done.
            if self.folder.size > _ROTATE_BYTES and self._saving.acquire(blocking=False):
                try:
                    self._rotate()
                finally:
                    self._saving.release()

    def _rotate(self) -> None:
        """Begin a journal that says the same in fewer words."""
        number = self._generation + 1
        with suppress(OSError):
            os.link(self.folder.base(self._generation), self.folder.base(number))
            self._start_generation(number)

    # -- saving

    def changed_on_disk(self) -> bool:
        """Whether somebody else wrote, replaced or deleted the file since it was read or saved: one `stat`."""
        return self._signature is None or self._stat() != self._signature

    def save(self, choices: Choices | None = None) -> SaveResult:
        """Write the file, with what others wrote meanwhile merged in by row.

        A row that was edited on both sides is a conflict: nothing is written until `choices` says what to keep.
        Raises `EnvironmentFault` (a full disk, no permission, another writer that does not end) and `InputError`
        (the file is no text any more); the edits stay as they are.
        """
        with self._saving, pair_file_lock(self.path):
            for _ in range(_TRIES):
                with suppress(_ChangedMeanwhile):
                    return self._save(choices or {})
        raise EnvironmentFault(Problem(self.name, "another program keeps writing this file", "Stop it, or save as"))

    def _save(self, choices: Choices) -> SaveResult:
        signature, merged = self._stat(), 0
        if signature is not None and self._disk_digest() != self._digest:
            merge = self._merge(choices)
            if merge.conflicts:
                return SaveResult("conflict", conflicts=merge.conflicts)
            merged, signature = merge.taken, self._signature
        with self._lock:
            if not self._sheet.changed and signature is not None:
                self._signature = signature
                self.folder.end(self._generation)
                return SaveResult("saved" if merged else "unchanged", len(self._sheet.keys), merged)
            if self._journal_late:
                self._start_generation(self._generation)
            frozen = self._sheet.freeze()
            mark = secrets.token_hex(8)  # a journal may be continued by another process: no number is its own
            if self.folder.writing:
                self.folder.append({"frozen": mark})
        self._write(frozen, mark, signature)
        return SaveResult("saved", len(self._sheet.keys), merged)

    def _write(self, frozen: Frozen, mark: str, signature: Signature | None) -> None:
        number = self._generation + 1
        with self.folder.new_base(number) as base:
            layout = copy_lines(frozen.pieces(), base, self.name)
        if len(layout) != len(frozen.order):
            raise AssertionError("a row became two, or none")
        with self._lock:
            self.flush()
            if self.folder.writing:
                # Should the process die after the replacement, this says that the file has these edits.
                self.folder.append({"saving": layout.digest, "frozen": mark})
                self.flush()
        try:
            require_space(self.path.parent, layout.size)
            with atomic_file(self.path) as file:
                for chunk in chunks_of(self.folder.base(number)):
                    file.write(chunk)
                if self._stat() != signature:
                    raise _ChangedMeanwhile
        except BaseException:
            self.folder.base(number).unlink(missing_ok=True)
            raise
        self._adopt(frozen, layout, number)

    def _adopt(self, frozen: Frozen, layout: Layout, number: int) -> None:
        """Stand on what was written; edits made meanwhile stay edits."""
        with self._lock:
            order, texts = self._sheet.order, self._sheet.texts
            rest = {key: text for key, text in texts.items() if frozen.texts.get(key) is not text}
            self._sheet.rebase(layout, frozen.order, self.folder.base(number).open("rb"), order, rest)
            self._digest = layout.digest
            now = self._stat()
            self._signature = now if now is not None and now[1] == layout.size else None
            self._start_generation(number)
            self._moved((), False)
            self._sheet.release_sources(self.needed())

    def reload(self, choices: Choices | None = None) -> SaveResult:
        """Take in what others wrote, and keep our unsaved edits on top; nothing is written to the file.

        Conflicts as for `save`. Raises `InputError` when the file is gone or is no text any more.
        """
        with self._saving:
            check_file(self.path, self.name)
            signature = self._stat()
            if self._disk_digest() == self._digest:
                self._signature = signature
                return SaveResult("unchanged", len(self._sheet.keys))
            merge = self._merge(choices or {})
            if merge.conflicts:
                return SaveResult("conflict", conflicts=merge.conflicts)
            return SaveResult("reloaded", len(self._sheet.keys), merge.taken)

    def discard(self) -> None:
        """Forget all unsaved edits and read the file again. Raises `InputError`."""
        with self._saving:
            number = self._generation + 1
            layout, file, signature = self._snapshot(number)
            with self._lock:
                first = self._sheet.next_key
                keys = np.arange(first, first + len(layout), dtype=np.int64)
                self._stand_on(layout, keys, file, signature, number, keys, {}, ())

    def save_as(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write what the rows are now to another file; this one and its edits stay as they are.

        Raises `InputError` when the file is there and `overwrite` is false, `EnvironmentFault`.
        """
        target = Path(os.path.realpath(path))
        if target == self.path or (target.exists() and not overwrite):
            raise InputError(Problem(str(path), "this file is there already", "Choose another name"))
        with self._saving:
            with self._lock:
                frozen = self._sheet.freeze()
            with environment_faults(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            with pair_file_lock(target), atomic_file(target) as file:
                for piece in frozen.pieces():
                    file.write(piece)
        return target

    def _merge(self, choices: Choices) -> Merge:
        """Put our edits on top of the file as it is now, unless there are conflicts without a choice."""
        number = self._generation + 1
        layout, file, signature = self._snapshot(number)
        base, base_file = self._sheet.layout, self._sheet.base_file
        if base is None or base_file is None:
            raise AssertionError("an open store has a base")
        found = align_files(base, base_file, layout, file)
        with self._lock:
            merged = merge(self._sheet, found, choices)
            if not merged.conflicts:
                self._stand_on(layout, merged.keys, file, signature, number, merged.order, merged.texts, merged.changed)
        if merged.conflicts:
            file.close()
            self.folder.base(number).unlink(missing_ok=True)
        return merged

    def _stand_on(
        self,
        layout: Layout,
        keys: Ints,
        file: BinaryIO,
        signature: Signature | None,
        number: int,
        order: Ints,
        texts: Mapping[int, bytes],
        changed: Iterable[int],
    ) -> None:
        """Go on with another base. `changed` are known keys whose contents may differ from before."""
        self._sheet.rebase(layout, keys, file, order, texts)
        self._digest, self._signature = layout.digest, signature
        self._start_generation(number)
        self._moved(changed, True)
        self._sheet.release_sources(self.needed())

    # -- the file

    def _stat(self) -> Signature | None:
        try:
            return _signature(os.stat(self.path))
        except OSError:
            return None

    def _disk_digest(self) -> str | None:
        """Return the digest of the file as it is now, None when it is not there."""
        try:
            return digest_of(self.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(self.name, error) from None

    def _chunks(self) -> Iterator[bytes]:
        try:
            yield from chunks_of(self.path)
        except OSError as error:
            raise _unreadable(self.name, error) from None

    def _snapshot(self, number: int) -> tuple[Layout, BinaryIO, Signature | None]:
        """Copy the file to base `number`. Raises InputError when it cannot be read, EnvironmentFault."""
        with self.folder.new_base(number) as into:
            for _ in range(_TRIES):
                into.seek(0)
                into.truncate()
                before = self._stat()
                layout = copy_lines(self._chunks(), into, self.name)
                if before == self._stat() is not None:
                    break
        return layout, self.folder.base(number).open("rb"), before


def _signature(status: os.stat_result) -> Signature:
    return status.st_mtime_ns, status.st_size, status.st_ino


def _unreadable(name: str, error: OSError) -> InputError:
    return InputError(Problem(name, f"cannot be read ({error.strerror})", "Check the path and its permissions"))


def check_file(target: Path, name: str) -> None:
    """Raise InputError unless there is a file at `target`."""
    if not target.exists():
        raise InputError(Problem(name, "is not there", "Check the path, or make a new file"))
    if not target.is_file():
        raise InputError(Problem(name, "is not a file", "Name a JSONL file"))
