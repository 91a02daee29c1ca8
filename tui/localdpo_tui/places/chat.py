"""The Chat place: talk with the base, the tuned model or both, and make pairs of what they say.

It ties the chat (`services.conversation`), its history and the transcript together; how questions are answered is in
`chat_answers`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.content import Content
from textual.timer import Timer
from textual.widgets import Static

from localdpo.errors import LocalDPOError
from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.places.chat_answers import ChatAnswers
from localdpo_tui.services.answering import TunedRun, tuned_runs
from localdpo_tui.services.conversation import Chat, Mode, Reply, Side
from localdpo_tui.services.correction import Correction
from localdpo_tui.services.pair_recipe import limits_for
from localdpo_tui.services.pairfile import add_pairs
from localdpo_tui.services.workspace import BLANK_PAIRS
from localdpo_tui.shown import one_line
from localdpo_tui.widgets.composer import Composer
from localdpo_tui.widgets.transcript import REDRAWS_A_SECOND, Transcript

__all__ = ["ChatPlace"]

DRAFT_SECONDS = 0.5
DRAFT, PAIR_FILE = "chat_draft", "chat_pair_file"
"""What the workspace remembers of a chat: the message not sent yet, and the file that pairs went into last."""
DOUBLE_ESCAPE_SECONDS = 1.0

_EMPTY = (
    "Talk with your model here.",
    "{who}",
    "Write below and press Enter. Esc stops an answer, Ctrl+R asks again. When a reply is not what you want, Ctrl+S "
    "makes a pair of it: you change a copy into what the model should have said, and the next training learns from it.",
    "Ctrl+G chooses the run, the system prompt and the sampling, Ctrl+L finds earlier chats.",
)


class ChatPlace(ChatAnswers):
    """One chat at a time; the others are in the history."""

    NAME = "chat"
    TITLE = "Chat"
    CSS_PATH = "chat.tcss"
    HELP = """Ask the base model and the tuned one the same, and see what the training changed. Tab goes to the replies:
    there the arrows mark a reply, and single keys make a pair of it, ask again, or change the question.

    Every chat is kept in this workspace; Ctrl+L finds it again."""
    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "chat",
        Action("chat.pair", "ctrl+s", "Make pair", "Make a pair of the marked reply: an edited copy over it."),
        Action("chat.who", "ctrl+t", "Who", "Both answer, the tuned model alone, or the base alone."),
        Action("chat.again", "ctrl+r", "Again", "Have the last question answered again."),
        Action("chat.options", "ctrl+g", "Options", "Run, model, system prompt and sampling."),
        Action("chat.find", "ctrl+l", "Chats", "Find an earlier chat."),
        Action("chat.new", "ctrl+n", "New", "Begin a new chat with the same settings."),
        Action("chat.stop", "escape", "Stop", "Stop the answer.", footer=False),
        Action("chat.write", "slash", "Write", "Go to the line where messages are written.", footer=False),
        Action("chat.blind", "ctrl+b", "Blind A/B", "Judge base and tuned on held-out prompts, names hidden."),
        Action("chat.markdown", "", "Markdown", "Show finished replies as Markdown, or as the model wrote them."),
        Action("chat.delete", "", "Delete chat", "Move this chat to the trash."),
    )
    BINDINGS = bindings(ACTIONS)

    def __init__(self) -> None:
        super().__init__()
        self._runs: list[TunedRun] = []
        self._draft_timer: Timer | None = None
        self._last_escape = 0.0
        self._draft = ""

    # -- looks

    def compose_body(self) -> ComposeResult:
        """Who answers, what was said, where to write."""
        yield Static(id="chat-who", markup=False)
        yield Transcript(id="chat-transcript")
        yield Composer(id="chat-composer", classes="pane")

    def on_mount(self) -> None:
        """Begin where the last chat's settings left off."""
        self.query_one(Composer).border_title = "Message"
        self._redraws = self.set_interval(1 / REDRAWS_A_SECOND, self.transcript.redraw, pause=True)
        self.query_one(Composer).focus()
        self._begin()

    @work(exclusive=True, group="open")
    async def _begin(self) -> None:
        self._runs = await asyncio.to_thread(tuned_runs, self.app.folder)
        last, draft = await asyncio.to_thread(self._last_settings)
        if not self.chat.turns:
            self.chat = last
            self._choose_run(last.run)
            if draft and not self.query_one(Composer).raw:
                self.query_one(Composer).raw = draft
        await self._show()

    def _last_settings(self) -> tuple[Chat, str]:
        latest, draft = self.history.latest(), self.workspace.state().get(DRAFT)
        chat = latest.emptied() if latest is not None else Chat()
        if not chat.model:
            chat.model = limits_for(self.app.folder, self._pair_files()[0]).model
        return chat, draft if isinstance(draft, str) else ""

    def _choose_run(self, name: str) -> None:
        """Take a run by its name; one that is gone, or none with runs there, becomes the newest."""
        names = [run.name for run in self._runs]
        if name not in names and not self.chat.turns:
            name = names[-1] if names else ""
        self.chat.run = name
        run = next((run for run in self._runs if run.name == name), None)
        if run is not None:
            self.chat.model = run.model

    async def _show(self) -> None:
        self._name_sides()
        await self.transcript.show(self.chat.turns, await self._empty_text())
        self._say_who()
        self.refresh_bindings()

    def _name_sides(self) -> None:
        self.transcript.names = {"base": "base", "tuned": one_line(self.chat.run or "tuned")}

    async def _empty_text(self) -> Content:
        target = await self._target("base")
        if target is None:
            return Content("")
        cached = await asyncio.to_thread(target.is_cached)
        model = one_line(target.model)
        who = (
            f"The base is {model}."
            if cached
            else f"The base is {model}, which is not on this machine yet: "
            + ("sending the first message asks before fetching it.")
        )
        if self.chat.run:
            who += f" The tuned model is the run {one_line(self.chat.run)}."
        else:
            who += " No run has been trained here yet: Train (F3) makes one, and it answers beside the base."
        return Content("\n\n".join(_EMPTY).format(who=who))

    def _say_who(self) -> None:
        chat = self.chat
        who = {"both": f"base | {chat.run}", "tuned": chat.run, "base": "base alone"}[chat.mode if chat.run else "base"]
        temperature = chat.sampling.get("temperature", 0)
        parts = [one_line(who), one_line(chat.model or "smollm2-135m"), f"temperature {temperature:g}"]
        if chat.system.strip():
            parts.append(f"system: {one_line(chat.system, 40)}")
        for line in self.query("#chat-who").results(Static):  # none any more where the app is being left
            line.update(" · ".join(parts))

    # -- asking

    @on(Composer.Sent)
    def _sent(self, event: Composer.Sent) -> None:
        if self._asking:
            self.app.notify_problem("An answer is under way. Esc stops it, then Enter sends.", "warning")
            return
        self.query_one(Composer).load_text("")
        self._ask(event.text)

    # -- keys

    @on(Composer.Leave)
    def action_stop(self) -> None:
        """Stop the answer; without one, Esc twice empties what was written, and Esc goes to the replies."""
        if self._answering is not None:
            self._answering.cancel()
            return
        composer = self.query_one(Composer)
        now = asyncio.get_running_loop().time()
        if composer.raw and now - self._last_escape < DOUBLE_ESCAPE_SECONDS:
            composer.replace("", composer.document.start, composer.document.end)  # Ctrl+Z brings it back
            self._last_escape = 0.0
            return
        self._last_escape = now
        if composer.raw:
            self.app.tell("Esc again empties the line.")
        elif self.chat.turns:
            self.transcript.focus()

    def action_write(self) -> None:
        """Go to the composer."""
        self.query_one(Composer).focus()

    def action_who(self) -> None:
        """Change who answers from now on."""
        if not self.chat.run:
            self.app.notify_problem("There is no tuned model yet. Train one (F3), then it answers here.", "warning")
            return
        modes: tuple[Mode, ...] = ("both", "tuned", "base")
        self.chat.mode = modes[(modes.index(self.chat.mode) + 1) % 3]
        self._say_who()

    def action_again(self) -> None:
        """Have the last question answered again."""
        if self._asking or not self.chat.turns:
            return
        self._regenerate()

    @on(Composer.Recall)
    def _recall(self) -> None:
        if self.chat.turns:
            self.query_one(Composer).raw = self.chat.turns[-1].prompt

    @on(Transcript.Wanted)
    def _wanted(self, event: Transcript.Wanted) -> None:
        match event.what:
            case "pair":
                self.action_pair()
            case "again":
                self.action_again()
            case "copy":
                reply = self._selected_reply()
                if reply is not None:
                    self.app.copy_to_clipboard(reply[1].text)
                    self.app.tell("Copied.")
            case "edit":
                self._edit()

    def _selected_reply(self) -> tuple[tuple[int, Side], Reply] | None:
        selected = self.transcript.selected
        reply = self.chat.turns[selected[0]].replies.get(selected[1]) if selected is not None else None
        return (selected, reply) if selected is not None and reply is not None and reply.text else None

    @work(group="edit")
    async def _edit(self) -> None:
        """Ask something else in place of the marked turn, in a new chat that has what came before."""
        selected = self.transcript.selected
        if selected is None or self._asking:
            return
        prompt = self.chat.turns[selected[0]].prompt
        self.chat = self.chat.fork(selected[0])
        await self._show()
        composer = self.query_one(Composer)
        composer.raw = prompt
        composer.focus()
        self.app.tell("Change the question and send it. The chat as it was stays in Ctrl+L.")

    @work(group="pair")
    async def action_pair(self) -> None:
        """Make a pair of the marked reply."""
        found = self._selected_reply()
        if found is None:
            self.app.tell("There is no reply yet to make a pair of.")
            return
        from localdpo_tui.screens.correct import CorrectScreen

        (number, side), reply = found
        correction = Correction(self.chat.messages(side, number), reply.text, reply.origin, "reply")
        files = await asyncio.to_thread(self._pair_files)
        made = await self.app.push_screen_wait(CorrectScreen(correction, files, self.workspace.folder))
        if made is None:
            return
        try:
            await asyncio.to_thread(add_pairs, made.file, [made.draft])
            await asyncio.to_thread(self.workspace.remember, **{PAIR_FILE: made.file.name})
        except LocalDPOError as error:
            self.app.notify_problem(error)
            return
        self.app.tell(f"Pair added to {made.file.name}.")

    def _pair_files(self) -> list[Path]:
        """The files that a pair can go into, the one used last first; a new one where there is none."""
        last = self.workspace.state().get(PAIR_FILE)
        found = self.workspace.pair_files() or [self.workspace.pairs / BLANK_PAIRS]
        return sorted(found, key=lambda path: path.name != last)

    @work(group="options")
    async def action_options(self) -> None:
        """Change run, model, system prompt and sampling."""
        from localdpo_tui.screens.chat_options import ChatOptionsScreen, ChatSettings

        self._runs = await asyncio.to_thread(tuned_runs, self.app.folder)
        chat = self.chat
        before = ChatSettings(chat.run, chat.model or "smollm2-135m", chat.mode, chat.system, chat.sampling)
        runs = [(run.name, run.model) for run in self._runs]
        settings = await self.app.push_screen_wait(ChatOptionsScreen(before, runs))
        if settings is None:
            return
        if settings.run and settings.run != chat.run and chat.mode == "base":
            settings = replace(settings, mode="both")
        chat.run, chat.model, chat.mode = settings.run, settings.model, settings.mode
        chat.system, chat.sampling = settings.system, dict(settings.sampling)
        self._name_sides()
        self._say_who()
        if not chat.turns:
            await self._show()

    def action_new(self) -> None:
        """Begin a new chat."""
        if not self._asking:
            self._open(self.chat.emptied())

    @work(exclusive=True, group="open")
    async def _open(self, chat: Chat) -> None:
        self.chat = chat
        await self._show()
        self.query_one(Composer).focus()

    @work(group="find")
    async def action_find(self) -> None:
        """Find an earlier chat."""
        if self._asking:
            return
        from localdpo_tui.screens.chats import ChatsScreen

        chats = await asyncio.to_thread(self.history.all)
        chosen = await self.app.push_screen_wait(ChatsScreen(chats))
        if chosen is not None:
            self._open(chosen)

    @work(group="find")
    async def action_delete(self) -> None:
        """Move this chat to the trash."""
        if self.chat.turns and not self._asking:
            try:
                await asyncio.to_thread(self.history.remove, self.chat.id)
            except LocalDPOError as error:
                self.app.notify_problem(error)
                return
            self.app.tell("This chat is in the trash.")
            self._open(self.chat.emptied())

    @work(group="options")
    async def action_markdown(self) -> None:
        """Show finished replies as Markdown or plain."""
        self.transcript.markdown = not self.transcript.markdown
        await self._show()

    @work(group="blind")
    async def action_blind(self) -> None:
        """Judge the chosen run against its base, names hidden."""
        from localdpo_tui.screens.blind import open_blind

        if not self.chat.run:
            self.app.notify_problem("There is no run to judge yet. Train one (F3) first.", "warning")
            return
        await open_blind(self.app, self.app.folder / "runs" / self.chat.run)

    # -- what the app asks

    def open_link(self, **link: Any) -> None:
        """Chat with `run`, or open the chat with the id `chat`."""
        self._linked(str(link.get("run") or ""), str(link.get("chat") or ""), str(link.get("model") or ""))

    @work(exclusive=True, group="open")
    async def _linked(self, run: str, identity: str, model: str) -> None:
        self._runs = await asyncio.to_thread(tuned_runs, self.app.folder)
        found = await asyncio.to_thread(self.history.get, identity) if identity else None
        if found is not None:
            self.chat = found
        elif run or model:
            self.chat = self.chat.emptied() if self.chat.turns else self.chat
            self.chat.model = model or self.chat.model
            self.chat.mode = "both"
            self._choose_run(Path(run).name if run else "")
        await self._show()

    @on(Composer.Changed)
    def _typed(self) -> None:
        if self._draft_timer is not None:
            self._draft_timer.stop()
        self._draft_timer = self.set_timer(DRAFT_SECONDS, self._keep_draft)

    @work(group="draft")
    async def _keep_draft(self) -> None:
        text = self.query_one(Composer).raw
        if text != self._draft:
            self._draft = text
            with suppress(LocalDPOError):  # sending it will say so
                await asyncio.to_thread(self.workspace.remember, **{DRAFT: text or None})

    def flush(self) -> None:
        """Keep what was written and not sent."""
        text = self.query_one(Composer).raw if self.is_mounted else self._draft
        if text != self._draft:
            self._draft = text
            self.workspace.remember(**{DRAFT: text or None})

    def busy(self) -> Sequence[str]:
        """An answer under way ends with the app; what came of it is not kept."""
        return ["The model is answering; its answer would be cut off."] if self._answering is not None else []

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Grey out what needs a reply, or no answer under way."""
        if action in ("pair", "again", "delete") and not self.chat.turns:
            return None
        if action in ("again", "new", "find", "delete") and self._asking:
            return None
        return True
