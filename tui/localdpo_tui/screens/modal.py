"""Modal screens that close once, however many keys that close them are under way; and those that read on a thread."""

from __future__ import annotations

from typing import TypeVar

from textual.await_complete import AwaitComplete
from textual.screen import ModalScreen

__all__ = ["Modal", "ReadingModal"]

Result = TypeVar("Result")


class Modal(ModalScreen[Result]):
    """A dialog. Textual's own, told twice to close, takes away whatever lies below it too."""

    def dismiss(self, result: Result | None = None) -> AwaitComplete:
        """Close with `result`; nothing when it is closed already, or lies below another."""
        return super().dismiss(result) if self.is_active else AwaitComplete()


class ReadingModal(Modal[Result]):
    """Closing it ends its workers first, which would look for widgets that are no longer there."""

    def dismiss(self, result: Result | None = None) -> AwaitComplete:
        """Close with `result`."""
        if self.is_active:
            self.workers.cancel_node(self)
        return super().dismiss(result)
