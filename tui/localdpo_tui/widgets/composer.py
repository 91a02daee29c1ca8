"""Where a message is written: Enter sends, Ctrl+J makes a new line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from textual.events import Key
from textual.message import Message

from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.widgets.editor import SafeTextArea

__all__ = ["Composer"]

NEWLINE = ("ctrl+j", "alt+enter", "shift+enter")


class Composer(SafeTextArea):
    """A text that grows to a few lines and is sent with Enter."""

    HELP = """Write your message here. Enter sends it, Ctrl+J (or Alt+Enter) begins a new line, Up in the empty line
    brings the last message back to change it."""

    @dataclass
    class Sent(Message):
        """The text is to be sent."""

        text: str

    class Recall(Message):
        """The last message is wanted back."""

    class Leave(Message):
        """Esc was pressed."""

    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "composer",
        Action("composer.send", "enter", "Send", "Send the message.", "Chat"),
        Action(
            "composer.newline",
            ",".join(NEWLINE),
            "New line",
            "Begin a new line.",
            "Chat",
            footer=False,
        ),
        Action("composer.leave", "escape", "Stop", "Stop the answer; twice: empty the line.", "Chat"),
        Action("composer.recall", "up", "Last message", "Bring the last message back.", "Chat", footer=False),
    )
    BINDINGS = bindings(ACTIONS)

    async def _on_key(self, event: Key) -> None:
        # Not by priority bindings: those are obeyed before letters typed just before have arrived.
        if event.key in ("enter", *NEWLINE):
            event.stop()
            event.prevent_default()
            self.action_send() if event.key == "enter" else self.action_newline()

    def action_send(self) -> None:
        """Send what was written."""
        if self.raw.strip():
            self.post_message(self.Sent(self.raw.strip()))

    def action_newline(self) -> None:
        """Begin a new line."""
        self.insert("\n")

    def action_leave(self) -> None:
        """Stop the answer, or leave the text."""
        self.post_message(self.Leave())

    def action_recall(self) -> None:
        """Bring the last message back when nothing is written, else move up."""
        if self.text:
            self.action_cursor_up()
        else:
            self.post_message(self.Recall())
