"""Unsaved edits on disk: what survives a crash, a kill or a lost terminal.

Every open `PairStore` has a folder under the workspace's hidden folder:

    .localdpo/drafts/<file>-<hash of its path>-<token>/
        owner        held (flock) while the process that edits lives; the path as JSON
        base-N       the file as it was read or last saved (generation N)
        journal-N    one line an edit since then: crc32, a space, JSON

An edit is written to the journal before it is acknowledged, so that it survives the process; `sync` pushes it to
the disk, so that it survives the machine. A line that a crash cut off fails its checksum and was never
acknowledged. A folder whose lock nobody holds belongs to a process that died: with a journal it is recovered, without
one it is swept away. This module knows nothing about pairs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from localdpo.files import environment_faults

__all__ = ["HIDDEN", "DraftFolder", "hidden_folder", "make_hidden"]

HIDDEN = ".localdpo"
_SAFE = re.compile(r"[^\w.-]+")
_BEING_MADE = 60.0  # seconds within which a folder without its name may be another process's, at work on it
_GENERATION = re.compile(r"journal-(\d+)")


def hidden_folder(path: str | Path) -> Path:
    """Return the hidden folder for a file of pairs: its workspace's, where it is in one, else one beside it.

    A workspace is a folder above the file that has a hidden folder already, or the parent of a folder `pairs`.
    """
    folder = Path(os.path.realpath(path)).parent
    for above in (folder, *folder.parents[:3]):
        if (above / HIDDEN).is_dir():
            return above / HIDDEN
    return (folder.parent if folder.name == "pairs" else folder) / HIDDEN


def make_hidden(folder: Path) -> Path:
    """Make a hidden folder that version control leaves alone, unless it is there. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    ignore = folder / ".gitignore"
    if not ignore.exists():
        with suppress(OSError):
            ignore.write_text("*\n", encoding="ascii")
    return folder


def _names(drafts: Path, path: Path) -> tuple[str, str]:
    """How the folders of ``path`` begin: by its place in the workspace, which may be moved; once by its whole path."""
    whole = _prefix(path, path)
    if drafts.parent.name != HIDDEN:
        return whole, whole
    place = os.path.relpath(os.path.realpath(path), os.path.realpath(drafts.parent.parent))
    return _prefix(path, Path(place)), whole


def _prefix(path: Path, place: Path) -> str:
    digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:12]
    return f"{_SAFE.sub('_', path.name)[:40]}-{digest}-"


