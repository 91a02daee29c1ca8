"""Hand a text or a file to the user's own editor, with the app out of the way meanwhile."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from textual.app import SuspendNotSupported

from localdpo.errors import InputError, LocalDPOError, Problem
from localdpo.text import line_ends

if TYPE_CHECKING:
    from localdpo_tui.app import LocalDPOApp

__all__ = ["edit_file", "edit_text"]


async def edit_file(app: LocalDPOApp, path: Path) -> bool:
    """Open a file in `$VISUAL` or `$EDITOR`; return whether it was changed. Says itself what goes wrong."""
    before = path.read_bytes() if path.exists() else None
    if not _run(app, path):
        return False
    return path.exists() and path.read_bytes() != before


def edit_text(app: LocalDPOApp, text: str, suffix: str = ".md") -> str | None:
    """Return the text as the user's editor left it; None when that failed, which is said. Nothing else is kept."""
    handle, name = tempfile.mkstemp(prefix="localdpo-", suffix=suffix)
    path = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            file.write(text)
        if not _run(app, path):
            return None
        after = path.read_bytes().decode("utf-8", "replace")
    except (OSError, UnicodeError) as error:
        app.notify_problem(error)
        return None
    finally:
        path.unlink(missing_ok=True)
    if "\r" not in text:
        after = line_ends(after)
    # Editors end a file with a line end; it is the text's own only where it was there before.
    return after if text.endswith("\n") else after.removesuffix("\n").removesuffix("\r")


def _run(app: LocalDPOApp, path: Path) -> bool:
    try:
        command = _command()
        with app.suspend():
            code = subprocess.run([*command, str(path)], check=False).returncode
        if code != 0:
            raise InputError(Problem(command[0], f"ended with code {code}", "The text stays as it was"))
        return True
    except SuspendNotSupported:
        app.notify_problem("This terminal cannot hand over to another program. Edit the text here.")
    except (LocalDPOError, OSError) as error:
        app.notify_problem(error)
    return False


def _command() -> list[str]:
    wanted = os.environ.get("VISUAL") or os.environ.get("EDITOR") or ""
    try:
        command = shlex.split(wanted) or [next(filter(shutil.which, ("nano", "vi")), "")]
    except ValueError:
        command = [wanted]
    if shutil.which(command[0]) is None:
        message = f"{command[0]} is not there" if command[0] else "is not set, and neither nano nor vi is there"
        raise InputError(Problem("$EDITOR", message, "Set EDITOR to a program, such as EDITOR=nano"))
    return command
