"""Open a file in the program this system has for it, without touching the terminal the UI is drawn on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from localdpo.errors import EnvironmentFault, InputError, Problem

__all__ = ["open_file"]


def open_file(path: Path) -> bool:
    """Open ``path``; False where there is no screen to open it on, as over SSH.

    Raises InputError when there is no such file, EnvironmentFault when the opener cannot be started.
    """
    if not path.is_file():
        raise InputError(Problem(str(path), "there is no such file", "`localdpo report RUN` writes it"))
    opener = _opener()
    if opener is None:
        return False
    try:
        subprocess.Popen(
            [opener, str(path.absolute())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise EnvironmentFault(Problem(opener, error.strerror or str(error))) from None
    return True


def _opener() -> str | None:
    """The command that opens files. A browser of the terminal itself would draw over the UI."""
    if sys.platform == "darwin":
        return None if os.environ.get("SSH_CONNECTION") else shutil.which("open")
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return shutil.which("xdg-open")
    return None
