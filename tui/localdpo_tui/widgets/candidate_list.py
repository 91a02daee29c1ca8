"""The candidates of one prompt in a list, one of them marked. It knows nothing about where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.services.candidates import Candidate
from localdpo_tui.services.conversation import Reply
from localdpo_tui.widgets.transcript import ReplyView

__all__ = ["CandidateList"]


class CandidateList(VerticalScroll, can_focus=True):
    """The candidates of one prompt, one of them marked, and below them the answer under way."""

    HELP = "The model's answers. The arrows mark one: C corrects it into a pair, D deletes it, R ranks them all."
    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "candidate list",
        Action("candidate_list.down", "down,j", "Down", "The next answer.", "Candidates", footer=False),
        Action("candidate_list.up", "up,k", "Up", "The answer before.", "Candidates", footer=False),
    )
    BINDINGS = bindings(ACTIONS)

    def __init__(self, id: str) -> None:
        super().__init__(id=id)
        self._views: list[tuple[Candidate, ReplyView]] = []
        self._marked = 0
        self.live: ReplyView | None = None

    async def show(self, candidates: Sequence[Candidate], used: set[str], empty: Content) -> None:
        """Show other candidates."""
        self.live = None
        marked = self.marked
        await self.remove_children()
        self._views = [
            (item, ReplyView("tuned", f"{number}{'  made into a pair' if item.id in used else ''}", _reply(item)))
            for number, item in enumerate(candidates, 1)
        ]
        await self.mount(*(view for _, view in self._views) if self._views else (Static(empty, classes="empty"),))
        ids = [item.id for item in candidates]
        self._mark(ids.index(marked.id) if marked is not None and marked.id in ids else 0)

    async def begin(self, number: int) -> None:
        """Make room for an answer that is coming."""
        if not self._views:
            await self.remove_children()
        self.live = ReplyView("tuned", f"{number}", None)
        await self.mount(self.live)
        self.live.scroll_visible(animate=False)

    def _mark(self, number: int) -> None:
        for at, (_, view) in enumerate(self._views):
            view.set_class(at == number, "-selected")
        self._marked = number
        if self._views:
            self._views[number][1].scroll_visible(animate=False)

    @property
    def marked(self) -> Candidate | None:
        """The marked candidate."""
        return self._views[self._marked][0] if self._marked < len(self._views) else None

    def action_down(self) -> None:
        """Mark the next."""
        self._mark(min(self._marked + 1, max(0, len(self._views) - 1)))

    def action_up(self) -> None:
        """Mark the one before."""
        self._mark(max(0, self._marked - 1))


def _reply(candidate: Candidate) -> Reply:
    return Reply(candidate.answer, candidate.origin)
