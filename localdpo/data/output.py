"""Where a command writes: a new file, whole or not at all, or standard output for `-`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.files import atomic_file

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
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with atomic_file(path) as file:
        yield file
