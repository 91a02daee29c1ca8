"""One base model, the adapters of runs, and the one thread that computes: what all servers of localdpo share.

mlx keeps its streams per thread, so one thread loads the model, switches adapters and makes every token. The base
is loaded once; each adapter's layers are made when they are first asked for and swapped in and out, which copies
nothing. Answers under way take turns, a token each, so that a short one need not wait for a long one; each is the
answer it would be alone, sampled ones included, and takes the same way as `localdpo chat` (`model.generate.stream`).

    engine = Engine()
    engine.load("smollm2-135m").result()
    job = engine.generate(Query(messages, SamplingOptions(), adapter=run.adapter), deliver)
    job.cancel()                                   # from any thread: it ends before its next token
    engine.call(lambda loaded: loaded.num_parameters).result()
    engine.close()

`deliver` gets `Started`, then `Token` after `Token`, then one `Ended`. It is called on the engine's thread and must
not block: it hands over, as `loop.call_soon_threadsafe` or a queue does. The engine knows nothing of sockets, JSON
or run folders, and shows nothing to anybody: text is delivered as the model wrote it.
"""

from __future__ import annotations

import gc
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn

from localdpo.data.chat import require_embedded
from localdpo.data.encode import encode_prompt
from localdpo.data.pairs import Message
from localdpo.errors import InputError, Problem
from localdpo.model.generate import SamplingOptions, Token, stream
from localdpo.model.load import LoadedModel, Memory, load_model
from localdpo.model.lora import CONFIG_FILE, WEIGHTS_FILE, detach_lora, load_adapter, reattach_lora
from localdpo.model.resolve import Notify
from localdpo.model.safety import config_parts

__all__ = ["Ended", "Engine", "Event", "Job", "PromptTooLong", "Query", "Started", "Token", "context_length"]

T = TypeVar("T")
Modules = list[tuple[str, nn.Module]]

ACTIVE_ANSWERS = 4  # each holds a cache of its own; others wait in line
KEPT_ADAPTERS = 8


class PromptTooLong(InputError):
    """The prompt leaves no room for an answer in the model's context."""


@dataclass(frozen=True)
class Query:
    """What to answer: chat messages, text to continue, or token ids; by the base, or with the adapter of a folder."""

    prompt: Sequence[Message] | str | Sequence[int]
    options: SamplingOptions
    adapter: Path | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt has this many tokens, and is being read."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The last event of a job. ``error`` is set when it failed: a LocalDPOError is the user's, others are ours."""

    reason: Literal["stop", "length", "cancelled", "error"]
    error: Exception | None = None


Event = Started | Token | Ended


class Job:
    """An answer asked for."""

    def __init__(self, query: Query, deliver: Callable[[Event], None]) -> None:
        self.query = query
        self._deliver = deliver
        self._cancelled = False
        self.modules: Modules = []
        self.tokens: Iterator[Token] = iter(())

    def cancel(self) -> None:
        """Stop before the next token, or before the next piece of a long prompt; may be called at any time."""
        self._cancelled = True

    def cancelled(self) -> bool:
        """Whether nobody wants the answer any more."""
        return self._cancelled

    def tell(self, event: Event) -> None:
        """Deliver an event; a listener that fails is gone, which cancels."""
        try:
            self._deliver(event)
        except Exception:
            self._cancelled = True


