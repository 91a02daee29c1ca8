"""What the terminal can do, and plain text laid out for it. Knows nothing of models, recipes or runs."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from localdpo.redact import redact
from localdpo.text import sanitise

_BLOCKS = "▁▂▃▄▅▆▇█"


def is_live(stream: TextIO) -> bool:
    """Tell whether ``stream`` is a terminal that understands cursor movement and colour."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb")


def width() -> int:
    """Columns of the terminal; 80 where there is none."""
    return shutil.get_terminal_size((80, 24)).columns


def say(*lines: str, file: TextIO | None = None, flush: bool = False) -> None:
    """Print ``lines`` made inert, on standard output when ``file`` is None."""
    print(*map(sanitise, lines), sep="\n", file=file, flush=flush)


class _InertRecord(logging.LogRecord):
    """A log record whose message steers no terminal and tells no secret: libraries quote what they are given."""

    def getMessage(self) -> str:
        return sanitise(redact(super().getMessage()))


def quieten_libraries() -> None:
    """Make inert what libraries log and warn of, and take secrets out of it, before any of them is loaded."""
    logging.setLogRecordFactory(_InertRecord)
    plain = warnings.formatwarning

    def inert(message: Warning | str, category: type[Warning], *where: object, **more: object) -> str:
        return sanitise(redact(plain(message, category, *where, **more)))  # type: ignore[arg-type]

    warnings.formatwarning = inert


class OpenTerminals:
    """The standard output streams that are terminals now, and may be gone later: a window is closed."""

    def __init__(self) -> None:
        self._open = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def let_go(self) -> bool:
        """Send what is written from now on to a terminal that is gone nowhere; returns whether one is gone."""
        gone = [descriptor for descriptor in self._open if not os.isatty(descriptor)]
        for descriptor in gone:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
            self._open.remove(descriptor)
        return bool(gone)


def tolerate_narrow_encodings() -> None:
    """Print what the terminal's encoding lacks as a backslash escape instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


@contextmanager
def progress_line(what: str, quiet: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """Yield what counts per cent of (done, total) on standard error; None where nobody looks."""
    if quiet or not is_live(sys.stderr):
        yield None
        return
    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        per_cent = 100 * done // total if total else 100
        if per_cent != shown:
            shown = per_cent
            print(f"\r{what} {per_cent} %", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if shown >= 0:
            print(f"\r{' ' * (len(what) + 6)}\r", end="", file=sys.stderr, flush=True)


def columns(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lay ``rows`` out under ``header`` in aligned columns; the columns numbered in ``right`` align right."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = []
    for row in table:
        cells = [cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return lines


def bytes_text(count: float) -> str:
    """``count`` bytes in decimal units, as disks and model hubs give them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def count_text(count: int) -> str:
    """``count`` in three figures: 950, 4.9M, 1.2B."""
    value = float(count)
    for unit in ("", "k", "M"):
        if value < 999.5:
            return f"{value:.0f}{unit}" if value >= 100 or not unit else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f}B"


def duration_text(seconds: float) -> str:
    """``seconds`` as 45 s, 2 min 05 s or 3 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def sparkline(values: Sequence[float], length: int = 24) -> str:
    """The last ``length`` values as a line of block characters, scaled to their own range."""
    tail = list(values)[-length:]
    if not tail:
        return ""
    low, high = min(tail), max(tail)
    span = (high - low) or 1.0
    return "".join(_BLOCKS[min(7, int((value - low) / span * 8))] for value in tail)
