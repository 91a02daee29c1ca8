"""The OpenAI-compatible service: routes, refusals, streams and their ends, between `http` and the `engine`.

A client that leaves stops its answer before the next token. Answers take turns in the engine; beyond a number of
requests under way, more are refused with 503, which OpenAI's clients try again by themselves. The access log names
method, path, status, model, token counts and time: no text, no header, no token.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import unquote

from localdpo.errors import InputError, LocalDPOError
from localdpo.serve.api import (
    ApiError,
    Ask,
    FinishReason,
    Reply,
    StopFilter,
    error_body,
    model_body,
    parse_chat,
    parse_text,
)
from localdpo.serve.engine import Ended, Engine, Event, Job, PromptTooLong, Query, Started
from localdpo.serve.guard import Guard
from localdpo.serve.http import Exchange, Gone
from localdpo.serve.offer import Offer, Served
from localdpo.text import sanitise

__all__ = ["AccessLine", "App", "Settings"]

_METHODS = {
    "/health": "GET",
    "/v1/models": "GET",
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
}
_PUBLIC = "/health"
_KEEP_ALIVE_SECONDS = 10.0
_PREFLIGHT_SECONDS = "600"


@dataclass(frozen=True)
class Settings:
    """max_tokens: of an answer, where a request names none. seconds: of a request in all. requests: under way."""

    max_tokens: int = 512
    seconds: float = 600.0
    requests: int = 32


@dataclass(frozen=True)
class AccessLine:
    """What the log says of a request; the path is safe to show."""

    client: str
    method: str
    path: str
    status: int
    seconds: float
    note: str

    def __str__(self) -> str:
        note = f" {self.note}" if self.note else ""
        return f"{self.client} {self.method} {self.path} {self.status}{note} {self.seconds:.2f} s"


class App:
    """Answers requests with an engine's model."""

    def __init__(
        self,
        engine: Engine,
        offer: Offer,
        guard: Guard,
        *,
        log: Callable[[AccessLine | str], None],
        settings: Settings | None = None,
    ) -> None:
        """``log`` gets a line for each request, and a sentence for each fault of this side."""
        self._engine, self._offer, self._guard, self._log = engine, offer, guard, log
        self._settings = settings or Settings()
        self._jobs: set[Job] = set()
        self._requests = 0
        self._stopping = False

    @property
    def under_way(self) -> int:
        """How many answers are asked for and not finished."""
        return self._requests

    def refuse_new(self) -> None:
        """Refuse answers from now on."""
        self._stopping = True

    def cancel(self) -> None:
        """Cut short every answer under way."""
        for job in self._jobs:
            job.cancel()

    def closed(self, exchange: Exchange) -> None:
        """Write the access log."""
        request = exchange.request
        seconds = time.monotonic() - exchange.began
        path, method = _line(request.path[:120]), _line(request.method[:20])
        self._log(AccessLine(request.client, method, path, exchange.status, seconds, _line(exchange.note)))

    async def admit(self, exchange: Exchange) -> None:
        """Answer a request that must not be served; leave others alone."""
        request = exchange.request
        preflight = request.method == "OPTIONS"
        refused = self._guard.check(request.headers, public=preflight or request.path == _PUBLIC)
        if refused is not None:
            kind = "authentication_error" if refused.status == 401 else "permission_error"
            error = ApiError(refused.status, refused.message, code=refused.code, kind=kind)
            if refused.status == 401:
                exchange.headers.append(("www-authenticate", "Bearer"))
            await exchange.send_json(error.status, error_body(error))
            return
        origin = request.headers.get("origin")
        if origin:
            exchange.headers += [("access-control-allow-origin", origin[0]), ("vary", "origin")]
        try:
            self._check_route(exchange)
        except ApiError as error:
            await exchange.send_json(error.status, error_body(error))

    async def handle(self, exchange: Exchange) -> None:
        """Answer a request that was admitted."""
        try:
            await self._route(exchange)
        except ApiError as error:
            await self._fail(exchange, error)
        except Gone:
            exchange.note = f"{exchange.note}, client left".lstrip(", ")
            raise
        except Exception as error:
            self._log(f"internal error: {type(error).__name__}: {sanitise(str(error))[:300]}")
            await self._fail(exchange, ApiError(500, "the server failed at this request; its log says more"))

    def _check_route(self, exchange: Exchange) -> None:
        request = exchange.request
        path = "/v1/models" if request.path.startswith("/v1/models/") else request.path
        method = _METHODS.get(path)
        if method is None:
            known = ", ".join(_METHODS)
            raise ApiError(404, f"there is nothing at this path; there are {known}", code="not_found")
        if request.method == "OPTIONS":
            return
        if request.method != method:
            exchange.headers.append(("allow", method))
            raise ApiError(405, f"this path takes {method}", code="method_not_allowed")
        kind = (request.headers.get("content-type") or [""])[0].partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":  # what a page can send without asking is not JSON
            raise ApiError(415, "the body must be JSON, with the header Content-Type: application/json")

    async def _route(self, exchange: Exchange) -> None:
        request = exchange.request
        match request.method, request.path:
            case "OPTIONS", _:
                await self._preflight(exchange)
            case "GET", "/health":
                await exchange.send_json(200, {"status": "ok"})
            case "GET", path:
                await exchange.send_json(200, self._models(unquote(path.removeprefix("/v1/models").lstrip("/"))))
            case _, "/v1/chat/completions":
                await self._serve(exchange, parse_chat(request.body, self._settings.max_tokens))
            case _:
                await self._serve(exchange, parse_text(request.body, self._settings.max_tokens))

    async def _preflight(self, exchange: Exchange) -> None:
        headers = [
            ("access-control-allow-methods", "GET, POST"),
            ("access-control-allow-headers", "authorization, content-type"),
            ("access-control-max-age", _PREFLIGHT_SECONDS),
        ]
        # A client library adds headers of its own kind to say what it is: they change nothing here.
        asked = exchange.request.headers.get("access-control-request-headers", [""])[0]
        extra = [name.strip() for name in asked.split(",") if name.strip().lower().startswith("x-stainless-")]
        if extra and all(name.replace("-", "").isalnum() for name in extra):
            headers[1] = (headers[1][0], ", ".join([headers[1][1], *extra]))
        await exchange.send(204, b"", headers)

    def _models(self, wanted: str) -> dict[str, Any]:
        if wanted:
            served = self._find(wanted)
            return model_body(served.name, served.created)
        return {"object": "list", "data": [model_body(m.name, m.created) for m in self._offer.models().values()]}

    def _find(self, name: str) -> Served:
        models = self._offer.models()
        if name not in models:
            raise ApiError(
                404, f"there is no model {name[:100]!r}; there are {', '.join(models)}", param="model",
                code="model_not_found",
            )  # fmt: skip
        return models[name]

    async def _serve(self, exchange: Exchange, ask: Ask) -> None:
        served = self._find(ask.model)
        exchange.note = served.name
        if self._stopping:
            raise ApiError(503, "the server is stopping", code="server_stopping")
        if self._requests >= self._settings.requests:
            exchange.headers.append(("retry-after", "1"))
            raise ApiError(503, f"{self._requests} requests are under way; try again", code="server_busy")
        self._requests += 1
        try:
            await self._attach(served)
            query = Query(cast(Any, ask.prompt), ask.options, served.adapter)
            answer = _Answer(self._engine, query, ask.stop, exchange, exchange.began + self._settings.seconds)
            self._jobs.add(answer.job)
            reply = Reply(ask)
            try:
                reply.prompt_tokens = await answer.started()
                await (self._stream(exchange, reply, answer) if ask.stream else self._whole(exchange, reply, answer))
            finally:
                answer.close()
                self._jobs.discard(answer.job)
                exchange.note = f"{served.name} {reply.prompt_tokens}+{reply.completion_tokens} tokens"
        finally:
            self._requests -= 1

    async def _attach(self, served: Served) -> None:
        """See that the adapter can be used, so that its faults are not taken for the request's."""
        if served.adapter is None:
            return
        try:
            await asyncio.wrap_future(self._engine.attach(served.adapter))
        except LocalDPOError as error:
            self._log(sanitise(str(error)))
            message = f"the adapter of {served.name} cannot be used; the server's log says why"
            raise ApiError(503, message, param="model", code="model_unavailable") from None

    async def _whole(self, exchange: Exchange, reply: Reply, answer: _Answer) -> None:
        pieces = []
        reason: FinishReason | None = None
        while reason is None:
            text, reason = await answer.piece(reply)
            pieces.append(text)
        await exchange.send_json(200, reply.whole("".join(pieces), reason))

    async def _stream(self, exchange: Exchange, reply: Reply, answer: _Answer) -> None:
        await exchange.begin_events()
        opening = reply.opening()
        if opening is not None:
            await exchange.send_event(_dump(opening))
        reason: FinishReason | None = None
        while reason is None:
            text, reason = await answer.piece(reply)
            if text:
                await exchange.send_event(_dump(reply.chunk(text)))
        await exchange.send_event(_dump(reply.chunk("", reason)))
        closing = reply.closing()
        if closing is not None:
            await exchange.send_event(_dump(closing))
        await exchange.send_event("[DONE]")
        await exchange.end_events()

    async def _fail(self, exchange: Exchange, error: ApiError) -> None:
        """Say what went wrong: as a status, or as an event where the answer has begun."""
        if not exchange.status:
            await exchange.send_json(error.status, error_body(error))
            return
        await exchange.send_event(_dump(error_body(error)))
        await exchange.end_events()


