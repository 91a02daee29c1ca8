"""The model host: the process that answers for the terminal UI, which holds no model itself.

`python -m localdpo.serve.host` speaks the protocol of `localdpo.serve.protocol` on its stdin and stdout. A thread reads
requests, one computes (`serve.engine`), one counts tokens, one writes; a request to cancel is obeyed before the next
token. It ends when its stdin does, which is also when its parent dies, however that happens. What libraries print goes
to stderr, so that nothing but messages is on stdout. It keeps no state on disk and knows nothing about screens.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from localdpo.errors import InputError, LocalDPOError, Problem
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
    failure,
)

if TYPE_CHECKING:
    from localdpo.model.load import LoadedModel
    from localdpo.serve.engine import Engine, Event, Job

__all__ = ["Host", "Outbox", "main"]

BATCH_SECONDS = 0.03
"""How long text is gathered before it is sent: some thirty frames a second are enough for any screen."""


class Outbox:
    """Messages on their way out: never blocks whoever puts one in, and joins what a slow reader has not read yet."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._waiting: list[Message] = []
        self._deltas: dict[tuple[int, int], int] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._write, name="outbox", daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        """Send a message; a delta that follows a waiting one of its candidate is joined to it."""
        with self._changed:
            if isinstance(message, Delta):
                key = message.id, message.candidate
                place = self._deltas.get(key)
                if place is not None:
                    before = self._waiting[place]
                    assert isinstance(before, Delta)
                    joined = Delta(
                        id=message.id, candidate=message.candidate, text=before.text + message.text,
                        tokens=message.tokens, tokens_per_second=message.tokens_per_second,
                    )  # fmt: skip
                    self._waiting[place] = joined
                    return
                self._deltas[key] = len(self._waiting)
            self._waiting.append(message)
            self._changed.notify()

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                only_text = all(isinstance(message, Delta) for message in self._waiting)
            if only_text and not self._closed:
                time.sleep(BATCH_SECONDS)
            with self._changed:
                messages, self._waiting = self._waiting, []
                self._deltas.clear()
            try:
                self._out.write(b"".join(map(_line, messages)))
                self._out.flush()
            except OSError:
                return  # nobody reads any more; the end of stdin says so too

    def close(self, timeout: float) -> None:
        """Send what waits and end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)


def _line(message: Message) -> bytes:
    try:
        return encode(message)
    except ProtocolError as error:
        return encode(Failed(id=message.id, **failure(error)))


@dataclass
class _Asked:
    """A request under way: its candidates, and how many of them are not over."""

    jobs: list[Job] = field(default_factory=list)
    open: int = 0
    cancelled: bool = False


class Host:
    """Serves requests read from `source` until it ends; answers go to `outbox`."""

    def __init__(self, source: BinaryIO, outbox: Outbox) -> None:
        self._source = source
        self._outbox = outbox
        self._engine: Engine | None = None
        self._base: tuple[object, ...] | None = None
        self._asked: dict[int, _Asked] = {}
        self._lock = threading.Lock()
        self._counting: queue.SimpleQueue[CountTokens] = queue.SimpleQueue()
        self._counts_wanted: set[int] = set()
        self._tokenizers: dict[str, Any] = {}
        threading.Thread(target=self._count_loop, name="counter", daemon=True).start()

    def serve(self) -> None:
        """Read and serve until there is no more to read."""
        self._outbox.put(Hello(protocol=PROTOCOL, pid=os.getpid()))
        while line := self._source.readline(MAX_LINE_BYTES + 1):
            if not line.endswith(b"\n"):
                self._skip_line(line)
                continue
            if line.strip():
                self._serve_line(line)

    def _skip_line(self, line: bytes) -> None:
        if len(line) <= MAX_LINE_BYTES:
            return  # the asker died while writing
        while line and not line.endswith(b"\n"):
            line = self._source.readline(1 << 16)
        self._fail(0, ProtocolError(f"a line is longer than {MAX_LINE_BYTES:,} bytes"))

    def _serve_line(self, line: bytes) -> None:
        try:
            message = decode(line)
        except ProtocolError as error:
            self._fail(0, error)
            return
        try:
            match message:
                case Load():
                    self._load(message)
                case Generate():
                    self._generate(message)
                case Cancel():
                    self._cancel(message.id)
                case CountTokens():
                    self._counts_wanted.add(message.id)
                    self._counting.put(message)
                case _:
                    raise ProtocolError(f"{message.type} is not something to ask for")
        except Exception as error:
            self._fail(message.id, error)

    def _fail(self, number: int, error: BaseException) -> None:
        self._outbox.put(Failed(id=number, **failure(error)))

    @property
    def engine(self) -> Engine:
        """The engine, made with the first request: it takes mlx to load."""
        if self._engine is None:
            from localdpo.serve.engine import Engine

            self._engine = Engine()
        return self._engine

    # -- loading

    def _load(self, message: Load) -> None:
        self._outbox.put(Progress(id=message.id, text=f"loading {message.model}"))

        def notify(text: str) -> None:
            self._outbox.put(Progress(id=message.id, text=text))

        wanted = message.model, message.quantize, message.memory
        if self._base == wanted:  # whoever asked first did not wait for the answer
            future = self.engine.call(lambda loaded: loaded)
        else:
            self._base = wanted
            future = self.engine.load(message.model, quantize=message.quantize, memory=message.memory, notify=notify)
        future.add_done_callback(lambda done: self._loaded(message, done))

    def _loaded(self, message: Load, done: Future[LoadedModel]) -> None:
        from localdpo.serve.engine import context_length

        error = InputError(Problem("", "the host is closing")) if done.cancelled() else done.exception()
        if error is not None:
            self._base = None
            self._fail(message.id, error)
            return
        loaded = done.result()
        self._outbox.put(
            Loaded(
                id=message.id,
                model=message.model,
                fingerprint=loaded.fingerprint,
                parameters=loaded.num_parameters,
                context=context_length(loaded.config),
                device=loaded.device,
                memory=loaded.memory,
            )
        )

    # -- answering

    def _generate(self, message: Generate) -> None:
        from localdpo.model.sampling import SamplingOptions
        from localdpo.serve.engine import Query

        options = _options(message.options)
        asked = _Asked(open=message.candidates)
        with self._lock:
            if message.id in self._asked:
                raise ProtocolError(f"id {message.id} is still in use")
            self._asked[message.id] = asked
        adapter = Path(message.adapter) if message.adapter is not None else None
        for number in range(message.candidates):
            seed = None if options.get("seed") is None else options["seed"] + number
            query = Query(message.messages, SamplingOptions(**{**options, "seed": seed}), adapter)  # type: ignore[arg-type]
            job = self.engine.generate(query, self._deliver(message.id, number))
            with self._lock:
                asked.jobs.append(job)
                if asked.cancelled:
                    job.cancel()

    def _deliver(self, number: int, candidate: int) -> Callable[[Event], None]:
        """Return what takes the engine's events of one candidate; called on the engine's thread."""
        from localdpo.serve import engine

        tokens, speed, began = 0, 0.0, 0.0

        def deliver(event: Event) -> None:
            nonlocal tokens, speed, began
            match event:
                case engine.Started():
                    self._outbox.put(Started(id=number, candidate=candidate, prompt_tokens=event.prompt_tokens))
                case engine.Token():
                    # By the clock, as whoever reads along sees it: answers under way take turns.
                    now = time.monotonic()
                    began = began or now
                    speed = tokens / (now - began) if now > began else 0.0
                    tokens += 1
                    if event.text:
                        self._outbox.put(
                            Delta(
                                id=number, candidate=candidate, text=event.text, tokens=tokens, tokens_per_second=speed
                            )
                        )
                case engine.Ended():
                    problems = {} if event.error is None else failure(event.error)
                    self._outbox.put(
                        Ended(
                            id=number,
                            candidate=candidate,
                            reason=event.reason,
                            tokens=tokens,
                            tokens_per_second=speed,
                            **problems,
                        )
                    )
                    self._over(number)

        return deliver

    def _over(self, number: int) -> None:
        with self._lock:
            asked = self._asked[number]
            asked.open -= 1
            if asked.open == 0:
                del self._asked[number]

    def _cancel(self, number: int) -> None:
        with self._lock:
            asked = self._asked.get(number)
            if asked is None:
                self._counts_wanted.discard(number)
                return
            asked.cancelled = True
            for job in asked.jobs:
                job.cancel()

    # -- counting

    def _count_loop(self) -> None:
        while True:
            message = self._counting.get()
            try:
                if message.id not in self._counts_wanted:
                    raise InputError(Problem("", "nobody wants this count any more"))
                self._counts_wanted.discard(message.id)
                chat = self._chat_format(message.model)
                self._outbox.put(Counted(id=message.id, rows=[_count(chat, row) for row in message.rows]))
            except Exception as error:
                self._fail(message.id, error)

    def _chat_format(self, model: str) -> Any:
        """Return the chat format of a model on this machine, without its weights. Nothing is fetched for a count."""
        found = self._tokenizers.get(model)
        if found is None:
            from localdpo.data.chat import ChatFormat
            from localdpo.model.load import load_tokenizer
            from localdpo.model.resolve import cached_path
            from localdpo.model.safety import check_model_folder

            path = cached_path(model)
            if path is None:
                fix = f"`localdpo models get {model}` fetches it"
                raise InputError(Problem(model, "this model is not on this machine", fix))
            found = self._tokenizers[model] = ChatFormat(load_tokenizer(check_model_folder(path)))
        return found

    def close(self, timeout: float) -> None:
        """Cancel everything and end the engine's thread."""
        if self._engine is not None:
            self._engine.close(timeout)


