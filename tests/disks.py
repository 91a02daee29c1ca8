"""Real small disks for tests: a memory file system of its own, mounted for the time of a test, that can run full."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Disk:
    """A mounted file system at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / ".filler"

    def fill(self, leave: int = 0) -> None:
        """Take all but ``leave`` bytes of what is free."""
        self.empty()
        with self._filler.open("wb", buffering=0) as file:
            free = os.statvfs(self.path)
            left = free.f_bavail * free.f_frsize - leave
            while left > 0:
                try:
                    left -= file.write(bytes(min(left, 1 << 16)))
                except OSError:
                    return

    def empty(self) -> None:
        """Give the space back."""
        self._filler.unlink(missing_ok=True)

    def read_only(self, now: bool = True) -> None:
        """Allow no more writing, or allow it again."""
        subprocess.run(["mount", "-o", f"remount,{'ro' if now else 'rw'}", str(self.path)], check=True)


@contextmanager
def mounted(path: Path, size: str = "4m") -> Iterator[Disk]:
    """Mount a file system of ``size`` at ``path``; skips the test where that is not allowed."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a file system needs root on Linux")
    path.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {made.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
