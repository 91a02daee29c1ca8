"""A conversation with the base model, the tuned one, or both, at a terminal or through a pipe.

It knows nothing of MLX: answers come from a `Speaker`. Whatever a model says is shown through the sanitiser
and kept in the history as it was.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO, get_args

from localdpo.data.pairs import Message
from localdpo.errors import InputError, LocalDPOError, Problem
from localdpo.text import StreamSanitiser, sanitise

Side = Literal["base", "tuned"]
Mode = Literal["base", "tuned", "compare"]

HELP = """\
/base /tuned /compare   who answers from now on
/system [TEXT]          set the system message and start afresh; without TEXT, remove it
/reset                  forget the conversation
/save [FILE]            write the conversation as JSONL
/help  /quit            Ctrl-C stops an answer, Ctrl-D leaves; a line with // in front is sent with one /"""


class Speaker(Protocol):
    """Whoever answers."""

    @property
    def sides(self) -> tuple[Side, ...]:
        """The sides that can answer: the base alone, or both."""
        ...

    def stream(self, side: Side, messages: Sequence[Message], cancelled: Callable[[], bool]) -> Iterator[str]:
        """Yield the answer to ``messages`` piece by piece, until its end or until ``cancelled()``."""
        ...


@dataclass
class Turn:
    """One question and the answers it got, by side; ``stopped`` when Ctrl-C cut the last of them short."""

    prompt: str
    answers: dict[Side, str] = field(default_factory=dict)
    stopped: bool = False


