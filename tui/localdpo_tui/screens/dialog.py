"""A question with a few answers. Arrow keys, the answer's first letter or a click choose; Esc is no answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.events import Key
from textual.widgets import Button, Static

from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.screens.modal import Modal
from localdpo_tui.shown import inert, one_line

__all__ = ["Dialog"]


class Dialog(Modal[str | None]):
    """Ask; dismissed with the key of the choice, or None."""

    CSS_PATH = "dialog.tcss"
    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "dialog",
        Action("dialog.cancel", "escape", "Cancel", "Close without choosing."),
        Action("dialog.next", "right,down", "Next", "The next answer.", footer=False),
        Action("dialog.previous", "left,up", "Previous", "The answer before.", footer=False),
    )
    BINDINGS = bindings(ACTIONS)

    def __init__(self, title: str, text: str, choices: Mapping[str, str], danger: str = "") -> None:
        super().__init__()
        self._title, self._text, self._choices, self._danger = title, text, dict(choices), danger

    def compose(self) -> ComposeResult:
        """Lay out the question above its answers."""
        with Vertical(classes="box") as box:
            box.border_title = Content(one_line(self._title))
            with VerticalScroll(can_focus=False):
                yield Static(inert(self._text))
            with Horizontal():
                for key, label in self._choices.items():
                    yield Button(
                        inert(label),
                        id=f"choice-{key}",
                        variant="error" if key == self._danger else "default",
                        compact=True,
                    )

    @on(Button.Pressed)
    def _chosen(self, event: Button.Pressed) -> None:
        self.dismiss((event.button.id or "").removeprefix("choice-"))

    def on_key(self, event: Key) -> None:
        """Choose by the first letter, where only one answer has it."""
        found = [key for key, label in self._choices.items() if label[:1].lower() == event.character]
        if len(found) == 1:
            event.stop()
            self.dismiss(found[0])

    def action_cancel(self) -> None:
        """Give no answer."""
        self.dismiss(None)

    def action_next(self) -> None:
        """Move to the next answer."""
        self.focus_next(Button)

    def action_previous(self) -> None:
        """Move to the answer before."""
        self.focus_previous(Button)
