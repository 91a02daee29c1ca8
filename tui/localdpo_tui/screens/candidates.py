"""Candidates on a screen: let the model answer prompts, then correct its answers or rank them.

Opened over the Pairs place for the marked prompts; prompts that have candidates from another day are there too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Input, OptionList, Select, Static
from textual.widgets.option_list import Option

from localdpo.data.fields import Message
from localdpo.data.pairs import prompt_key
from localdpo.errors import LocalDPOError
from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.screens.judge import JudgeScreen, conversation
from localdpo_tui.services.answering import DEFAULT_MODEL, Answering, Target, find_target, tuned_runs
from localdpo_tui.services.candidates import (
    CandidateStore,
    Order,
    Progress,
    candidates_file,
    generate,
    ranking_file,
)
from localdpo_tui.services.correction import Correction
from localdpo_tui.services.pair_recipe import limits_for
from localdpo_tui.services.pairfile import add_pairs
from localdpo_tui.services.ranking import Ranking
from localdpo_tui.shown import fit, one_line
from localdpo_tui.widgets.candidate_list import CandidateList
from localdpo_tui.widgets.footer import FooterLine
from localdpo_tui.widgets.sampling import SamplingForm
from localdpo_tui.widgets.transcript import REDRAWS_A_SECOND

if TYPE_CHECKING:
    from localdpo_tui.app import LocalDPOApp

__all__ = ["CandidatesScreen", "open_ranking"]

SHOWN_PROMPTS = 1000
_UNREAD = "/"  # no run's name: the runs are not read yet
_DEFAULTS = {"count": 2, "temperature": 0.8, "top_p": 0.95, "max_tokens": 256, "seed": 0}


class CandidatesScreen(Screen[None]):
    """Generate, correct, rank; closed with Esc."""

    HELP = """Let the model answer these prompts a few times. Where an answer is wrong, C takes it as rejected and lets
    you edit a copy into the chosen one. Where two differ, R shows them without names and the better one becomes
    chosen. A temperature around 0.8 makes answers differ; every answer remembers how it was made."""
    CSS_PATH = "candidates.tcss"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]  # noqa: RUF012 - Textual declares the type
    AUTO_FOCUS = None
    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "candidates",
        Action("candidates.generate", "g,ctrl+g", "Generate", "Let the model answer every prompt.", "Candidates"),
        Action("candidates.one", "o", "This prompt", "Let the model answer this prompt alone.", "Candidates"),
        Action(
            "candidates.correct", "c,enter", "Correct", "Edit a copy of this answer into the better one.", "Candidates"
        ),
        Action("candidates.rank", "r,ctrl+r", "Rank", "Judge the answers two by two, unnamed.", "Candidates"),
        Action("candidates.fields", "n", "How many", "Change how many answers, and how freely.", "Candidates"),
        Action("candidates.delete", "d,delete", "Delete", "Delete this answer.", "Candidates", footer=False),
        Action("candidates.close", "escape", "Stop, close", "Stop generating, or go back.", "Candidates"),
    )
    BINDINGS = bindings(ACTIONS)

    if TYPE_CHECKING:
        app: LocalDPOApp

    def __init__(self, pairs: Path, prompts: Sequence[tuple[Message, ...]], start: bool = False) -> None:
        """`pairs` is the file that pairs go into, `prompts` those to answer; `start` begins at once."""
        super().__init__()
        self._pairs = pairs
        self._asked = list({prompt_key(prompt): tuple(prompt) for prompt in prompts}.values())
        self._prompts = self._asked
        self._store = CandidateStore(candidates_file(pairs))
        self._start = start
        self._model = DEFAULT_MODEL
        self._generating: asyncio.Task[None] | None = None
        self._redraws: Timer | None = None
        self._following = True
        self._row = 0

    # -- looks

    def compose(self) -> ComposeResult:
        """Options above, prompts on the left, candidates on the right."""
        yield Static(id="candidates-title", markup=False)
        with Vertical(id="candidates-options", classes="pane") as options:
            options.border_title = "Generate"
            with Horizontal(classes="line"):
                yield Static("answered by", classes="muted")
                yield Select([("…", _UNREAD)], value=_UNREAD, allow_blank=False, compact=True, id="candidates-by")
            yield SamplingForm(tuple(_DEFAULTS), _DEFAULTS)
        with Horizontal(id="candidates-body"):
            prompts = OptionList(id="candidates-prompts", classes="pane", compact=True)
            prompts.border_title = "Prompts"
            yield prompts
            with Vertical(id="candidates-right"):
                with VerticalScroll(id="candidates-prompt", classes="pane", can_focus=False) as prompt:
                    prompt.border_title = "Prompt"
                    yield Static(id="candidates-prompt-text")
                answers = CandidateList(id="candidates-list")
                answers.add_class("pane")
                answers.border_title = "Answers"
                yield answers
        yield FooterLine()

    def on_mount(self) -> None:
        """Read what is there."""
        self._redraws = self.set_interval(1 / REDRAWS_A_SECOND, self._redraw, pause=True)
        self.answers.focus()
        self._open()

    @property
    def answers(self) -> CandidateList:
        """The list of answers."""
        return self.query_one(CandidateList)

    @work(group="open")
    async def _open(self) -> None:
        try:
            problems = await asyncio.to_thread(self._store.load)
        except LocalDPOError as error:
            self.app.notify_problem(error)
            return
        for problem in problems[:1]:
            self.app.notify_problem(problem, "warning")
        known = {prompt_key(prompt) for prompt in self._asked}
        self._prompts = self._asked + [p for p in self._store.prompts() if prompt_key(p) not in known]
        runs = await asyncio.to_thread(tuned_runs, self.app.folder)
        self._model = (await asyncio.to_thread(limits_for, self.app.folder, self._pairs)).model
        by = self.query_one("#candidates-by", Select)
        named = [(f"the base, {one_line(self._model)}", ""), *((one_line(run.name), run.name) for run in runs)]
        by.set_options((Content(name), value) for name, value in named)
        self._list_prompts()
        await self._show_row(0)
        if self._start and self._asked:
            self.action_generate()

    def _list_prompts(self) -> None:
        options = self.query_one("#candidates-prompts", OptionList)
        options.set_options(Option(self._prompt_line(prompt)) for prompt in self._prompts[:SHOWN_PROMPTS])
        options.highlighted = self._row if self._prompts else None
        self.set_class(len(self._prompts) < 2, "-one-prompt")
        self._say()

    def _prompt_line(self, prompt: Sequence[Message]) -> Content:
        return Content(f"{fit(str(len(self._store.of(prompt)) or ''), 3)} {one_line(prompt[-1]['content'], 200)}")

    def _say(self, doing: str = "") -> None:
        count = f"{len(self._prompts):,} {'prompt' if len(self._prompts) == 1 else 'prompts'}"
        hidden = len(self._prompts) - SHOWN_PROMPTS
        more = f" ({hidden:,} of them not listed)" if hidden > 0 else ""
        text = f"Candidates for {one_line(self._pairs.name)}: {len(self._store):,} for {count}{more}"
        self.query_one("#candidates-title", Static).update(f"{text}  {doing}".rstrip())

    @on(OptionList.OptionHighlighted, "#candidates-prompts")
    async def _moved(self, event: OptionList.OptionHighlighted) -> None:
        if event.option_index != self._row:
            self._following = False
            await self._show_row(event.option_index)

    async def _show_row(self, row: int) -> None:
        self._row = row
        empty = Content(
            "No answers yet.\n\nG lets the model answer (N goes to the fields above: how often, how freely), then C "
            "corrects an answer and R ranks them."
            if self._prompts
            else "There is no prompt here.\n\nWrite one in Pairs first: N makes a pair, and only its prompt is needed."
        )
        candidates = self._store.of(self._prompts[row]) if self._prompts else []
        text = conversation(self._prompts[row]) if self._prompts else Content("")
        self.query_one("#candidates-prompt-text", Static).update(text)
        used = {candidate.id for candidate in candidates if self._store.used(candidate.id)}
        await self.answers.show(candidates, used, empty)
        self.refresh_bindings()

    def _redraw(self) -> None:
        if self.answers.live is not None:
            self.answers.live.redraw()

    # -- generating

    def action_generate(self) -> None:
        """Answer every prompt that was asked for, or (none was) every one listed."""
        self._order(self._asked or self._prompts)

    @on(Input.Submitted)
    def _submitted(self) -> None:
        self.answers.focus()
        self.action_generate()

    def action_fields(self) -> None:
        """Go to the fields; Enter in one of them generates."""
        self.query_one("#sampling-count", Input).focus()

    def action_one(self) -> None:
        """Answer the shown prompt."""
        if self._prompts:
            self._order([self._prompts[self._row]])

    @work(group="generate")
    async def _order(self, prompts: Sequence[tuple[Message, ...]]) -> None:
        if self._generating is not None:
            self.app.tell("Generating already; Esc stops it.")
            return
        try:
            values = self.query_one(SamplingForm).values()
            count, seed = values.pop("count"), values.pop("seed") or 0
            order = Order(tuple(prompts), count, values, seed)
            target = await self._target()
        except LocalDPOError as error:
            self.app.notify_problem(error, "warning")
            return
        if target is None:
            return
        assert self._redraws is not None
        self._following = True
        self._redraws.resume()
        self._generating = asyncio.create_task(self._generate(order, target))
        self.refresh_bindings()
        await asyncio.wait([self._generating])
        task, self._generating = self._generating, None
        self._redraws.pause()
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            self.app.notify_problem(failure)
        if self.is_attached:
            self._list_prompts()
            await self._show_row(self._row)
            self._say("stopped" if task.cancelled() else _why(failure))

    async def _target(self) -> Target | None:
        name = str(self.query_one("#candidates-by", Select).value)
        run = self.app.folder / "runs" / name if name and name != _UNREAD else None
        target = await asyncio.to_thread(find_target, run, self._model)
        if not await asyncio.to_thread(target.is_cached):
            text = f"{target.model} is not on this machine. {target.fetch_note()}"
            if await self.app.ask("Fetch the model?", text, {"fetch": "Fetch it", "no": "Not now"}) != "fetch":
                return None
        return target

    async def _generate(self, order: Order, target: Target) -> None:
        answerer = Answering(self.app.host, target)
        await answerer.load(self._say)
        rows = [next(n for n, known in enumerate(self._prompts) if known == prompt) for prompt in order.prompts]
        async with aclosing(generate(answerer, order, self._store)) as events:
            async for progress in events:
                await self._progress(progress, rows[progress.row])

    async def _progress(self, progress: Progress, row: int) -> None:
        speed = f", {progress.tokens_per_second:.0f} tok/s" if progress.tokens_per_second else ""
        self._say(f"answer {min(progress.done + 1, progress.total)} of {progress.total}{speed}  Esc stops")
        if progress.ended:
            if progress.candidate is not None:
                await asyncio.to_thread(self._store.add, progress.candidate)
            options = self.query_one("#candidates-prompts", OptionList)
            if row < options.option_count:
                options.replace_option_prompt_at_index(row, self._prompt_line(self._prompts[row]))
            if row == self._row:
                await self._show_row(row)
            return
        if self._following and row != self._row:
            self._row = row
            if row < SHOWN_PROMPTS:
                self.query_one("#candidates-prompts", OptionList).highlighted = row
            await self._show_row(row)
        if row == self._row:
            if self.answers.live is None:
                await self.answers.begin(len(self._store.of(self._prompts[row])) + 1)
            if self.answers.live is not None:
                self.answers.live.feed(progress.text)
                self.answers.live.note(speed.strip(", "))

    # -- using

    @work(group="correct")
    async def action_correct(self) -> None:
        """Make a pair of the marked answer and an edited copy."""
        from localdpo_tui.screens.correct import CorrectScreen

        candidate = self.answers.marked
        if candidate is None:
            self.app.tell("There is no answer to correct yet. G generates some.")
            return
        correction = Correction(candidate.prompt, candidate.answer, candidate.origin)
        made = await self.app.push_screen_wait(CorrectScreen(correction, [self._pairs], self.app.workspace.folder))
        if made is None:
            return
        try:
            await asyncio.to_thread(add_pairs, made.file, [made.draft])
            await asyncio.to_thread(self._store.mark_used, candidate.id)
        except LocalDPOError as error:
            self.app.notify_problem(error)
            return
        self.app.tell(f"Pair added to {made.file.name}.")
        await self._show_row(self._row)

    @work(group="rank")
    async def action_rank(self) -> None:
        """Rank the candidates of every prompt."""
        await open_ranking(self.app, self._pairs, self._store)

    @work(group="delete")
    async def action_delete(self) -> None:
        """Delete the marked answer."""
        candidate = self.answers.marked
        if candidate is None:
            return
        try:
            await asyncio.to_thread(self._store.remove, candidate.id)
        except LocalDPOError as error:
            self.app.notify_problem(error)
        self._list_prompts()
        await self._show_row(self._row)

    def action_close(self) -> None:
        """Stop generating; with nothing to stop, go back."""
        if self._generating is not None:
            self._generating.cancel()
        else:
            self.dismiss()

    def on_unmount(self) -> None:
        """End what is under way."""
        if self._generating is not None:
            self._generating.cancel()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Grey out what there is nothing for."""
        if action in ("generate", "one") and (self._generating is not None or not self._prompts):
            return None
        if action in ("correct", "delete") and self.is_mounted and self.answers.marked is None:
            return None
        return True


def _why(failure: BaseException | None) -> str:
    """What stays on the screen of a failure once its notice is gone."""
    if failure is None:
        return ""
    return f"failed: {one_line(str(failure))}" if isinstance(failure, LocalDPOError) else "failed"


async def open_ranking(app: LocalDPOApp, pairs: Path, store: CandidateStore | None = None) -> None:
    """Rank the candidates of a file of pairs. To be awaited in a worker."""
    try:
        if store is None:
            store = CandidateStore(candidates_file(pairs))
            await asyncio.to_thread(store.load)
        title = f"Rank candidates for {pairs.name}"
        ranking = await asyncio.to_thread(Ranking.open, store, ranking_file(pairs), pairs, title)
    except LocalDPOError as error:
        app.notify_problem(error)
        return
    await app.push_screen_wait(JudgeScreen(ranking))
