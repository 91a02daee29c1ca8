"""`localdpo` and `localdpo tui`: open the terminal UI, or say why this terminal cannot show it.

The one module of the library that knows the UI package, and only when it is asked to open it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localdpo.console.terminal import OpenTerminals, is_live
from localdpo.errors import EnvironmentFault, InputError, Interrupted, Problem

__all__ = ["can_open", "open_ui", "run"]

_SMALLEST = (40, 10)


def can_open() -> bool:
    """Tell whether both ends are a terminal, so that a bare `localdpo` opens the UI instead of printing help."""
    return sys.stdin.isatty() and is_live(sys.stdout)


def run(folder: Path) -> int:
    """Open the UI on `folder`; return the exit code, what went wrong having been said on standard error."""
    try:
        open_ui(folder)
    except Exception as error:
        from localdpo.console.failures import report

        return report(error)
    return 0


def open_ui(folder: Path, place: str | None = None, link: Mapping[str, Any] | None = None) -> None:
    """Run the UI on `folder` until the user leaves.

    Raises `InputError` when `folder` is not a folder, `EnvironmentFault` when this is no terminal that can show
    it, `Interrupted` when a signal ended it, and what ended the UI when it was a fault.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(Problem(str(folder), "this is a file", "Name a folder: localdpo tui FOLDER"))
    if not folder.exists():
        raise InputError(Problem(str(folder), "there is no such folder", f"Make it with `localdpo init {folder}`"))
    _require_terminal()
    from localdpo_tui.app import LocalDPOApp

    app = LocalDPOApp(folder, place=place, link=link)
    terminals = OpenTerminals()
    app.run()
    # The guard of a signalled end: it must not go off while Python tidies up, with its handler gone.
    signal.setitimer(signal.ITIMER_REAL, 0)
    terminals.let_go()  # of a window that was closed: what is said to it now would be an error
    if app.failure is not None:
        raise app.failure
    code = app.return_code or 0
    if code > 128:
        raise Interrupted(signal_number=code - 128)
    if code:
        raise SystemExit(code)


def _require_terminal() -> None:
    commands = "Everything works without it too: see `localdpo --help`"
    if not can_open():
        kind = os.environ.get("TERM", "")
        why = (
            f"the terminal type is {kind or 'not set'}"
            if sys.stdout.isatty() and sys.stdin.isatty()
            else "input and output must both be a terminal"
        )
        raise EnvironmentFault(Problem("", f"The terminal UI cannot open here: {why}", commands))
    size = os.get_terminal_size(sys.stdout.fileno())
    # A size of 0 is a terminal that does not say; Textual assumes 80x24 then.
    if 0 < size.columns < _SMALLEST[0] or 0 < size.lines < _SMALLEST[1]:
        message = f"The terminal is {size.columns}x{size.lines}, and the terminal UI needs 40x10"
        raise EnvironmentFault(Problem("", message, f"Make the window larger. {commands}"))
