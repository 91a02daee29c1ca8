"""Jump: a letter on everything that takes the focus; pressing it goes there."""

from __future__ import annotations

from string import ascii_lowercase
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.events import Key
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Label

from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.screens.modal import Modal

__all__ = ["JumpScreen"]


class JumpScreen(Modal[None]):
    """Lies over `below` and shows the letters; any other key closes it."""

    CSS_PATH = "jump.tcss"
    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "jump", Action("jump.close", "escape", "Close", "Stay where you are.")
    )
    BINDINGS = bindings(ACTIONS)

    def __init__(self, below: Screen[Any]) -> None:
        super().__init__()
        shown = [widget for widget in below.focus_chain if widget.region.area and widget.is_on_screen]
        self._targets: dict[str, Widget] = dict(zip(ascii_lowercase, shown, strict=False))

    def compose(self) -> ComposeResult:
        """Put each letter at the corner of its widget."""
        for letter, widget in self._targets.items():
            label = Label(f" {letter} ", markup=False)
            label.styles.offset = (widget.region.x + 1, widget.region.y)
            yield label

    def on_key(self, event: Key) -> None:
        """Go to the widget with this letter."""
        event.stop()
        target = self._targets.get(event.key)
        self.dismiss()
        if target is not None:
            target.screen.set_focus(target)

    def action_close(self) -> None:
        """Close."""
        self.dismiss()
