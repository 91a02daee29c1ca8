"""A line of input that control characters cannot leave: pasted or read from a file, they become visible signs.

Textual draws the value of an `Input` as it is, so an escape sequence in it would reach the terminal.
"""

from __future__ import annotations

from textual.widgets import Input

from localdpo_tui.standin import signs

__all__ = ["SafeInput"]


class SafeInput(Input):
    """An `Input` whose value never holds a character that must not be shown, one sign for each."""

    def validate_value(self, value: str) -> str:
        """Replace what must not reach the terminal."""
        return signs(value)