class Engine:
    """A thread with a model; see the module's text. Every method may be called from any other thread.

    What is asked of a closed engine is a cancelled future, or a job that ends as cancelled.
    """

    def __init__(self, active: int = ACTIVE_ANSWERS) -> None:
        """``active`` is how many answers are under way at once."""
        self._limit = active
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._open = True
        self._lock = threading.Lock()  # so that nothing is asked of an engine that has looked for the last time
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._loaded: LoadedModel | None = None
        self._adapters = _Adapters()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def load(
        self, spec: str, *, quantize: int | None = None, memory: Memory = "auto", notify: Notify | None = None
    ) -> Future[LoadedModel]:
        """Load a base in place of the one there is, whose answers are cancelled. Fails as ``load_model`` does."""
        return self._ask(lambda: self._load(spec, quantize, memory, notify))

    def attach(self, adapter: Path) -> Future[None]:
        """Read an adapter now, to know that it is whole and fits the base. Fails as ``load_adapter`` does."""
        return self._ask(lambda: self._attach(adapter))

    def call(self, work: Callable[[LoadedModel], T]) -> Future[T]:
        """Run ``work`` between two tokens, with the base alone (no adapter on the model)."""
        return self._ask(lambda: self._call(work))

    def generate(self, query: Query, deliver: Callable[[Event], None]) -> Job:
        """Put an answer in line. Every job ends with one ``Ended``, also when the engine is closed."""
        job = Job(query, deliver)
        if self._ask(lambda: self._waiting.append(job)).cancelled():
            job.tell(Ended("cancelled"))
        return job

    def close(self, timeout: float | None = None) -> bool:
        """Cancel what is under way and end the thread, waiting for it; False when it did not end in time."""
        with self._lock:
            self._open = False
            self._commands.put(lambda: None)  # wakes it
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _ask(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            if self._open:
                self._commands.put(run)
            else:
                future.cancel()
        return future

    def _work(self) -> None:
        while self._open:
            self._take_commands(wait=not self._active and not self._waiting)
            while self._waiting and len(self._active) < self._limit:
                self._begin(self._waiting.popleft())
            for job in sorted(self._active, key=lambda job: str(job.query.adapter)):  # few changes of adapter
                self._step(job)
        self._take_commands(wait=False)
        self._cancel_all()
        # Arrays and streams go where they were made, before the thread is gone: left to the end of the process,
        # mlx sometimes aborts it.
        self._drop()
        mx.clear_streams()

    def _take_commands(self, wait: bool) -> None:
        try:
            self._commands.get(block=wait)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            pass

    def _begin(self, job: Job) -> None:
        try:
            if job.cancelled():
                job.tell(Ended("cancelled"))
                return
            loaded = self._base()
            job.modules = self._adapters.modules(loaded, job.query.adapter)
            ids = _encode(loaded, job.query.prompt)
            options = job.query.options
            room = context_length(loaded.config) - len(ids)
            if room < 1:
                raise PromptTooLong(_too_long(len(ids), context_length(loaded.config)))
            options = replace(options, max_tokens=min(options.max_tokens, room))
            job.tokens = stream(loaded, ids, options, job.cancelled)
            self._active.append(job)
            job.tell(Started(len(ids)))
        except Exception as error:
            job.tell(Ended("error", error))

    def _step(self, job: Job) -> None:
        """Make the next token of a job; its end, too, when this was the last."""
        try:
            self._adapters.put_on(self._base(), job.modules)
            token = None if job.cancelled() else next(job.tokens, None)
        except Exception as error:
            self._end(job, Ended("error", error))
            return
        if token is None:
            self._end(job, Ended("cancelled"))
            return
        job.tell(token)
        if token.finish_reason is not None:
            self._end(job, Ended(token.finish_reason))

    def _end(self, job: Job, end: Ended) -> None:
        self._active.remove(job)
        cast(Any, job.tokens).close()
        job.tokens, job.modules = iter(()), []
        job.tell(end)

    def _cancel_all(self) -> None:
        for job in list(self._active):
            self._end(job, Ended("cancelled"))
        while self._waiting:
            self._waiting.popleft().tell(Ended("cancelled"))

    def _base(self) -> LoadedModel:
        if self._loaded is None:
            raise InputError(Problem("", "no model is loaded"))
        return self._loaded

    def _load(self, spec: str, quantize: int | None, memory: Memory, notify: Notify | None) -> LoadedModel:
        self._cancel_all()
        self._drop()  # first: two bases at once may not fit
        self._loaded = load_model(spec, quantize=quantize, memory=memory, notify=notify)
        return self._loaded

    def _drop(self) -> None:
        self._loaded = None
        self._adapters = _Adapters()
        gc.collect()
        mx.clear_cache()

    def _attach(self, adapter: Path) -> None:
        self._adapters.modules(self._base(), adapter)

    def _call(self, work: Callable[[LoadedModel], T]) -> T:
        loaded = self._base()
        self._adapters.put_on(loaded, [])
        return work(loaded)


class _Adapters:
    """The adapters made so far for one base, and which of them is on it."""

    def __init__(self) -> None:
        self._made: OrderedDict[Path, tuple[object, Modules]] = OrderedDict()
        self._on: Modules = []

    def modules(self, loaded: LoadedModel, folder: Path | None) -> Modules:
        """The layers of an adapter, read again when its files have changed; none for the base."""
        if folder is None:
            return []
        key, stamp = folder.absolute(), _stamp(folder)
        made = self._made.get(key)
        if made is None or made[0] != stamp:
            self.put_on(loaded, [])
            try:
                load_adapter(folder, loaded)
            finally:
                modules = detach_lora(loaded.model)
            made = self._made[key] = (stamp, modules)
        self._made.move_to_end(key)
        while len(self._made) > KEPT_ADAPTERS:
            self._made.popitem(last=False)
        return made[1]

    def put_on(self, loaded: LoadedModel, modules: Modules) -> None:
        """Make the model answer with these layers."""
        if modules is not self._on and (modules or self._on):
            reattach_lora(loaded.model, modules)
            self._on = modules


def context_length(config: dict[str, Any]) -> int:
    """The tokens that prompt and answer may have together; a large number where the model does not say."""
    for values in config_parts(config):
        length = values.get("max_position_embeddings")
        if type(length) is int and length > 0:
            return length
    return 1 << 20


def _stamp(folder: Path) -> object:
    """What changes when the adapter is replaced; None when there is none, which loading it will say."""
    try:
        files = [(folder / name).stat() for name in (WEIGHTS_FILE, CONFIG_FILE)]
    except OSError:
        return None
    return [(status.st_ino, status.st_size, status.st_mtime_ns) for status in files]


def _encode(loaded: LoadedModel, prompt: Sequence[Message] | str | Sequence[int]) -> list[int]:
    """Token ids of a prompt. Raises InputError for one that is empty or that the template refuses."""
    if isinstance(prompt, str):
        return _encode_text(loaded, prompt)
    if not prompt:
        raise InputError(Problem("the prompt", "it is empty"))
    if isinstance(prompt[0], dict):
        return [int(token) for token in encode_prompt(cast(Sequence[Message], prompt), loaded.tokenizer)]
    ids = [int(token) for token in cast(Sequence[int], prompt)]
    size = len(loaded.tokenizer)
    if not all(0 <= token < size for token in ids):
        raise InputError(Problem("the prompt", f"token ids must be within 0 to {size - 1}"))
    return ids


def _encode_text(loaded: LoadedModel, text: str) -> list[int]:
    """As mlx-lm does: with the tokens that start a text, unless it starts with them already."""
    bos = loaded.tokenizer.bos_token
    ids = loaded.tokenizer.encode(text, add_special_tokens=bos is None or not text.startswith(bos))
    require_embedded(loaded.tokenizer, ids)
    if not ids:
        raise InputError(Problem("the prompt", "it is empty"))
    return [int(token) for token in ids]


def _too_long(tokens: int, context: int) -> Problem:
    return Problem(
        "the prompt", f"it has {tokens:,} tokens, and this model's context has {context:,}", "Shorten the conversation"
    )
