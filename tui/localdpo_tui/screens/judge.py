"""Two answers without names, one key a verdict: what ranking candidates and blind A/B look like.

It shows what a `Judging` has to judge and passes verdicts on, each written to disk on a thread of its own. It
knows neither models nor pairs. A verdict given while the one before is being written counts for nothing: nobody
has seen the answers that it would be about.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from textual import work
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Static

from localdpo.data.fields import Message
from localdpo.errors import LocalDPOError
from localdpo.evaluate.blind import Choice, Shown
from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.shown import inert, one_line
from localdpo_tui.widgets.footer import FooterLine

if TYPE_CHECKING:
    from localdpo_tui.app import LocalDPOApp

__all__ = ["JudgeScreen", "Judging", "conversation"]


class Judging(Protocol):
    """What is judged. `judge` and `undo` may touch the disk and raise LocalDPOError."""

    title: str

    def current(self) -> Shown | None:
        """The answers to judge now, None when there are none (yet)."""
        ...

    def judge(self, choice: Choice) -> None:
        """Take the verdict on `current`."""
        ...

    def undo(self) -> bool:
        """Take the latest verdict back; False when there is none."""
        ...

    def position(self) -> str:
        """Where we are, in words: `3 of 10 judged`."""
        ...

    def result(self) -> str:
        """What the verdicts say so far, without giving away what is judged now."""
        ...

    def waiting(self) -> str:
        """Why there is nothing to judge: what comes, or that it is done and what to do next."""
        ...


def conversation(prompt: Sequence[Message]) -> Content:
    """A prompt as text: the last turn alone, or each turn with its role."""
    if len(prompt) == 1:
        return inert(prompt[0]["content"])
    parts = [Content.assemble((f"{one_line(turn['role'])}: ", "bold"), inert(turn["content"])) for turn in prompt]
    return Content("\n").join(parts)


class JudgeScreen(Screen[None]):
    """Judge blind; closed with Esc at any time, as every verdict is kept."""

    HELP = """Two answers to the same prompt, in an order nobody knows. Say which is better; every verdict is kept at
    once, and next time you go on where you were."""
    CSS_PATH = "judge.tcss"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]  # noqa: RUF012 - Textual declares the type
    AUTO_FOCUS = None
    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "judge",
        Action("judge.first", "1", "First better", "The first answer is better.", "Judge"),
        Action("judge.second", "2", "Second better", "The second answer is better.", "Judge"),
        Action("judge.tie", "t,3", "Tie", "Both are as good, or as bad.", "Judge"),
        Action("judge.skip", "s", "Skip", "Say nothing about these two.", "Judge"),
        Action("judge.undo", "u,ctrl+z", "Undo", "Take the latest verdict back and see those answers again.", "Judge"),
        Action("judge.scroll_down", "down,pagedown,space", "Scroll", "Read on in both answers.", "Judge", footer=False),
        Action("judge.scroll_up", "up,pageup", "Scroll back", "Read back in both answers.", "Judge", footer=False),
        Action("judge.close", "escape,q", "Close", "Leave; the verdicts are kept.", "Judge"),
    )
    BINDINGS = bindings(ACTIONS)

    if TYPE_CHECKING:
        app: LocalDPOApp

    def __init__(self, judging: Judging) -> None:
        super().__init__()
        self.judging = judging
        self._busy = False

    def compose(self) -> ComposeResult:
        """Lay out the prompt above the two answers."""
        yield Static(inert(self.judging.title), id="judge-title")
        with VerticalScroll(classes="pane", id="judge-prompt", can_focus=False) as prompt:
            prompt.border_title = "Prompt"
            yield Static(id="judge-prompt-text")
        with Horizontal(id="judge-answers"):
            for number, name in enumerate(("first", "second"), 1):
                with VerticalScroll(classes="pane", id=f"judge-{name}", can_focus=False) as pane:
                    pane.border_title = Content(f"{number}")
                    yield Static(id=f"judge-{name}-text")
        with Vertical(id="judge-empty", classes="empty"):
            yield Static(id="judge-waiting")
        yield Static(id="judge-result")
        yield FooterLine()

    def on_mount(self) -> None:
        """Show the first."""
        self.show_current()

    def show_current(self) -> None:
        """Show what is to be judged now. Called again whenever more has come."""
        shown = self.judging.current()
        self.set_class(shown is None, "-nothing")
        for name, text in (("first", shown.first), ("second", shown.second)) if shown else ():
            self.query_one(f"#judge-{name}-text", Static).update(inert(text))
            self.query_one(f"#judge-{name}", VerticalScroll).scroll_home(animate=False)
        if shown is not None:
            self.query_one("#judge-prompt-text", Static).update(conversation(shown.prompt))
        else:
            self.query_one("#judge-waiting", Static).update(inert(self.judging.waiting()))
        self._say()
        self.refresh_bindings()

    def more(self) -> None:
        """More has come, or how it goes has changed: what is being read stays where it is."""
        if self._busy:
            return
        if self.has_class("-nothing"):
            self.show_current()
        else:
            self._say()

    def _say(self) -> None:
        title = Content.assemble(inert(self.judging.title).stylize("bold"), "  ", inert(self.judging.position()))
        self.query_one("#judge-title", Static).update(title)
        self.query_one("#judge-result", Static).update(inert(self.judging.result()))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Grey out verdicts while there is nothing to judge."""
        if action in ("first", "second", "tie", "skip") and self.is_mounted and self.judging.current() is None:
            return None
        return True

    @work(exclusive=False, group="verdict")
    async def _verdict(self, choice: Choice | None) -> None:
        """Give a verdict, or (None) take the latest back."""
        if self._busy:
            return
        self._busy = True
        try:
            if choice is not None:
                await asyncio.to_thread(self.judging.judge, choice)
            elif not await asyncio.to_thread(self.judging.undo):
                self.app.tell("There is no verdict to take back.")
        except LocalDPOError as error:
            self.app.notify_problem(error)
        finally:
            self._busy = False
        self.show_current()

    def action_first(self) -> None:
        """The first is better."""
        self._verdict("first")

    def action_second(self) -> None:
        """The second is better."""
        self._verdict("second")

    def action_tie(self) -> None:
        """Neither is better."""
        self._verdict("tie")

    def action_skip(self) -> None:
        """No verdict on these."""
        self._verdict("skip")

    def action_undo(self) -> None:
        """Take the latest verdict back."""
        self._verdict(None)

    def action_scroll_down(self) -> None:
        """Scroll both answers down by half of what is seen."""
        self._scroll(1)

    def action_scroll_up(self) -> None:
        """Scroll both answers up."""
        self._scroll(-1)

    def _scroll(self, way: int) -> None:
        for name in ("first", "second"):
            pane = self.query_one(f"#judge-{name}", VerticalScroll)
            pane.scroll_relative(y=way * max(1, pane.size.height // 2), animate=False)

    def action_close(self) -> None:
        """Leave."""
        self.dismiss()
