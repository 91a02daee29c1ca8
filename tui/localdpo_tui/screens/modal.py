"""A modal screen that reads on a thread what it shows."""

from __future__ import annotations

from typing import TypeVar

from textual.await_complete import AwaitComplete
from textual.screen import ModalScreen

__all__ = ["ReadingModal"]

Result = TypeVar("Result")


class ReadingModal(ModalScreen[Result]):
    """Closing it ends its workers first, which would look for widgets that are no longer there."""

    def dismiss(self, result: Result | None = None) -> AwaitComplete:
        """Close with `result`."""
        self.workers.cancel_node(self)
        return super().dismiss(result)
