"""Blind A/B on a screen: answers are made in the background while the judge gives verdicts."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from textual import work

from localdpo.errors import LocalDPOError
from localdpo_tui.screens.judge import JudgeScreen
from localdpo_tui.services.answering import Answering, Target, find_target
from localdpo_tui.services.blind_ab import BlindAB, Contest

if TYPE_CHECKING:
    from localdpo_tui.app import LocalDPOApp

__all__ = ["BlindScreen", "open_blind"]


class BlindScreen(JudgeScreen):
    """Judge two models on prompts that neither was trained on."""

    HELP = """Two models answer prompts that were held out from training; you don't know whose answer is whose. The
    win rate comes with the interval in which the true one lies 95 times of 100: as long as it holds 50 %, there are
    too few verdicts to tell the two apart."""

    def __init__(self, contest: BlindAB, a: Target, b: Target) -> None:
        super().__init__(contest)
        self._contest, self._a, self._b = contest, a, b

    def on_mount(self) -> None:
        """Begin to make answers, and show the first that there are."""
        super().on_mount()
        self._fill()

    @work(exclusive=True, group="fill")
    async def _fill(self) -> None:
        a, b = Answering(self.app.host, self._a), Answering(self.app.host, self._b)
        try:
            await a.load(self._loading)
            async with aclosing(self._contest.fill(a, b)) as steps:
                async for _ in steps:
                    self.more()
        except LocalDPOError as error:
            self._contest.making = ""
            self.app.notify_problem(error)
        self.more()

    def _loading(self, text: str) -> None:
        self._contest.making = text
        self.more()


async def open_blind(app: LocalDPOApp, run: Path, other: Path | None = None, prompts: Path | None = None) -> None:
    """Open the contest of a run against its base, or against another run. To be awaited in a worker."""
    try:
        contest = await asyncio.to_thread(BlindAB.open, Contest(run, other), prompts)
        b = await asyncio.to_thread(find_target, run)
        a = await asyncio.to_thread(find_target, other) if other is not None else replace(b, adapter=None)
        if a.base != b.base:
            app.notify_problem("These runs have different base models; only runs of one base can be judged here.")
            return
        if not await asyncio.to_thread(b.is_cached):
            text = f"{b.model} is not on this machine. {b.fetch_note()}"
            if await app.ask("Fetch the model?", text, {"fetch": "Fetch it", "no": "Not now"}) != "fetch":
                return
    except LocalDPOError as error:
        app.notify_problem(error)
        return
    await app.push_screen_wait(BlindScreen(contest, a, b))
