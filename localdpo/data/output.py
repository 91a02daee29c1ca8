"""Where a command writes: a new file, whole or not at all, or standard output for `-`.

A pipe gets every byte as it is; a terminal gets the text made inert, as it would obey what a data file tells it.
"""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, cast

from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.files import atomic_file
from localdpo.text import StreamSanitiser

__all__ = ["STDOUT", "open_output", "refuse_existing"]

STDOUT = "-"


def refuse_existing(path: str | Path, force: bool) -> None:
    """Raise InputError when `path` is there and may not be replaced, EnvironmentFault when its folder is not."""
    if str(path) == STDOUT:
        return
    target = Path(path)
    if target.is_dir():
        raise InputError(Problem(str(path), "is a folder", "Name a file"))
    if target.exists() and not force:
        raise InputError(Problem(str(path), "is there already", "Name another file, or overwrite it with --force"))
    if not target.absolute().parent.is_dir():
        raise EnvironmentFault(Problem(str(path), "there is no such folder", "Make it first"))


@contextmanager
def open_output(path: str | Path, force: bool = False) -> Iterator[BinaryIO]:
    """Yield a file to write bytes to; `path` changes only when the block ends well. Raises like `refuse_existing`."""
    refuse_existing(path, force)
    if str(path) == STDOUT:
        with _ToTerminal() if sys.stdout.isatty() else nullcontext(sys.stdout.buffer) as out:
            yield cast(BinaryIO, out)
        sys.stdout.flush()
        return
    with atomic_file(path) as file:
        yield file


class _ToTerminal(io.RawIOBase):
    """Takes UTF-8 and shows it on standard output, made inert."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._clean = StreamSanitiser()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        sys.stdout.write(self._clean.feed(self._decoder.decode(bytes(data))))
        return len(data)

    def close(self) -> None:
        if not self.closed:
            sys.stdout.write(self._clean.feed(self._decoder.decode(b"", final=True)) + self._clean.close())
        super().close()
