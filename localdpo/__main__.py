"""The `localdpo` command, and `python -m localdpo`.

`localdpo` and `localdpo tui [FOLDER]` are recognised here: what parses the command line takes a third of the time
in which the terminal UI must be ready.
"""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["main"]


def main() -> None:
    """Open the terminal UI when that is all that was asked for; run the command line otherwise."""
    words = sys.argv[1:]
    if not words or (words[0] == "tui" and len(words) <= 2 and not words[-1].startswith("-")):
        from localdpo.console import ui

        if words or ui.can_open():
            sys.exit(ui.run(Path(words[1] if len(words) == 2 else ".")))
    from localdpo.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
