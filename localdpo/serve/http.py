"""A small HTTP/1.1 server on asyncio and h11, with limits on all that a client can make it hold or wait for.

Connections, bytes of header and body, and the time to send either are bounded; the time counts as a whole, so that
a byte now and then does not help. A handler hears when its client has left. It knows nothing about OpenAI or models;
what may be answered at all is decided by a function it is given, before a body is read.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import h11

__all__ = ["Exchange", "Handler", "HttpServer", "Limits", "Request"]

_READ = 1 << 16
_ERROR_WORDS = {400: "the request is not HTTP/1.1", 408: "the request took too long", 413: "the body is too large",
                431: "the header is too large", 503: "too many connections"}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What a client may take: bytes and seconds."""

    connections: int = 64
    header_bytes: int = 16 << 10
    body_bytes: int = 4 << 20
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 60.0
    send_seconds: float = 30.0


@dataclass
class Request:
    """A request; ``headers`` by lower-case name, ``body`` only once it has been read."""

    method: str
    target: str
    headers: dict[str, list[str]]
    client: str
    body: bytes = b""

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]


class Gone(Exception):
    """The client has left, or reads too slowly."""


@dataclass
class Exchange:
    """One request and the means to answer it. ``left`` is set once the client is gone."""

    request: Request
    _link: _Link
    status: int = 0
    note: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    began: float = field(default_factory=time.monotonic)

    async def send_json(self, status: int, body: Any) -> None:
        """Answer with a JSON body."""
        payload = json.dumps(body, ensure_ascii=False).encode()
        await self.send(status, payload, [("content-type", "application/json")])

    async def send(self, status: int, payload: bytes, headers: Iterable[tuple[str, str]] = ()) -> None:
        """Answer with a body."""
        await self._begin(status, [*headers, ("content-length", str(len(payload)))])
        await self._link.send(h11.Data(data=payload) if payload else None, h11.EndOfMessage())

    async def begin_events(self) -> None:
        """Begin an answer that is a stream of server-sent events."""
        await self._begin(200, [("content-type", "text/event-stream; charset=utf-8"), ("x-accel-buffering", "no")])

    async def send_event(self, text: str) -> None:
        """Send one event of the stream."""
        await self._link.send(h11.Data(data=f"data: {text}\n\n".encode()))

    async def send_comment(self, text: str) -> None:
        """Send what keeps a connection alive and means nothing."""
        await self._link.send(h11.Data(data=f": {text}\n\n".encode()))

    async def end_events(self) -> None:
        """End the stream."""
        await self._link.send(h11.EndOfMessage())

    async def _begin(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.status = status
        fixed = [("cache-control", "no-store"), ("x-content-type-options", "nosniff")]
        await self._link.send(h11.Response(status_code=status, headers=[*headers, *fixed, *self.headers]))


Handler = Callable[[Exchange], Awaitable[None]]


class HttpServer:
    """Listens, and gives each request to ``handler`` once ``admit`` has let it in.

    ``admit`` sees the request before its body is read; when it answers (``exchange.status`` is set), the connection
    is closed after it. ``closed`` hears of every exchange when it is over.
    """

    def __init__(
        self, handler: Handler, *, admit: Handler, closed: Callable[[Exchange], None], limits: Limits | None = None
    ) -> None:
        self.limits = limits or Limits()
        self.handler, self.admit, self.closed = handler, admit, closed
        self._server: asyncio.Server | None = None
        self._links: dict[asyncio.Task[None], _Link] = {}

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen; the address and port, which is a free one for port 0. Raises OSError."""
        infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        address = infos[0][4]
        self._server = await asyncio.start_server(self._accept, str(address[0]), int(address[1]), limit=_READ)
        name = self._server.sockets[0].getsockname()
        return str(name[0]), int(name[1])

    async def stop(self, grace: float) -> None:
        """Take no more requests, and let those under way end within ``grace`` seconds."""
        if self._server is not None:
            self._server.close()
        for link in self._links.values():
            link.end_when_idle()
        if self._links:
            await asyncio.wait(self._links, timeout=grace)
        await self.drop()

    async def drop(self) -> None:
        """Close every connection now."""
        tasks = list(self._links)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        link = _Link(self, reader, writer)
        full = len(self._links) >= self.limits.connections
        self._links[task] = link
        try:
            await (link.refuse(503) if full else link.run())
        except asyncio.CancelledError:
            pass  # the server stops
        except (Gone, OSError, h11.LocalProtocolError):
            pass
        finally:
            del self._links[task]
            await link.close()


class _Link:
    """One connection: its requests one after the other."""

    def __init__(self, server: HttpServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server = server
        self._limits = server.limits
        self._reader, self._writer = reader, writer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.header_bytes)
        peer = writer.get_extra_info("peername")
        self._client = str(peer[0]) if isinstance(peer, tuple) else "?"
        self._ending = False
        self._idle: asyncio.Timeout | None = None
        self._patience = self._limits.header_seconds  # for the first request; a client that had one may rest

    async def run(self) -> None:
        """Serve requests until the client leaves, errs, or the server ends."""
        try:
            while not self._ending and await self._wait_for_request():
                if not await self._exchange():
                    return
                self._http.start_next_cycle()
                self._patience = self._limits.idle_seconds
        except h11.RemoteProtocolError as error:
            await self.refuse(error.error_status_hint)
        except TimeoutError:
            await self.refuse(408)

    def end_when_idle(self) -> None:
        """Take no further request."""
        self._ending = True
        if self._idle is not None:
            self._idle.reschedule(0)

    async def refuse(self, status: int) -> None:
        """Answer what was never a request, as far as the connection still can."""
        with suppress(h11.LocalProtocolError, Gone, OSError):
            body = {"error": {"message": _ERROR_WORDS.get(status, "the request cannot be served"),
                              "type": "invalid_request_error", "param": None, "code": None}}  # fmt: skip
            payload = json.dumps(body).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(payload))),
                       ("connection", "close")]  # fmt: skip
            response = h11.Response(status_code=status, headers=headers)
            exchange = Exchange(Request("-", "-", {}, self._client), self, status=status)
            await self.send(response, h11.Data(data=payload), h11.EndOfMessage())
            self._server.closed(exchange)

    async def close(self) -> None:
        """Close the connection, giving the client a moment to read the answer to what it has not finished sending."""
        with suppress(OSError, TimeoutError, asyncio.CancelledError):
            if self._http.our_state is h11.MUST_CLOSE and self._writer.can_write_eof():
                self._writer.write_eof()
                async with asyncio.timeout(1):
                    while await self._reader.read(_READ):  # unread bytes would turn the close into a reset
                        pass
        self._writer.close()

    async def send(self, *events: h11.Event | None) -> None:
        """Send events. Raises Gone when the client has left or does not read."""
        for event in events:
            data = self._http.send(event) if event is not None else None
            if data:
                self._writer.write(data)
        try:
            async with asyncio.timeout(self._limits.send_seconds):
                await self._writer.drain()
        except (OSError, TimeoutError):
            self._writer.transport.abort()
            raise Gone from None

    async def _wait_for_request(self) -> bool:
        """Wait for the first byte; False when none comes."""
        if self._http.trailing_data[0]:
            return True
        try:
            async with asyncio.timeout(self._patience) as self._idle:
                data = await self._reader.read(_READ)
        except TimeoutError:
            return False
        finally:
            self._idle = None
        self._http.receive_data(data)
        return bool(data)

    async def _exchange(self) -> bool:
        """Read and answer one request; whether the connection can take another."""
        async with asyncio.timeout(self._limits.header_seconds):
            event = await self._next_event()
        if not isinstance(event, h11.Request):
            return False
        exchange = Exchange(_request(event, self._client), self)
        try:
            exchange.headers.append(("connection", "close"))  # for a refusal: the body is not read
            await self._server.admit(exchange)
            if exchange.status:
                return False
            exchange.headers.remove(("connection", "close"))
            if not await self._read_body(exchange):
                return False
            await self._answer(exchange)
        finally:
            self._server.closed(exchange)
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    async def _read_body(self, exchange: Exchange) -> bool:
        """Read the body; False when it was refused."""
        announced = exchange.request.headers.get("content-length", ["0"])[0]
        if int(announced) <= self._limits.body_bytes:
            if self._http.they_are_waiting_for_100_continue:
                await self.send(h11.InformationalResponse(status_code=100, headers=[]))
            try:
                async with asyncio.timeout(self._limits.body_seconds):
                    body = await self._collect()
            except TimeoutError:
                await self._refuse_in(exchange, 408)
                return False
            if body is not None:
                exchange.request.body = body
                return True
        await self._refuse_in(exchange, 413)
        return False

    async def _refuse_in(self, exchange: Exchange, status: int) -> None:
        exchange.headers.append(("connection", "close"))
        body = {"message": _ERROR_WORDS[status], "type": "invalid_request_error", "param": None, "code": None}
        await exchange.send_json(status, {"error": body})

    async def _collect(self) -> bytes | None:
        body = bytearray()
        while not isinstance(event := await self._next_event(), h11.EndOfMessage):
            if not isinstance(event, h11.Data):
                raise Gone
            body += event.data
            if len(body) > self._limits.body_bytes:
                return None
        return bytes(body)

    async def _answer(self, exchange: Exchange) -> None:
        watcher = asyncio.create_task(self._watch(exchange))
        try:
            await self._server.handler(exchange)
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    async def _watch(self, exchange: Exchange) -> None:
        """Notice that the client leaves while its answer is made; keep what it sends ahead of time."""
        ahead = 0
        try:
            while ahead <= _READ and (data := await self._reader.read(_READ)):
                self._http.receive_data(data)
                ahead += len(data)
        except OSError:
            pass
        exchange.left.set()

    async def _next_event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._reader.read(_READ))
        return event


def _request(event: h11.Request, client: str) -> Request:
    headers: dict[str, list[str]] = {}
    for name, value in event.headers:
        headers.setdefault(name.decode("ascii"), []).append(value.decode("latin-1"))
    return Request(event.method.decode("ascii"), event.target.decode("latin-1"), headers, client)
