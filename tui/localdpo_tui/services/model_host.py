"""The UI's end of the model host: a child process that holds the model, asked over a pipe.

    host = ModelHost()
    await host.load("smollm2-135m", on_progress=say)
    async with aclosing(host.generate(messages, adapter=run.adapter, options={"temperature": 0.7})) as parts:
        async for part in parts:                # Started, then Delta after Delta, then Ended
            ...
    await host.close()

The process starts with the first request. Leaving a `generate` early, by `aclose`, `break` under `aclosing` or the
cancellation of its task, ends the answer before its next token. Should the process die, what was asked fails with a
sentence, and the next request starts another one, which loads the same base again. Everything here belongs to one
event loop; nothing blocks it. Texts come as the model wrote them: the screen makes them inert. This module never loads
mlx.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from localdpo.data.fields import Message as Turn
from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.paths import child_environment
from localdpo.serve.protocol import (
    MAX_LINE_BYTES,
    PROTOCOL,
    Cancel,
    Counted,
    CountRow,
    CountTokens,
    Delta,
    Ended,
    Failed,
    Generate,
    Hello,
    Load,
    Loaded,
    Message,
    Progress,
    ProtocolError,
    RowCount,
    Started,
    decode,
    encode,
    ended_error,
)

__all__ = ["CountRow", "Delta", "Ended", "Loaded", "ModelHost", "RowCount", "Started"]

CLOSE_SECONDS = 0.2
"""How long a host gets to end by itself when it is closed."""
_KEPT_LINES = 20

Notify = Callable[[str], None]


class ModelHost:
    """A model in a process of its own. `command` replaces the program, for tests."""

    def __init__(self, command: Sequence[str] | None = None) -> None:
        self._command = list(command or (sys.executable, "-P", "-m", "localdpo.serve.host"))
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ids = itertools.count(1)
        self._asked: dict[int, asyncio.Queue[Message | EnvironmentFault]] = {}
        self._said: deque[str] = deque(maxlen=_KEPT_LINES)
        self._starting = asyncio.Lock()
        self._loading = asyncio.Lock()
        self._base: Load | None = None
        self._loaded: Loaded | None = None
        self._closed = False

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None

    @property
    def loaded(self) -> Loaded | None:
        """The base that is loaded now, None before the first and after a crash."""
        return self._loaded

    @property
    def pid(self) -> int | None:
        """The process, None when there is none."""
        return self._process.pid if self._process is not None else None

    # -- asking

    async def load(
        self,
        model: str,
        *,
        quantize: int | None = None,
        memory: Literal["auto", "fast", "lean"] = "auto",
        on_progress: Notify | None = None,
    ) -> Loaded:
        """Have a base loaded, in place of another; returns at once when it is loaded already.

        Answers of another base under way end as cancelled. Raises `LocalDPOError` with the host's sentences.
        """
        wanted = Load(model=model, quantize=quantize, memory=memory)
        async with self._loading:
            if self._loaded is not None and self._base == wanted:
                return self._loaded
            self._loaded = None
            self._base = wanted
            async with aclosing(self._ask(wanted)) as answers:
                async for answer in answers:
                    if isinstance(answer, Progress) and on_progress is not None:
                        on_progress(answer.text)
                    if isinstance(answer, Loaded):
                        self._loaded = answer
                        return answer
        raise AssertionError("the host ended an answer without saying so")

    async def generate(
        self,
        messages: Sequence[Turn],
        *,
        adapter: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
        candidates: int = 1,
    ) -> AsyncGenerator[Started | Delta | Ended, None]:
        """Answer a conversation; yields what comes of each candidate, at the end of each an `Ended`.

        `adapter` is the folder of an adapter, None for the base; `options` are fields of `SamplingOptions`. Raises
        `LocalDPOError` when nothing was loaded, an option is wrong, or a candidate failed.
        """
        await self._again()
        request = Generate(
            messages=[dict(turn) for turn in messages],
            adapter=None if adapter is None else str(Path(adapter).absolute()),
            options=dict(options or {}),
            candidates=candidates,
        )
        left = candidates
        async with aclosing(self._ask(request)) as answers:
            async for answer in answers:
                if isinstance(answer, Ended):
                    error = ended_error(answer)
                    if error is not None:
                        raise error
                    left -= 1
                if isinstance(answer, Started | Delta | Ended):
                    yield answer
                if left == 0:
                    return

    async def count_tokens(self, model: str, rows: Sequence[CountRow]) -> list[RowCount]:
        """Count the tokens of prompts and answers as training with `model` would, without loading its weights.

        Raises `LocalDPOError`, `InputError` for a model that is not on this machine.
        """
        async with aclosing(self._ask(CountTokens(model=model, rows=list(rows)))) as answers:
            async for answer in answers:
                if isinstance(answer, Counted):
                    return answer.rows
        raise AssertionError("the host ended an answer without saying so")

    async def rest(self) -> bool:
        """End the process to free the model's memory, unless it is at work; the next answer starts and loads it again.

        Returns whether it was ended.
        """
        async with self._starting:
            process = self._process
            if process is None or self._asked or self._closed:
                return False
            await _end(process)
            await asyncio.gather(*self._tasks, return_exceptions=True)
            return True

    async def close(self) -> None:
        """End the process, within 300 ms whatever it is doing. What is under way fails."""
        self._closed = True
        self._loaded = None
        process = self._process
        if process is None:
            return
        await _end(process)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._process = None

    async def _again(self) -> None:
        """Load the base again that a host that died had loaded."""
        base = self._base
        if base is not None and (self._loaded is None or not self.running):
            await self.load(base.model, quantize=base.quantize, memory=base.memory)

    async def _ask(self, request: Message) -> AsyncGenerator[Message, None]:
        """Send a request and yield the answers to it, until its asker has enough."""
        process = await self._started()
        number = next(self._ids)
        answers: asyncio.Queue[Message | EnvironmentFault] = asyncio.Queue()
        self._asked[number] = answers
        over = False
        try:
            await self._send(process, replace(request, id=number))
            while True:
                answer = await answers.get()
                if isinstance(answer, EnvironmentFault):
                    over = True
                    raise answer
                if isinstance(answer, Failed):
                    over = True
                    raise answer.error()
                over = isinstance(answer, Loaded | Counted)
                yield answer
        finally:
            del self._asked[number]
            if not over:
                self._cancel(process, number)

    async def _send(self, process: asyncio.subprocess.Process, message: Message) -> None:
        try:
            line = encode(message)
        except ProtocolError as error:
            raise InputError(Problem("", f"this is too much for one request: {error}")) from None
        assert process.stdin is not None
        try:
            process.stdin.write(line)
            await process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            pass  # the reader sees the end and says why

    def _cancel(self, process: asyncio.subprocess.Process, number: int) -> None:
        if process is self._process and process.stdin is not None and not process.stdin.is_closing():
            # Not awaited: it is a line, and this runs while a task is being cancelled.
            process.stdin.write(encode(Cancel(id=number)))

    # -- the process

    async def _started(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._closed:
                raise EnvironmentFault(Problem("", "the model host is closed"))
            if self._process is None:
                self._process = await self._spawn()
            return self._process

    async def _spawn(self) -> asyncio.subprocess.Process:
        # Found wherever this program was found, and never in the folder that is open (-P).
        self._said.clear()
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=MAX_LINE_BYTES + 1,
                start_new_session=True,
                env=child_environment(),
            )
        except OSError as error:
            problem = Problem(self._command[0], f"the model host cannot start ({error.strerror})")
            raise EnvironmentFault(problem) from error
        self._tasks = [asyncio.create_task(self._listen(process)), asyncio.create_task(self._overhear(process))]
        return process

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        """Hand every answer to who asked, until the process ends."""
        assert process.stdout is not None
        why = ""
        try:
            while line := await process.stdout.readline():
                message = decode(line)
                if isinstance(message, Hello) and message.protocol != PROTOCOL:
                    raise ProtocolError(f"it speaks version {message.protocol}, this program {PROTOCOL}")
                asked = self._asked.get(message.id)
                if asked is not None:
                    asked.put_nowait(message)
        except (ProtocolError, ValueError) as error:
            why = str(error)
            with suppress(ProcessLookupError):
                process.kill()
        code = await process.wait()
        with suppress(asyncio.CancelledError, TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._tasks[1]), 0.5)
        self._died(process, why or self._last_words(code))

    async def _overhear(self, process: asyncio.subprocess.Process) -> None:
        """Keep the last lines of stderr: they say why a host died."""
        assert process.stderr is not None
        while chunk := await process.stderr.read(4096):
            self._said.extend(line for line in chunk.decode("utf-8", "replace").splitlines() if line.strip())

    def _last_words(self, code: int) -> str:
        if code == -signal.SIGKILL:
            return "it was killed, perhaps because the memory ran out"
        if code < 0:
            return f"{signal.Signals(-code).name} ended it"
        said = f": {self._said[-1][:200]}" if self._said else ""
        return f"exit code {code}{said}"

    def _died(self, process: asyncio.subprocess.Process, why: str) -> None:
        if self._process is process and not self._closed:
            self._process = None
        self._loaded = None
        fault = EnvironmentFault(
            Problem("", f"the model host ended: {why}", "Ask again: it starts anew")
            if not self._closed
            else Problem("", "the model host was closed")
        )
        for answers in self._asked.values():
            answers.put_nowait(fault)


async def _end(process: asyncio.subprocess.Process) -> None:
    """A host ends with its stdin; one that doesn't soon is killed."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), CLOSE_SECONDS)
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
