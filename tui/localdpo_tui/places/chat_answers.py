"""How a chat's questions are answered: what is loaded, streamed, stopped and written.

What was asked is written before it is answered and every answer as it ends, so a chat is found again whatever ends
the program. The place itself (`chat`) gives the looks and the keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace

from textual import work
from textual.timer import Timer

from localdpo.errors import LocalDPOError
from localdpo_tui.places.base import Place
from localdpo_tui.services.answering import Answering, Target, find_target
from localdpo_tui.services.candidates import Finished
from localdpo_tui.services.chats import ChatHistory
from localdpo_tui.services.conversation import Chat, Reply, Side, Turn
from localdpo_tui.shown import one_line, sentences
from localdpo_tui.widgets.composer import Composer
from localdpo_tui.widgets.transcript import ReplyView, Transcript

__all__ = ["ChatAnswers"]


class ChatAnswers(Place):
    """What the Chat place does with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.chat = Chat()
        self._answering: asyncio.Task[None] | None = None
        self._asking = False
        self._redraws: Timer | None = None

    async def _show(self) -> None:
        """Show the whole chat."""
        raise NotImplementedError

    def _say_who(self) -> None:
        """Say who answers."""
        raise NotImplementedError

    @property
    def transcript(self) -> Transcript:
        """What was said."""
        return self.query_one(Transcript)

    @property
    def history(self) -> ChatHistory:
        """The workspace's chats."""
        return ChatHistory(self.app.folder)

    @work(group="ask")
    async def _ask(self, prompt: str) -> None:
        """Ask a new question; one that could not be put comes back to be sent again."""
        self._asking = True
        try:
            if not await self._allowed():
                self.query_one(Composer).raw = prompt
                return
            turn = self.chat.ask(prompt)
            await self._save()
            if not await self._answer(turn):
                self.chat.turns.remove(turn)
                await self._save()
                await self._show()
                if not self.query_one(Composer).raw:
                    self.query_one(Composer).raw = prompt
        finally:
            self._asking = False
            self._say_who()
            self.refresh_bindings()

    async def _answer(self, turn: Turn) -> bool:
        """Have every side answer the last turn, one after the other: two at once would each take twice as long.

        Returns False when the model could not be loaded.
        """
        sides = self.chat.sides
        views = await self.transcript.add(len(self.chat.turns) - 1, turn, sides)
        if not await self._load(views[sides[0]]):
            return False
        assert self._redraws is not None
        self._redraws.resume()
        self.refresh_bindings()
        try:
            for number, side in enumerate(sides):
                self._answering = asyncio.create_task(self._stream(side, turn, views[side]))
                await asyncio.wait([self._answering])
                stopped = self._answering.cancelled()
                failure = None if stopped else self._answering.exception()
                if failure is not None:
                    self._failed(views[side], failure)
                if stopped or failure is not None:
                    for rest in sides[number + 1 :]:
                        views[rest].note("not asked")
                    break
        finally:
            if self._answering is not None:
                self._answering.cancel()
            self._answering = None
            self._redraws.pause()
        await self._save()
        return True

    def _failed(self, view: ReplyView, error: BaseException) -> None:
        view.fail(sentences(error) if isinstance(error, LocalDPOError) else "The model stopped answering.")
        self.app.notify_problem(error)

    async def _stream(self, side: Side, turn: Turn, view: ReplyView) -> None:
        """One side's answer. When it is stopped, what came so far is the reply."""
        target = await self._target(side)
        assert target is not None
        pieces: list[str] = []
        speed, origin, stopped = 0.0, None, True
        number = next(n for n, known in enumerate(self.chat.turns) if known is turn)
        view.note("thinking")
        try:
            answer = Answering(self.app.host, target).answer(self.chat.messages(side, number), self.chat.sampling)
            async with aclosing(answer) as parts:
                async for part in parts:
                    if isinstance(part, Finished):
                        origin, stopped = part.origin, False
                        continue
                    pieces.append(part.text)
                    view.feed(part.text)
                    speed = part.tokens_per_second or speed
                    view.note(f"{speed:.0f} tok/s" if speed else "")
            stopped = False
        finally:
            text = "".join(pieces).strip()
            if text or not stopped:
                origin = origin or target.origin(self.chat.sampling)
                turn.replies[side] = Reply(text, origin, speed, stopped)
                view.finish(turn.replies[side])
            else:
                view.note("stopped")

    async def _target(self, side: Side) -> Target | None:
        """What answers for `side`; None, and said, when it cannot be told."""
        run = self.app.folder / "runs" / self.chat.run if self.chat.run else None
        try:
            target = await asyncio.to_thread(find_target, run, self.chat.model)
        except LocalDPOError as error:
            self.app.notify_problem(error)
            return None
        return target if side == "tuned" else replace(target, adapter=None)

    async def _allowed(self) -> bool:
        """Whether the model may be loaded: it is here, or the user wants it fetched. Nothing is fetched unasked."""
        target = await self._target(self.chat.sides[-1])
        if target is None:
            return False
        if await asyncio.to_thread(target.is_cached):
            return True
        text = f"{target.model} is not on this machine. {target.fetch_note()}"
        return await self.app.ask("Fetch the model?", text, {"fetch": "Fetch it", "no": "Not now"}) == "fetch"

    async def _load(self, view: ReplyView) -> bool:
        """Have the base loaded, saying so where its answer will be. Returns whether it is; Esc gives it up."""
        target = await self._target(self.chat.sides[-1])
        if target is None:
            return False

        def say(text: str) -> None:
            view.note(one_line(text))

        self._answering = asyncio.create_task(self._loading(target, say))
        try:
            await asyncio.wait([self._answering])
            failure = None if self._answering.cancelled() else self._answering.exception()
            if failure is not None:
                self.app.notify_problem(failure)
            return failure is None and not self._answering.cancelled()
        finally:
            self._answering.cancel()
            self._answering = None

    async def _loading(self, target: Target, say: Callable[[str], None]) -> None:
        await Answering(self.app.host, target).load(say)

    async def _save(self) -> None:
        try:
            await asyncio.to_thread(self.history.save, self.chat)
        except LocalDPOError as error:
            self.app.notify_problem(error)

    @work(group="ask")
    async def _regenerate(self) -> None:
        self._asking = True
        try:
            if not await self._allowed():
                return
            turn = self.chat.turns[-1]
            if self.chat.sampling.get("temperature", 0) == 0 and len(turn.replies) == len(self.chat.sides):
                self.app.tell("At temperature 0 the answer stays the same. Ctrl+G changes it.")
            # The chat as it was stays in the history: nothing that was said is lost.
            self.chat = self.chat.fork(len(self.chat.turns) - 1)
            turn = self.chat.ask(turn.prompt)
            await self.transcript.drop_last()
            await self._answer(turn)
        finally:
            self._asking = False
            self._say_who()
            self.refresh_bindings()