@dataclass
class Conversation:
    """What was said, and who answers next."""

    mode: Mode
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    @property
    def sides(self) -> tuple[Side, ...]:
        """Who answers the next question."""
        return ("base", "tuned") if self.mode == "compare" else (self.mode,)

    def messages(self, side: Side, number: int = -1) -> list[Message]:
        """Return what ``side`` is asked at turn ``number``: all that came before, and the question.

        An earlier turn that this side did not answer has the other side's answer: it is what the user read.
        """
        turns = self.turns[: number % len(self.turns) + 1]
        messages: list[Message] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for turn in turns[:-1]:
            answer = turn.answers.get(side) or next(iter(turn.answers.values()))
            messages.append({"role": "user", "content": turn.prompt})
            messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": turns[-1].prompt}]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row a turn: the prompt as messages, and the answers by side."""
        side = self.sides[-1]
        rows: list[dict[str, Any]] = [{"prompt": self.messages(side, i)} for i in range(len(self.turns))]
        for row, turn in zip(rows, self.turns, strict=True):
            row.update(turn.answers.items())
        return rows


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C into a flag for as long as an answer runs; a second one leaves the program.

    Yields the function that reads the flag.
    """
    stopped = threading.Event()

    def on_interrupt(_signum: int, _frame: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stopped.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def answer(conversation: Conversation, speaker: Speaker, side: Side, stopped: Callable[[], bool]) -> Iterator[str]:
    """Put the last turn's question to ``side``; yield the answer piece by piece, fit to be shown.

    At the end the turn holds the answer as the model gave it, unless it is blank.
    """
    clean, pieces = StreamSanitiser(), []
    for piece in speaker.stream(side, conversation.messages(side), stopped):
        pieces.append(piece)
        yield clean.feed(piece)
    yield clean.close()
    text = "".join(pieces).strip()
    if text:
        conversation.turns[-1].answers[side] = text


@dataclass
class Repl:
    """Reads lines, answers them and obeys commands until /quit or the end of input.

    ``read`` returns the next line and raises EOFError at the end; ``labels`` says whether each answer is
    preceded by who gave it (always so when both answer).
    """

    conversation: Conversation
    speaker: Speaker
    out: TextIO
    labels: bool = True

    def run(self, read: Callable[[], str]) -> None:
        """Serve lines from ``read`` until it ends."""
        while True:
            try:
                line = read().strip()
            except EOFError:
                if self.labels:
                    self._say("")  # the shell's prompt goes on a line of its own
                return
            except KeyboardInterrupt:
                self._say("\n(Ctrl-D or /quit leaves)")
                continue
            if not line:
                continue
            if line.startswith("/") and not line.startswith("//"):
                if line.split()[0] in ("/quit", "/exit"):
                    return
                self._command(line)
            else:
                self._ask(line[1:] if line.startswith("//") else line)

    def _ask(self, prompt: str) -> None:
        try:
            self.ask(prompt)
        except LocalDPOError as error:
            self._say("\n".join(f"error: {sanitise(str(problem))}" for problem in error.problems))

    def ask(self, prompt: str) -> Turn:
        """Put ``prompt`` to whoever answers now, streaming; return the turn, which joins the conversation.

        A turn stopped before its first word is forgotten.
        """
        turn = Turn(prompt)
        self.conversation.turns.append(turn)
        try:
            with stop_on_interrupt() as stopped:
                for side in self.conversation.sides:
                    if not stopped():
                        self._answer(side, stopped)
                turn.stopped = stopped()
        finally:
            if not turn.answers:
                self.conversation.turns.pop()
        return turn

    def _answer(self, side: Side, stopped: Callable[[], bool]) -> None:
        if self.labels or self.conversation.mode == "compare":
            self._write(f"{side}> ")
        times = [0.0]
        for text in answer(self.conversation, self.speaker, side, stopped):
            times.append(time.monotonic())
            self._write(text)
        note = ""
        if stopped():
            note = " [stopped]"
        elif self.labels and len(times) > 3:
            # From the first token on: before it the prompt was read.
            note = f"  [{(len(times) - 3) / max(times[-1] - times[1], 1e-9):.0f} tok/s]"
        self._write(f"{note}\n")

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in get_args(Mode):
            self._switch(name)
        elif name == "system":
            self.conversation.system = rest or None
            self.conversation.turns.clear()
            self._say("system message " + ("set" if rest else "removed") + "; the conversation starts afresh")
        elif name == "reset":
            self.conversation.turns.clear()
            self._say("conversation forgotten")
        elif name == "save":
            self._save(rest)
        elif name == "help":
            self._say(HELP)
        else:
            self._say(f"unknown command /{sanitise(name)}; /help lists them")

    def _switch(self, name: str) -> None:
        if name != "base" and "tuned" not in self.speaker.sides:
            self._say("there is no tuned model here: name a run, as in `localdpo chat runs/NAME`")
            return
        self.conversation.mode = name  # type: ignore[assignment]
        self._say("both answer from now on" if name == "compare" else f"the {name} model answers from now on")

    def _save(self, name: str) -> None:
        path = Path(name or time.strftime("chat-%Y%m%d-%H%M%S.jsonl")).expanduser()
        try:
            count = save(self.conversation, path)
        except (LocalDPOError, OSError) as error:
            self._say(f"not saved: {sanitise(str(error))}")
        else:
            self._say(f"{count} {'turn' if count == 1 else 'turns'} saved to {sanitise(str(path))}")

    def _say(self, text: str) -> None:
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def save(conversation: Conversation, path: Path) -> int:
    """Write one JSON row a turn to the new file ``path``; return how many.

    Raises InputError where there is nothing to save or the file exists.
    """
    from localdpo.files import atomic_write

    rows = conversation.rows()
    if not rows:
        raise InputError(Problem("/save", "there is no turn yet", "ask something first"))
    if path.exists():
        raise InputError(Problem(str(path), "the file exists", "choose another name"))
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def line_reader(interactive: bool) -> Callable[[], str]:
    """Return what reads the next line: with editing and history when interactive, plain otherwise."""
    if interactive:
        import readline  # noqa: F401  (input() edits lines and keeps history once it is loaded)

        return lambda: input("you> ")

    def read() -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line

    return read
