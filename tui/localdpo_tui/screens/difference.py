"""Both answers as one text: what only one of them has stands in brackets with a sign, so colour is not needed."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from localdpo.data.worddiff import Piece, merged
from localdpo.text import sanitise
from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.screens.modal import ReadingModal

__all__ = ["DifferenceScreen"]

_LOOKS = {"first": ("[+", "+]", "bold underline $text-success"), "second": ("[-", "-]", "strike $text-error")}


class DifferenceScreen(ReadingModal[None]):
    """Opened over the editor; Esc closes it."""

    CSS_PATH = "difference.tcss"
    HELP = "[+words+] are only in the chosen answer, [-words-] only in the rejected one."
    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "difference", Action("difference.close", "escape,v,f10", "Close", "Back to the pair.")
    )
    BINDINGS = bindings(ACTIONS)

    def __init__(self, chosen: str, rejected: str) -> None:
        super().__init__()
        self._texts = chosen, rejected

    def compose(self) -> ComposeResult:
        """A scroll with the text; the words are compared once it is on the screen."""
        with VerticalScroll(classes="box") as box:
            box.border_title = "Chosen and rejected as one text"
            box.border_subtitle = "[+only chosen+]  [-only rejected-]  Esc closes"
            yield Static("…", id="merged", markup=False)

    def on_mount(self) -> None:
        """Compare on a thread."""
        self.query_one(VerticalScroll).focus()
        self.run_worker(self._compare())

    async def _compare(self) -> None:
        pieces = await asyncio.to_thread(merged, *self._texts)
        shown = Content.assemble(*(_styled(piece) for piece in pieces))
        self.query_one("#merged", Static).update(shown if pieces else Content("Both answers are blank."))

    def action_close(self) -> None:
        """Close."""
        self.dismiss()


def _styled(piece: Piece) -> tuple[str, str]:
    if piece.side == "both":
        return sanitise(piece.text), ""
    opens, closes, style = _LOOKS[piece.side]
    return f"{opens}{sanitise(piece.text)}{closes}", style