class _Answer:
    """A job of the engine as this loop sees it: one piece of text after the other."""

    def __init__(
        self, engine: Engine, query: Query, stops: tuple[str, ...], exchange: Exchange, deadline: float
    ) -> None:
        """``deadline`` is a time of `time.monotonic`."""
        self._exchange, self._deadline = exchange, deadline
        self._stops = StopFilter(stops)
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.job = engine.generate(query, self._deliver)
        self._leaving = asyncio.create_task(self._hear_leaving())

    def close(self) -> None:
        """End the job, whatever its state."""
        self.job.cancel()
        self._leaving.cancel()

    async def started(self) -> int:
        """Wait until the prompt is being read; the number of its tokens."""
        event = await self._next()
        if isinstance(event, Started):
            return event.prompt_tokens
        raise _failure(event)

    async def piece(self, reply: Reply) -> tuple[str, FinishReason | None]:
        """The next text that is certain, which may be empty, and the reason when it is the last."""
        event = await self._next()
        if isinstance(event, Ended):
            raise _failure(event)
        reply.completion_tokens += 1
        text = self._stops.feed(cast(Any, event).text)
        if self._stops.found:
            return text, "stop"
        reason = cast(Any, event).finish_reason
        return (text + self._stops.close(), reason) if reason is not None else (text, None)

    async def _next(self) -> Event:
        """The next event. Raises Gone when the client has left, ApiError when time is up."""
        while True:
            left = self._deadline - time.monotonic()
            try:
                async with asyncio.timeout(min(max(left, 0.0), _KEEP_ALIVE_SECONDS)):
                    event = await self._events.get()
            except TimeoutError:
                if left <= _KEEP_ALIVE_SECONDS:
                    raise ApiError(504, "the answer took longer than this server allows", code="timeout") from None
                if self._exchange.status:
                    await self._exchange.send_comment("still reading")
                continue
            if event is None:
                raise Gone
            return event

    def _deliver(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def _hear_leaving(self) -> None:
        await self._exchange.left.wait()
        self.job.cancel()
        self._events.put_nowait(None)


def _failure(end: Event) -> ApiError:
    """What a client is told when its answer could not be made."""
    error = end.error if isinstance(end, Ended) else None
    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, InputError):
        return ApiError(400, str(error), param="messages")
    if error is not None:
        raise error
    return ApiError(503, "the server is stopping", code="server_stopping")


def _line(text: str) -> str:
    return sanitise(text).replace("\n", "␊").replace("\t", "␉")


def _dump(body: Any) -> str:
    return json.dumps(body, ensure_ascii=False)
