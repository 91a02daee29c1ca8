"""`localdpo serve`: loads the model, says where it can be reached, and writes the access log to standard error."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localdpo.console.fetch import fetch
from localdpo.console.talk import Target, find_target
from localdpo.console.terminal import say
from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.paths import cache_dir
from localdpo.text import inert_json, sanitise

if TYPE_CHECKING:
    from localdpo.model.load import LoadedModel
    from localdpo.serve.app import AccessLine, App
    from localdpo.serve.engine import Engine
    from localdpo.serve.guard import Guard
    from localdpo.serve.http import HttpServer
    from localdpo.serve.offer import Offer

GRACE_SECONDS = 10.0
_CLOSE_SECONDS = 10.0
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Options:
    """How to listen and to whom; see `localdpo serve --help`."""

    host: str = "127.0.0.1"
    port: int = 8080
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    max_tokens: int = 512
    seconds: float = 600.0
    json_lines: bool = False


def run(folder: Path | None, model: str | None, options: Options) -> int:
    """Serve until a signal; the exit code. Raises what finding, loading and listening raise."""
    from localdpo.serve.engine import Engine

    guard, source = _guard(options)
    target = find_target(folder, model)
    fetch(target.model)
    engine = Engine()
    try:
        loaded = engine.load(target.model, quantize=target.quantize, memory=target.memory).result()
        if target.adapter is not None:
            engine.attach(target.adapter).result()
        offer = _offer(folder, target, loaded)
        code = 128 + asyncio.run(_Service(engine, offer, guard, options, source).run())
        if not engine.close(_CLOSE_SECONDS):
            os._exit(code)  # in the middle of a long step: Python would wait for it
        return code
    finally:
        engine.close(_CLOSE_SECONDS)


def _guard(options: Options) -> tuple[Guard, str]:
    """The guard, and where its token is from; there is none on loopback unless the environment has one."""
    from localdpo.serve.guard import TOKEN_VARIABLE, is_loopback, make_guard, read_or_make_token

    token, source = None, ""
    if not is_loopback(options.host) or os.environ.get(TOKEN_VARIABLE):
        token, source = read_or_make_token(cache_dir() / "serve-token")
    return make_guard(options.host, options.hosts, options.origins, token), source


def _offer(folder: Path | None, target: Target, loaded: LoadedModel) -> Offer:
    from localdpo.serve.offer import Offer

    source = loaded.source
    base = source.name if source.kind == "folder" else source.spec
    if folder is None or target.adapter is None:
        return Offer(base, loaded.fingerprint)
    place = folder.absolute()
    if target.adapter == folder:  # an adapter by itself: what lies beside it are no runs
        return Offer(base, loaded.fingerprint, {place.name: target.adapter})
    return Offer(base, loaded.fingerprint, {place.name: target.adapter.absolute()}, place.parent)


class _Service:
    """The server while it runs."""

    def __init__(self, engine: Engine, offer: Offer, guard: Guard, options: Options, source: str) -> None:
        from localdpo.serve.app import App, Settings
        from localdpo.serve.http import HttpServer

        self._options, self._offer, self._token_source = options, offer, source
        settings = Settings(max_tokens=options.max_tokens, seconds=options.seconds)
        self._app: App = App(engine, offer, guard, log=self._log, settings=settings)
        self._http: HttpServer = HttpServer(self._app.handle, admit=self._app.admit, closed=self._app.closed)
        self._received = 0

    async def run(self) -> int:
        """Serve until a signal, and return its number. Raises EnvironmentFault when it cannot listen."""
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            host, port = await self._http.start(self._options.host, self._options.port)
        except OSError as error:
            raise _cannot_listen(self._options, error) from None
        for number in _STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._stopper(number, stop))
        self._say_ready(f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1")
        await stop.wait()
        await self._stop()
        return self._received

    def _stopper(self, number: int, stop: asyncio.Event) -> Callable[[], None]:
        def received() -> None:
            if self._received:
                os._exit(128 + number)
            self._received = number
            stop.set()

        return received

    async def _stop(self) -> None:
        """Let the answers under way end, for a while; then cut them short, each with a word to its client."""
        self._app.refuse_new()
        if self._app.under_way:
            self._say(f"stopping; answers under way: {self._app.under_way}. A second signal leaves at once.")
        ending = asyncio.create_task(self._http.stop(GRACE_SECONDS + 2))
        await asyncio.wait([ending], timeout=GRACE_SECONDS)
        self._app.cancel()
        await ending

    def _say_ready(self, url: str) -> None:
        names = list(self._offer.models())
        if self._options.json_lines:
            print(inert_json({"event": "ready", "url": url, "models": names}), flush=True)
            return
        say(f"serving at {url}", f"models: {', '.join(names)}")
        if self._token_source:
            print(f"a token is needed; it is in {sanitise(self._token_source)}")
        elsewhere = self._offer.elsewhere()
        if elsewhere:
            print(f"not served, being of another base: {sanitise(', '.join(elsewhere))}")
        print("Ctrl-C stops.", flush=True)

    def _log(self, entry: AccessLine | str) -> None:
        if self._options.json_lines and not isinstance(entry, str):
            line = {"event": "request", "time": round(time.time(), 3), **asdict(entry)}
            print(inert_json(line), flush=True)
        else:
            self._say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {entry}")

    def _say(self, text: str) -> None:
        print(sanitise(text), file=sys.stderr, flush=True)


def _cannot_listen(options: Options, error: OSError) -> InputError | EnvironmentFault:
    where = f"{options.host}:{options.port}"
    if isinstance(error, socket.gaierror):
        return InputError(Problem("--host", f"{options.host!r} is no address of this machine"))
    reason = os.strerror(error.errno) if error.errno else str(error)
    return EnvironmentFault(Problem(where, f"cannot listen there ({reason})", "Choose another with --port or --host"))
