"""Help for where the user is: what the focused widget and the screen are for, and every key that works there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content
from textual.dom import DOMNode
from textual.screen import Screen
from textual.widgets import Static

from localdpo_tui.actions import Action, available, bindings, register
from localdpo_tui.screens.modal import Modal
from localdpo_tui.shown import fit

__all__ = ["HelpScreen"]


class HelpScreen(Modal[None]):
    """Opened with F1 over `about`; F1 or Esc closes it."""

    CSS_PATH = "help.tcss"
    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "help", Action("help.close", "escape,q", "Close", "Back to where you were.")
    )
    BINDINGS = bindings(ACTIONS)

    def __init__(self, about: Screen[Any]) -> None:
        super().__init__()
        focused = about.focused
        self._chain: list[DOMNode] = list(focused.ancestors_with_self) if focused is not None else [about, about.app]

    def compose(self) -> ComposeResult:
        """Put the help texts above the keys."""
        with VerticalScroll(classes="box") as box:
            box.border_title = "Help"
            box.border_subtitle = "Esc closes"
            yield Static(Content("\n").join(self._lines()))

    def _lines(self) -> Iterator[Content]:
        for node in self._chain:
            text = type(node).__dict__.get("HELP") or getattr(node, "help_text", "")
            if text:
                yield from (Content(" ".join(part.split())) for part in str(text).strip().split("\n\n"))
                yield Content("")
        group = ""
        for _node, action in available(self._chain):
            if action.group != group:
                group = action.group
                yield Content.styled(group, "bold")
            yield Content.assemble(("  " + fit(self._keys(action), 18), "bold"), f" {action.label}: {action.help}")

    def _keys(self, action: Action) -> str:
        keys = action.key.split(",") if action.key else []
        return " ".join(self.app.get_key_display(Binding(key, "")) for key in keys) or "Ctrl+P"

    def action_close(self) -> None:
        """Close."""
        self.dismiss()