class DraftFolder:
    """The drafts of one open file, held by this process. Made by `create` or found by `orphans`."""

    def __init__(self, folder: Path, owner: BinaryIO) -> None:
        self.folder = folder
        self._owner = owner
        self._journal: BinaryIO | None = None
        self._waiting: list[bytes] = []
        self._good = 0  # bytes of the journal that are whole lines
        self._synced = True

    @classmethod
    def create(cls, drafts: Path, path: Path) -> DraftFolder:
        """Make the folder for `path` under `drafts`. Raises EnvironmentFault."""
        with environment_faults(drafts):
            if drafts.parent.name == HIDDEN:
                make_hidden(drafts.parent)
            drafts.mkdir(parents=True, exist_ok=True, mode=0o700)
            name = _names(drafts, path)[0] + secrets.token_hex(6)
            temporary = drafts / f".{name}"
            temporary.mkdir(mode=0o700)
            owner = (temporary / "owner").open("xb")
            # Locked before it has its name: nobody ever sees it without an owner.
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner.write(json.dumps({"path": str(path), "pid": os.getpid()}).encode())
            owner.flush()
            folder = temporary.rename(drafts / name)
        return cls(folder, owner)

    @classmethod
    def orphans(cls, drafts: Path, path: Path) -> list[DraftFolder]:
        """Return the folders of `path` with edits of processes that are gone, newest first, now held by this one.

        Folders without edits are deleted on the way.
        """
        found = []
        with suppress(OSError):
            for entry in sorted(drafts.iterdir()):
                if not entry.name.lstrip(".").startswith(_names(drafts, path)):
                    continue
                if entry.name.startswith(".") and time.time() - entry.stat().st_mtime < _BEING_MADE:
                    continue
                folder = cls._taken_over(entry)
                if folder is not None:
                    found.append(folder)
        return sorted(found, key=lambda folder: folder.changed, reverse=True)

    @classmethod
    def _taken_over(cls, entry: Path) -> DraftFolder | None:
        try:
            owner = (entry / "owner").open("rb+")
        except OSError:
            return None
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner.close()
            return None
        folder = cls(entry, owner)
        if folder.generation is None:
            folder.remove()
            return None
        return folder

    @property
    def generation(self) -> int | None:
        """The newest generation that has a journal; None when there are no edits."""
        numbers = []
        with suppress(OSError):
            for entry in self.folder.iterdir():
                match = _GENERATION.fullmatch(entry.name)
                if match:
                    numbers.append(int(match.group(1)))
        return max(numbers, default=None)

    @property
    def changed(self) -> float:
        """When the newest journal was written to, in seconds since 1970; 0 when there is none."""
        number = self.generation
        with suppress(OSError):
            if number is not None:
                return self.journal(number).stat().st_mtime
        return 0.0

    def base(self, number: int) -> Path:
        """Return the path of a base."""
        return self.folder / f"base-{number}"

    def journal(self, number: int) -> Path:
        """Return the path of a journal."""
        return self.folder / f"journal-{number}"

    @contextlib.contextmanager
    def new_base(self, number: int) -> Iterator[BinaryIO]:
        """Yield a file to fill with a base; it is on the disk when the block ends. Raises EnvironmentFault."""
        path = self.base(number)
        with environment_faults(path):
            file = path.open("wb+")
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            finally:
                file.close()

    def begin(self, number: int, header: dict[str, Any], records: list[dict[str, Any]]) -> None:
        """Start journal `number` with `header` and `records`, whole or not at all. Raises EnvironmentFault."""
        self._close_journal()
        path = self.journal(number)
        with environment_faults(path):
            temporary = self.folder / f".journal-{number}"
            data = b"".join(map(_line, [header, *records]))
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            self._journal = path.open("rb+", buffering=0)
            self._good = self._journal.seek(0, os.SEEK_END)
        self._waiting.clear()
        self._synced = False

    def resume(self, number: int) -> list[dict[str, Any]]:
        """Open journal `number` to go on with it, and return its header and records; what was cut off goes."""
        self._close_journal()
        path = self.journal(number)
        with environment_faults(path):
            records, good = _read(path)
            self._journal = path.open("rb+", buffering=0)
            self._journal.truncate(good)
            self._good = self._journal.seek(0, os.SEEK_END)
        return records

    @property
    def writing(self) -> bool:
        """Whether a journal is open."""
        return self._journal is not None

    @property
    def size(self) -> int:
        """Bytes of the journal."""
        return self._good

    def append(self, record: dict[str, Any]) -> None:
        """Write a record. Never raises: what the disk did not take waits for `sync`, which says so."""
        self._waiting.append(_line(record))
        self._synced = False
        with suppress(OSError):
            self._write_waiting()

    def _write_waiting(self) -> None:
        if self._journal is None:
            return
        while self._waiting:
            data = self._waiting[0]
            try:
                written = 0
                while written < len(data):
                    written += self._journal.write(data[written:]) or 0
            except OSError:
                # Half a line would spoil the next one.
                with suppress(OSError):
                    self._journal.truncate(self._good)
                    self._journal.seek(self._good)
                raise
            self._good += len(data)
            del self._waiting[0]

    def sync(self) -> None:
        """Push every edit to the disk. Raises EnvironmentFault when some could not be written; they are kept."""
        if self._synced or self._journal is None:
            return
        with environment_faults(self.folder):
            self._write_waiting()
            os.fsync(self._journal.fileno())
            with suppress(OSError):
                fd = os.open(self.folder, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        self._synced = True

    def end(self, number: int) -> None:
        """Delete journal `number`: there is no edit left in it that is not saved. Its base stays."""
        self._close_journal()
        with suppress(OSError):
            self.journal(number).unlink()

    def drop(self, number: int) -> None:
        """Delete a generation: its journal first, so that no journal is ever without its base."""
        if self._journal is not None and self.generation == number:
            self._close_journal()
        for path in (self.journal(number), self.base(number)):
            with suppress(OSError):
                path.unlink()

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._waiting.clear()

    def close(self) -> None:
        """Let go of the folder, which stays for a later process to recover."""
        self._close_journal()
        self._owner.close()

    def remove(self) -> None:
        """Delete the folder with all it holds."""
        self._close_journal()
        number = self.generation
        while number is not None:
            self.journal(number).unlink(missing_ok=True)
            number = self.generation
        shutil.rmtree(self.folder, ignore_errors=True)
        self._owner.close()

    def set_aside(self) -> Path:
        """Rename a folder that cannot be read, so that nothing looks for it again, and return where it is."""
        self.close()
        place = self.folder.with_name(f"unreadable-{self.folder.name}")
        with environment_faults(self.folder):
            return self.folder.rename(place)


def _line(record: dict[str, Any]) -> bytes:
    data = json.dumps(record, separators=(",", ":")).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(data), data)


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records of a journal up to the first that is not whole, and how many bytes those are."""
    records, good = [], 0
    with path.open("rb") as file:
        for line in file:
            mark, _, data = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or mark != b"%08x" % zlib.crc32(data):
                break
            records.append(json.loads(data))
            good += len(line)
    return records, good
