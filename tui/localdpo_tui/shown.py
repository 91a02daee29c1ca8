"""Untrusted text made ready for a widget: inert, on one line, cut to a width in terminal cells.

Cells follow Rich's tables: a Chinese character or an emoji takes two, a combining mark none.
"""

from __future__ import annotations

from rich.cells import cell_len, set_cell_size
from textual.content import Content

from localdpo.errors import LocalDPOError, Problem
from localdpo.text import sanitise

__all__ = ["fit", "inert", "one_line", "sentences"]

ELLIPSIS = "…"


def inert(text: str) -> Content:
    """Return text as content that holds no markup and no control characters."""
    return Content(sanitise(text))


def one_line(text: str, limit: int = 500) -> str:
    """Return the first `limit` characters as one safe line; line ends become ⏎, runs of blanks one blank."""
    # Long texts are cut first: a cell never shows more, and rows may hold megabytes.
    return " ".join(sanitise(text[:limit]).replace("\n", " ⏎ ").split())


def fit(text: str, width: int) -> str:
    """Return `text` in exactly `width` cells: padded, or cut with an ellipsis."""
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    return set_cell_size(set_cell_size(text, width - 1).rstrip() + ELLIPSIS, width) if width > 0 else ""


def sentences(problem: LocalDPOError | Problem | str) -> str:
    """Return a problem, or all problems of an error, as sentences that are safe to show."""
    return sanitise(str(problem))
