"""A model host without a model, for tests of screens: the same interface, answers from a function."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from localdpo.data.fields import Message
from localdpo.errors import EnvironmentFault, LocalDPOError, Problem
from localdpo.serve.protocol import CountRow, Delta, Ended, Loaded, RowCount, Started

Answer = Callable[[list[dict[str, Any]], str | None, Mapping[str, Any], int], str]


def echo(messages: list[dict[str, Any]], adapter: str | None, _options: Mapping[str, Any], candidate: int) -> str:
    who = "tuned" if adapter else "base"
    return f"{who} {candidate}: you said {messages[-1]['content']!r}, and that is all."


class FakeModelHost:
    """Answers with `answer(messages, adapter, options, candidate)`, a word at a time.

    `asked` records what was asked for. `error` is raised by the next request instead of an answer. With `hold`, answers
    stop after their first piece until `release()`, so that a test can look at one under way; `cancelled` counts those
    that were not waited for.
    """

    def __init__(self, answer: Answer = echo, *, hold: bool = False, tokens_per_second: float = 50.0) -> None:
        self.answer = answer
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.error: LocalDPOError | None = None
        self.cancelled = 0
        self.rested = 0
        self.closed = False
        self.tokens_per_second = tokens_per_second
        self._loaded: Loaded | None = None
        self._go = asyncio.Event()
        if not hold:
            self._go.set()

    def release(self) -> None:
        """Let answers that are held go on."""
        self._go.set()

    @property
    def running(self) -> bool:
        return bool(self.asked) and not self.closed

    @property
    def loaded(self) -> Loaded | None:
        return self._loaded

    @property
    def pid(self) -> int | None:
        return None

    async def load(
        self,
        model: str,
        *,
        quantize: int | None = None,
        memory: Literal["auto", "fast", "lean"] = "auto",
        on_progress: Callable[[str], None] | None = None,
    ) -> Loaded:
        self._ask("load", model=model, quantize=quantize, memory=memory)
        if on_progress is not None:
            on_progress(f"loading {model}")
        await asyncio.sleep(0)
        self._loaded = Loaded(
            model=model, fingerprint="f" * 64, parameters=1000, context=4096, device="cpu", memory="fast"
        )  # fmt: skip
        return self._loaded

    async def generate(
        self,
        messages: Sequence[Message],
        *,
        adapter: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
        candidates: int = 1,
    ) -> AsyncGenerator[Started | Delta | Ended, None]:
        turns = [dict(turn) for turn in messages]
        folder = None if adapter is None else str(adapter)
        self._ask("generate", messages=turns, adapter=folder, options=dict(options or {}), candidates=candidates)
        over = False
        try:
            for number in range(candidates):
                yield Started(candidate=number, prompt_tokens=sum(len(turn["content"].split()) for turn in turns))
                pieces = self.answer(turns, folder, options or {}, number).split(" ")
                for count, piece in enumerate(pieces, 1):
                    text = piece if count == 1 else f" {piece}"
                    yield Delta(candidate=number, text=text, tokens=count, tokens_per_second=self.tokens_per_second)
                    await self._go.wait()
                    await asyncio.sleep(0)
                yield Ended(
                    candidate=number, reason="stop", tokens=len(pieces), tokens_per_second=self.tokens_per_second
                )  # fmt: skip
            over = True
        finally:
            self.cancelled += not over

    async def count_tokens(self, model: str, rows: Sequence[CountRow]) -> list[RowCount]:
        """A word is a token."""
        self._ask("count_tokens", model=model, rows=list(rows))
        await asyncio.sleep(0)
        return [
            RowCount(
                prompt=sum(len(turn["content"].split()) for turn in row.messages),
                answers=[len(answer.split()) + 1 for answer in row.answers],
            )
            for row in rows
        ]

    async def rest(self) -> bool:
        self.rested += 1
        return True

    async def close(self) -> None:
        self.closed = True

    def _ask(self, kind: str, **what: Any) -> None:
        if self.closed:
            raise EnvironmentFault(Problem("", "the model host is closed"))
        self.asked.append((kind, what))
        if self.error is not None:
            error, self.error = self.error, None
            raise error
