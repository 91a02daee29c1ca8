"""What was said in a chat: each question above its answers, side by side or, in a narrow window, one below the other.

Text arrives piece by piece and is drawn a few times a second, in plain text: what a model wrote is shown as it
wrote it, since that is what a pair would teach. One reply is selected; keys that concern a reply mean that one.
It knows chats, and nothing about who answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.events import Click
from textual.message import Message as UIMessage
from textual.widgets import Markdown, Static

from localdpo.text import StreamSanitiser, sanitise
from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.services.conversation import Reply, Side, Turn
from localdpo_tui.shown import inert, one_line

__all__ = ["ReplyView", "Transcript", "TurnView"]

SHOWN_TURNS = 60
"""Widgets for more turns than these would make opening an old chat slow; earlier ones are in its file."""

REDRAWS_A_SECOND = 16


class ReplyView(Vertical):
    """One answer and a line about it."""

    ALLOW_SELECT = True

    def __init__(self, side: Side, name: str, reply: Reply | None, markdown: bool = False) -> None:
        super().__init__(classes=f"reply -{side}")
        self.side: Side = side
        self._who = one_line(name)
        self._clean = StreamSanitiser()
        self._text = ""
        self._dirty = False
        self._markdown = markdown
        self._note = ""
        self.reply = reply

    def compose(self) -> ComposeResult:
        """Put who answered above what they said."""
        yield Static(id="reply-head")
        yield Static(id="reply-text")

    def on_mount(self) -> None:
        """Show the reply there is."""
        if self.reply is not None:
            self.finish(self.reply)
        else:
            self.note("waiting")

    def note(self, text: str) -> None:
        """Say beside the name how it goes, such as `18 tok/s`."""
        if text != self._note:
            self._note = text
            head = Content.assemble((self._who, "bold"), (f"  {text}" if text else "", "dim"))
            self.query_one("#reply-head", Static).update(head)

    def feed(self, piece: str) -> None:
        """Take more text; it is drawn with the next `redraw`."""
        self._text += self._clean.feed(piece)
        self._dirty = True

    def redraw(self) -> bool:
        """Draw what has come since the last time; returns whether there was anything."""
        drawn, self._dirty = self._dirty, False
        if drawn:
            self.query_one("#reply-text", Static).update(Content(self._text))
        return drawn

    def finish(self, reply: Reply) -> None:
        """Show the whole reply and what is known of it."""
        self.reply, self._dirty = reply, False
        speed = f"{reply.tokens_per_second:.0f} tok/s" if reply.tokens_per_second else ""
        if not speed and reply.origin is not None and reply.origin.seed is not None:
            speed = f"seed {reply.origin.seed}"
        cut = "cut off at max tokens" if reply.origin is not None and reply.origin.finish == "length" else ""
        self.note(", ".join(part for part in ("stopped" if reply.stopped else cut, speed) if part) or "done")
        self.query_one("#reply-text", Static).update(inert(reply.text) if reply.text else Content("(nothing)"))
        if self._markdown and reply.text:
            self._show_markdown(reply.text)

    def _show_markdown(self, text: str) -> None:
        self.query_one("#reply-text").display = False
        self.mount(Markdown(sanitise(text), open_links=False))

    def fail(self, why: str) -> None:
        """Say why there is no reply."""
        self.note("failed")
        self.query_one("#reply-text", Static).update(inert(why))


class TurnView(Vertical):
    """A question and its answers."""

    def __init__(self, number: int, turn: Turn, names: dict[Side, str], sides: Sequence[Side], markdown: bool) -> None:
        super().__init__(classes="turn")
        self.number = number
        self.replies = {
            side: ReplyView(side, names.get(side, side), turn.replies.get(side), markdown) for side in sides
        }
        self._prompt = turn.prompt

    def compose(self) -> ComposeResult:
        """Put the question above the answers."""
        yield Static(Content.assemble(("you  ", "bold"), inert(self._prompt)), classes="question")
        with Horizontal(classes="replies"):
            yield from self.replies.values()


class Transcript(VerticalScroll, can_focus=True):
    """The turns of a chat, the newest in sight."""

    HELP = """What was said. The marked reply is the one that keys are about: the arrows move the mark, P makes a pair
    of the reply, R asks again, E asks something else in place of its question, C copies it."""

    @dataclass
    class Wanted(UIMessage):
        """Something is to be done with the selected reply: `what` is pair, again, edit or copy."""

        what: str

    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "transcript",
        Action("transcript.pair", "p", "Pair", "Make a pair: an edited copy of this reply over the reply.", "Chat"),
        Action("transcript.again", "r", "Again", "Ask the last question again.", "Chat"),
        Action("transcript.edit", "e", "Edit", "Change this question and send it anew, in a new chat.", "Chat"),
        Action("transcript.copy", "c", "Copy", "Copy this reply.", "Chat"),
        Action("transcript.up", "up,k", "Turn before", "Mark the reply of the turn before.", "Chat", footer=False),
        Action("transcript.down", "down,j", "Turn after", "Mark the reply of the next turn.", "Chat", footer=False),
        Action("transcript.other", "left,right", "Other side", "Mark the other reply.", "Chat", footer=False),
    )
    BINDINGS = bindings(ACTIONS)

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._turns: list[TurnView] = []
        self._selected: ReplyView | None = None
        self.names: dict[Side, str] = {}
        self.markdown = False

    async def show(self, turns: Sequence[Turn], empty: Content) -> None:
        """Show another chat; `empty` is said when it has no turns."""
        self._turns, self._selected = [], None
        await self.remove_children()
        if not turns:
            await self.mount(Static(empty, classes="empty"))
            return
        hidden = max(0, len(turns) - SHOWN_TURNS)
        views = [
            TurnView(number, turn, self.names, [*turn.replies], self.markdown)
            for number, turn in enumerate(turns)
            if number >= hidden
        ]
        self._turns = views
        note = [Static(f"{hidden} earlier turns are not shown", classes="muted")] if hidden else []
        await self.mount(*note, *views)
        self._select(self._last_reply())
        self.scroll_end(animate=False)

    async def add(self, number: int, turn: Turn, sides: Sequence[Side]) -> dict[Side, ReplyView]:
        """Add a turn whose answers are to come; returns where they go."""
        if not self._turns:
            await self.remove_children()
        view = TurnView(number, turn, self.names, sides, self.markdown)
        self._turns.append(view)
        await self.mount(view)
        self._select(self._last_reply())
        self.scroll_end(animate=False)
        return view.replies

    async def drop_last(self) -> None:
        """Remove the last turn, as it is asked again or could not be."""
        if self._turns:
            await self._turns.pop().remove()
        self._select(self._last_reply())

    def redraw(self) -> None:
        """Draw what has come for the last turn; who reads its end goes on reading its end."""
        if self._turns:
            # Textual's own anchor pushes contents that are shorter than the view to its bottom.
            at_end = self.scroll_y >= self.max_scroll_y - 1
            if any([view.redraw() for view in self._turns[-1].replies.values()]) and at_end:
                self.scroll_end(animate=False)

    @property
    def selected(self) -> tuple[int, Side] | None:
        """The turn and side of the selected reply, None when there is none."""
        if self._selected is None:
            return None
        turn = next((view for view in self._turns if self._selected in view.replies.values()), None)
        return (turn.number, self._selected.side) if turn is not None else None

    def _last_reply(self) -> ReplyView | None:
        for turn in reversed(self._turns):
            if turn.replies:
                return list(turn.replies.values())[-1]
        return None

    def _select(self, view: ReplyView | None) -> None:
        if self._selected is not None:
            self._selected.remove_class("-selected")
        self._selected = view
        if view is not None:
            view.add_class("-selected")

    @on(Click)
    def _clicked(self, event: Click) -> None:
        view = (
            next((node for node in event.widget.ancestors_with_self if isinstance(node, ReplyView)), None)
            if (event.widget is not None)
            else None
        )
        if view is not None:
            self._select(view)

    def _move(self, way: int) -> None:
        with_replies = [turn for turn in self._turns if turn.replies]
        here = next((n for n, turn in enumerate(with_replies) if self._selected in turn.replies.values()), None)
        if here is None or not 0 <= here + way < len(with_replies):
            (self.scroll_up if way < 0 else self.scroll_down)(animate=False)
            return
        turn = with_replies[here + way]
        side = self._selected.side if self._selected is not None else "tuned"
        self._select(turn.replies.get(side) or next(iter(turn.replies.values())))
        turn.scroll_visible(animate=False, top=way < 0)

    def action_up(self) -> None:
        """Mark a reply of the turn before."""
        self._move(-1)

    def action_down(self) -> None:
        """Mark a reply of the next turn."""
        self._move(1)

    def action_other(self) -> None:
        """Mark the other side's reply."""
        for turn in self._turns:
            if self._selected in turn.replies.values() and len(turn.replies) == 2:
                self._select(next(view for view in turn.replies.values() if view is not self._selected))
                return

    def action_pair(self) -> None:
        """Make a pair of the selected reply."""
        self.post_message(self.Wanted("pair"))

    def action_again(self) -> None:
        """Ask again."""
        self.post_message(self.Wanted("again"))

    def action_edit(self) -> None:
        """Ask something else in place of this turn's question."""
        self.post_message(self.Wanted("edit"))

    def action_copy(self) -> None:
        """Copy the reply."""
        self.post_message(self.Wanted("copy"))
