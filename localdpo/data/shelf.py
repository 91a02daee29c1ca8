"""A sequence whose items lie in a file, so that memory holds twelve bytes an item, whatever their size.

What fits into `MEMORY_BYTES` never touches the disk. The file has no name and goes with the process, killed or not.
It is in localdpo's cache folder where that can be written: a system's own temporary folder is often in memory.
This module knows nothing about what it keeps.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import SpooledTemporaryFile, gettempdir
from typing import IO, Generic, TypeVar, overload

from localdpo.files import environment_faults
from localdpo.paths import cache_dir

__all__ = ["MEMORY_BYTES", "Shelf"]

MEMORY_BYTES = 32 << 20
"""Bytes that a shelf keeps in memory before it turns to a file."""

T = TypeVar("T")


class _File:
    """Bytes in the order in which they came; shared by shelves that hold the same items."""

    def __init__(self) -> None:
        self._folder = _folder()
        self._file: IO[bytes] = SpooledTemporaryFile(MEMORY_BYTES, dir=str(self._folder))  # noqa: SIM115 (see __del__)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            self._file.close()

    def append(self, data: bytes) -> int:
        """Keep `data`; returns where."""
        with environment_faults(self._folder):
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(data)
        return start

    def read(self, start: int, size: int) -> bytes:
        """The bytes that were kept there."""
        with environment_faults(self._folder):
            self._file.seek(start)
            return self._file.read(size)


class Shelf(Sequence[T], Generic[T]):
    """Items of one kind in order, each made anew from its bytes when it is asked for. One thread at a time."""

    def __init__(self, dump: Callable[[T], bytes], load: Callable[[bytes], T], file: _File | None = None) -> None:
        """`load` makes an equal item of what `dump` made of one; `file` is that of a shelf with the same items."""
        self._dump, self._load = dump, load
        self._file = file or _File()
        self._starts, self._sizes = array("q"), array("I")

    def append(self, item: T) -> None:
        """Put an item at the end. Raises `EnvironmentFault` when the disk is full."""
        data = self._dump(item)
        self._starts.append(self._file.append(data))
        self._sizes.append(len(data))

    def extend(self, items: Iterable[T]) -> None:
        """Put items at the end, as `append` does."""
        for item in items:
            self.append(item)

    def pick(self, rows: Iterable[int]) -> Shelf[T]:
        """A shelf of the items at `rows`, in that order; what is put on either later is not on the other."""
        picked = Shelf(self._dump, self._load, self._file)
        for row in rows:
            picked._starts.append(self._starts[row])
            picked._sizes.append(self._sizes[row])
        return picked

    def copy(self) -> Shelf[T]:
        """A shelf of the same items; their bytes are there once."""
        return self.pick(range(len(self)))

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, where: int) -> T: ...

    @overload
    def __getitem__(self, where: slice) -> list[T]: ...

    def __getitem__(self, where: int | slice) -> T | list[T]:
        """An item, or a list of those in a slice."""
        if isinstance(where, slice):
            return [self[row] for row in range(*where.indices(len(self)))]
        return self._load(self._file.read(self._starts[where], self._sizes[where]))


def _folder() -> Path:
    folder = cache_dir()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK | os.X_OK) else Path(gettempdir())
