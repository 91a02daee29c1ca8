"""An answer of the model beside a copy to edit: the copy becomes chosen, the answer rejected.

Candidates and replies in a chat become pairs here. It makes the pair and names the file it is for; writing it
is the caller's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Input, Select, Static

from localdpo.data.rows import PairDraft
from localdpo.errors import EnvironmentFault, InputError
from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.screens.judge import conversation
from localdpo_tui.services.candidates import corrected_pair
from localdpo_tui.services.correction import Correction, CorrectionDraft
from localdpo_tui.shown import inert, one_line
from localdpo_tui.widgets.editor import SafeTextArea
from localdpo_tui.widgets.footer import FooterLine
from localdpo_tui.widgets.safe_input import SafeInput

if TYPE_CHECKING:
    from localdpo_tui.app import LocalDPOApp

__all__ = ["CorrectScreen", "MadePair"]


DRAFT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class MadePair:
    """A pair and the file it goes into."""

    draft: PairDraft
    file: Path


class CorrectScreen(Screen[MadePair | None]):
    """Edit the copy; dismissed with the pair, or None."""

    HELP = """The model's answer is on the left (above, in a narrow window) and becomes the rejected one. Change the
    copy beside it into what the model should have said: it becomes the chosen one. The pair remembers where the
    answer came from."""
    CSS_PATH = "correct.tcss"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]  # noqa: RUF012 - Textual declares the type
    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "correct",
        Action("correct.save", "ctrl+s", "Save pair", "Add the pair to the file.", "Correct"),
        Action("correct.restart", "ctrl+r", "Start over", "Make the copy the model's answer again.", "Correct"),
        Action("correct.cancel", "escape", "Cancel", "Close without a pair.", "Correct"),
    )
    BINDINGS = bindings(ACTIONS)

    if TYPE_CHECKING:
        app: LocalDPOApp

    def __init__(self, correction: Correction, files: Sequence[Path], folder: Path) -> None:
        """`files` are those to choose from, the first is the default; `folder` is what names are relative to."""
        super().__init__()
        self._correction = correction
        self._files = list(files)
        self._folder = folder
        self._draft = CorrectionDraft(folder, correction)
        self._kept: str | None = None
        self._waiting: Timer | None = None

    def compose(self) -> ComposeResult:
        """Lay out prompt, answer, copy, and where the pair goes."""
        with Vertical(id="correct-body"):
            with VerticalScroll(classes="pane", id="correct-prompt", can_focus=False) as prompt:
                prompt.border_title = "Prompt"
                yield Static(conversation(self._correction.prompt))
            with Horizontal(id="correct-answers"):
                with VerticalScroll(classes="pane", id="correct-rejected") as rejected:
                    rejected.border_title = "The model said (rejected)"
                    yield Static(inert(self._correction.answer))
                copy = SafeTextArea(self._correction.answer, classes="pane", id="correct-chosen")
                copy.border_title = "It should say (chosen)"
                yield copy
            with Horizontal(id="correct-where"):
                yield Static("Into ", classes="muted")
                options = [
                    (Content(one_line(self._shown_name(file))), number) for number, file in enumerate(self._files)
                ]
                yield Select(options, value=0, allow_blank=False, compact=True, id="correct-file")
                yield Static(" Tags ", classes="muted")
                yield SafeInput(", ".join(self._correction.tags), placeholder="none", compact=True, id="correct-tags")
        yield FooterLine()

    def _shown_name(self, file: Path) -> str:
        return str(file.relative_to(self._folder) if file.is_relative_to(self._folder) else file)

    def on_mount(self) -> None:
        """Start writing at once, where an earlier session was cut off if one was."""
        copy = self.query_one(SafeTextArea)
        copy.focus()
        copy.move_cursor(copy.document.end)
        self._restore()

    @work
    async def _restore(self) -> None:
        copy = self.query_one(SafeTextArea)
        text = await asyncio.to_thread(self._draft.read)
        if text is not None and copy.raw == self._correction.answer:
            copy.replace(text, copy.document.start, copy.document.end)
            self.app.tell("Here is what you wrote last time. Ctrl+R starts over.")

    @on(SafeTextArea.Changed)
    def _typed(self) -> None:
        if self._waiting is not None:
            self._waiting.stop()
        self._waiting = self.set_timer(DRAFT_SECONDS, self._keep)

    @work(exclusive=True, group="draft")
    async def _keep(self) -> None:
        text = self.query_one(SafeTextArea).raw
        if text != self._kept:
            self._kept = text
            with suppress(EnvironmentFault):  # saving the pair will say so
                await asyncio.to_thread(self._draft.write, text)

    async def _close(self, made: MadePair | None) -> None:
        if self._waiting is not None:
            self._waiting.stop()
        self.workers.cancel_group(self, "draft")
        await asyncio.to_thread(self._draft.drop)
        self.dismiss(made)

    async def action_save(self) -> None:
        """Make the pair and close, or say what is missing."""
        tags = [tag.strip() for tag in self.query_one("#correct-tags", Input).value.split(",") if tag.strip()]
        try:
            draft = corrected_pair(
                self._correction.prompt,
                self._correction.answer,
                self.query_one(SafeTextArea).raw,
                self._correction.origin,
                how=self._correction.how,
                tags=tags,
            )
        except InputError as error:
            self.app.notify_problem(error, "warning")
            return
        chosen = self.query_one("#correct-file", Select).value
        await self._close(MadePair(draft, self._files[chosen if isinstance(chosen, int) else 0]))

    def action_restart(self) -> None:
        """Take the edits back, all at once; Ctrl+Z brings them back."""
        copy = self.query_one(SafeTextArea)
        copy.replace(self._correction.answer, copy.document.start, copy.document.end)

    @work
    async def action_cancel(self) -> None:
        """Close, asking first when something was written."""
        if self.query_one(SafeTextArea).raw != self._correction.answer:
            choices = {"stay": "Go on editing", "drop": "Drop it"}
            text = "What you wrote here is not saved."
            if await self.app.ask("Drop this correction?", text, choices, danger="drop") != "drop":
                return
        await self._close(None)
