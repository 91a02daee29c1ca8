"""Files that only grow, a line at a time, such as candidates and verdicts.

A line is on disk before `append_line` returns, and a crash loses at most the line being written: what it left
of it is cut off by `repair_tail` before the next writer comes. This module knows nothing about what lines hold.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from localdpo.files import environment_faults

__all__ = ["append_line", "append_lines", "repair_tail"]

_BLOCK = 1 << 16


def append_line(path: str | Path, line: str) -> None:
    """Append ``line`` and a newline to ``path``, which is made (for its owner only) with its folder.

    Raises EnvironmentFault. ``line`` must hold no newline.
    """
    append_lines(path, (line,))


def append_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Append each of ``lines`` and a newline in one write, and push the file to disk."""
    target = Path(path)
    data = "".join(f"{line}\n" for line in lines).encode("utf-8")
    with environment_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            written = 0
            while written < len(data):
                written += os.write(fd, data[written:])
            os.fsync(fd)
        finally:
            os.close(fd)


def repair_tail(path: str | Path) -> int:
    """Cut off what follows the last newline; returns how many bytes went. A file that is not there is whole.

    Only a journal's own writer may call this: a file that people edit may end without a newline.
    """
    target = Path(path)
    with environment_faults(target):
        if not target.is_file():
            return 0
        with target.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            end = size
            while end > 0:
                start = max(0, end - _BLOCK)
                file.seek(start)
                found = file.read(end - start).rfind(b"\n")
                if found >= 0:
                    end = start + found + 1
                    break
                end = start
            if end < size:
                file.truncate(end)
                os.fsync(file.fileno())
        return size - end
