"""Choose one of a list, by arrows, search or click; Esc chooses none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.screens.modal import Modal
from localdpo_tui.shown import one_line

__all__ = ["ChooseScreen"]


class ChooseScreen(Modal[int | None]):
    """Dismissed with the number of the chosen item, or None."""

    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "choose", Action("choose.cancel", "escape", "Cancel", "Close without choosing.")
    )
    BINDINGS = bindings(ACTIONS)
    DEFAULT_CSS = "ChooseScreen OptionList { height: auto; max-height: 16; border: none; }"

    def __init__(self, title: str, items: Sequence[str]) -> None:
        super().__init__()
        self._title, self._items = title, list(items)

    def compose(self) -> ComposeResult:
        """Put the list into a box."""
        with Vertical(classes="box") as box:
            box.border_title = Content(one_line(self._title))
            box.border_subtitle = Content("Enter chooses, Esc cancels")
            yield OptionList(*(Option(Content(one_line(item))) for item in self._items))

    @on(OptionList.OptionSelected)
    def _chosen(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option_index)

    def action_cancel(self) -> None:
        """Choose none."""
        self.dismiss(None)
