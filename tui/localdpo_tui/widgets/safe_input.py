"""A line of input that control characters cannot leave: pasted or read from a file, they become visible signs.

Textual draws the value of an `Input` as it is, so an escape sequence in it would reach the terminal.
"""

from __future__ import annotations

from textual.events import Paste
from textual.widgets import Input

from localdpo.text import line_ends
from localdpo_tui.standin import signs
from localdpo_tui.terminal_input import Typed

__all__ = ["SafeInput"]


class SafeInput(Input):
    """An `Input` whose value never holds a character that must not be shown, one sign for each."""

    def validate_value(self, value: str) -> str:
        """Replace what must not reach the terminal."""
        return signs(value)

    def replace(self, text: str, start: int, end: int) -> None:
        """Put text in the place of a stretch, several lines as one: blanks stand between them."""
        super().replace(" ".join(line_ends(text).strip("\n").split("\n")), start, end)

    def _on_paste(self, event: Paste) -> None:
        event.prevent_default()  # Textual keeps the first line only
        event.stop()
        self.replace(event.text, *self.selection)

    def _on_typed(self, event: Typed) -> None:
        self._restart_blink()
        self.replace(event.text, *self.selection)
