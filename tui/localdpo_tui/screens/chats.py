"""Find an earlier chat: a list, newest first, narrowed by words that were said in it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.screens.modal import ReadingModal
from localdpo_tui.services.chats import matching
from localdpo_tui.services.conversation import Chat
from localdpo_tui.shown import one_line
from localdpo_tui.widgets.safe_input import SafeInput

__all__ = ["ChatsScreen"]

SHOWN = 200


class ChatsScreen(ReadingModal[Chat | None]):
    """Dismissed with the chosen chat, or None."""

    HELP = "Type words that were said in the chat; the arrows choose, Enter opens, Esc leaves."
    DEFAULT_CSS = "ChatsScreen OptionList { height: auto; max-height: 16; border: none; margin-top: 1; }"
    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "chats",
        Action("chats.open", "enter", "Open", "Open the marked chat."),
        Action("chats.down", "down", "Down", "The next chat.", footer=False),
        Action("chats.up", "up", "Up", "The chat before.", footer=False),
        Action("chats.cancel", "escape", "Cancel", "Stay in this chat."),
    )
    BINDINGS = bindings(ACTIONS)

    def __init__(self, chats: Sequence[Chat]) -> None:
        super().__init__()
        self._chats = [chat for chat in chats if chat.turns]
        self._found = self._chats

    def compose(self) -> ComposeResult:
        """Put the words above the list."""
        with Vertical(classes="box") as box:
            box.border_title = "Chats"
            box.border_subtitle = "Enter opens, Esc cancels"
            yield SafeInput(placeholder="words that were said", compact=True, id="chats-words")
            yield OptionList(id="chats-list")
            yield Static("No chat has all of these words." if self._chats else "There is no chat yet.", id="chats-none")

    def on_mount(self) -> None:
        """Show all."""
        self._list()
        self.query_one(Input).focus()

    def _list(self) -> None:
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options(Option(Content(_line(chat))) for chat in self._found[:SHOWN])
        options.highlighted = 0 if self._found else None
        options.display = bool(self._found)
        self.query_one("#chats-none", Static).display = not self._found

    @on(Input.Changed)
    @work(exclusive=True)
    async def _search(self, event: Input.Changed) -> None:
        self._found = await asyncio.to_thread(matching, self._chats, event.value)
        self._list()

    @on(Input.Submitted)
    @on(OptionList.OptionSelected)
    def _clicked(self) -> None:
        self.action_open()

    def action_open(self) -> None:
        """Open the marked chat."""
        number = self.query_one(OptionList).highlighted
        if number is not None:
            self.dismiss(self._found[number])

    def action_down(self) -> None:
        """Mark the next chat."""
        self.query_one(OptionList).action_cursor_down()

    def action_up(self) -> None:
        """Mark the chat before."""
        self.query_one(OptionList).action_cursor_up()

    def action_cancel(self) -> None:
        """Choose none."""
        self.dismiss(None)


def _line(chat: Chat) -> str:
    day = one_line(chat.started[:16].replace("T", " "))
    turns = f"{len(chat.turns)} {'turn' if len(chat.turns) == 1 else 'turns'}"
    run = f" · {one_line(chat.run)}" if chat.run else ""
    return f"{day}  {one_line(chat.title, 60)}  ({turns}{run})"