def _options(options: dict[str, Any]) -> dict[str, Any]:
    """Return sampling options, checked. Raises InputError."""
    from localdpo.model.sampling import SamplingOptions

    known = {
        "max_tokens": int, "temperature": float, "top_p": float, "top_k": int, "min_p": float,
        "repetition_penalty": float, "seed": int,
    }  # fmt: skip
    problems = [
        Problem(key, "is no sampling option", f"They are {', '.join(known)}") for key in options if key not in known
    ]
    checked: dict[str, Any] = {}
    for key, value in options.items():
        if key == "seed" and value is None:
            continue
        kind = known.get(key, int)
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
            problems.append(Problem(key, f"{value!r:.60} is not a {'number' if kind is float else 'whole number'}"))
        else:
            checked[key] = value
    if problems:
        raise InputError(*problems)
    SamplingOptions(**checked)
    if not 0 <= checked.get("seed", 0) < 2**63:
        raise InputError(Problem("seed", f"{checked['seed']} is not within 0 to 2^63"))
    return checked


def _count(chat: Any, row: CountRow) -> RowCount:
    from localdpo.data.chat import Refusal

    try:
        encoded = chat.encode(row.messages, row.answers)
    except (Refusal, LocalDPOError) as error:
        return RowCount(problem=str(error))
    return RowCount(prompt=len(encoded.prompt_ids), answers=[len(ids) for ids in encoded.completions])


def _own_streams() -> tuple[BinaryIO, BinaryIO]:
    """Take stdin and stdout for the protocol, and leave libraries an empty stdin and stderr as their stdout."""
    source = os.fdopen(os.dup(0), "rb", buffering=1 << 16)
    out = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return source, out


def main() -> None:
    """Serve stdin and stdout until stdin ends."""
    source, out = _own_streams()
    outbox = Outbox(out)
    host = Host(source, outbox)
    host.serve()
    # Nobody is left to tell. An evaluation under way cannot be cut short, so the process ends without waiting.
    host.close(0.2)
    os._exit(0)


if __name__ == "__main__":
    main()
