"""Blind A/B: two models answer held-out prompts, somebody says which answer is better, and the win rate follows.

Answers are made while verdicts are given, and kept, so that going on another day makes none twice. It knows no
screens; who answers is behind `Answerer`, and who plays on what is `localdpo.evaluate.contest`'s.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path

from localdpo.data.fields import Message
from localdpo.data.pairs import prompt_key
from localdpo.data.provenance import AnswerOrigin
from localdpo.evaluate.blind import BlindTest, Choice, Comparison, Shown
from localdpo.evaluate.contest import ANSWER_TOKENS, Contest, held_out_prompts, journal_of, open_test, settle, undo
from localdpo_tui.services.candidates import Answerer, Finished

__all__ = ["ANSWER_TOKENS", "BlindAB", "Contest", "held_out_prompts", "journal_of"]


class BlindAB:
    """A contest under way: `fill` makes answers, the rest is for the judge."""

    def __init__(self, contest: Contest, prompts: Sequence[tuple[Message, ...]], test: BlindTest) -> None:
        self.title = f"Blind: {contest.sides[1]} against {contest.sides[0]}"
        self.contest = contest
        self.making = ""
        self._prompts = list(prompts)
        self._test = test
        # Answers are added on one thread while verdicts are given on another.
        self._lock = threading.Lock()

    @classmethod
    def open(cls, contest: Contest, file: Path | None = None) -> BlindAB:
        """Go on with the contest's test, or begin it. Reads and writes files.

        Raises InputError (no adapter, no prompts) and EnvironmentFault.
        """
        prompts = held_out_prompts(contest.run, file)
        return cls(contest, prompts, open_test(contest, prompts, file))

    async def fill(self, a: Answerer, b: Answerer) -> AsyncGenerator[None, None]:
        """Make the answers that are missing; yields whenever there is something new to show.

        Raises what the models raise; what was made is kept.
        """
        for number, prompt in enumerate(self._prompts):
            key = prompt_key(prompt).hex()
            if key in self._test.comparisons:
                continue
            answers: list[str] = []
            origins: list[AnswerOrigin | None] = []
            for answerer in (a, b):
                self.making = f"making answers: prompt {number + 1} of {len(self._prompts)}"
                yield
                text, origin = await _whole(answerer, prompt)
                answers.append(text)
                origins.append(origin)
            comparison = Comparison(key, prompt, (answers[0], answers[1]), (origins[0], origins[1]))
            await asyncio.to_thread(self._add, comparison)
            yield
        self.making = ""
        yield

    def _add(self, comparison: Comparison) -> None:
        with self._lock:
            self._test.add(comparison)
            settle(self._test)

    def current(self) -> Shown | None:
        """The answers to judge now."""
        return self._test.current()

    def judge(self, choice: Choice) -> None:
        """Take the verdict on `current`. Raises EnvironmentFault."""
        with self._lock:
            self._test.judge(choice)
            settle(self._test)

    def undo(self) -> bool:
        """Take the latest verdict that somebody gave back. Raises EnvironmentFault."""
        with self._lock:
            return undo(self._test)

    def position(self) -> str:
        """How far we are."""
        done = f"{len(self._test.judgements)} of {len(self._prompts)} judged"
        return f"{done}, {self.making}" if self.making else done

    def result(self) -> str:
        """The win rate and its interval so far, in words."""
        a, b = self._test.sides
        return self._test.win_rate().sentence(b, a)

    def waiting(self) -> str:
        """What comes, or the result."""
        if self.making:
            return "The models are answering; the first two answers come in a moment."
        return f"Every prompt is judged.\n\n{self.result()}\n\nThe verdicts are kept in {self._test.path.name}."


async def _whole(answerer: Answerer, prompt: Sequence[Message]) -> tuple[str, AnswerOrigin | None]:
    pieces: list[str] = []
    origin: AnswerOrigin | None = None
    sampling = {"temperature": 0.0, "max_tokens": ANSWER_TOKENS}
    async with aclosing(answerer.answer(prompt, sampling)) as answer:
        async for part in answer:
            if isinstance(part, Finished):
                origin = part.origin
            else:
                pieces.append(part.text)
    return "".join(pieces).strip(), origin
