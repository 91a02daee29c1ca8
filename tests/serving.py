"""A served model for tests: runs with random adapters on a tiny base, and the server on a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny

from localdpo.model.load import LoadedModel, load_model
from localdpo.model.lora import LoraSettings, attach_lora, detach_lora, save_adapter
from localdpo.serve.app import AccessLine, App, Settings
from localdpo.serve.engine import Engine
from localdpo.serve.guard import Guard, make_guard
from localdpo.serve.http import HttpServer, Limits
from localdpo.serve.offer import Offer

SECONDS = 300.0


def make_run(folder: Path, loaded: LoadedModel, seed: int, scale: float = 0.3) -> Path:
    """A run folder as training leaves it, as far as serving looks at it; the adapter is random."""
    info = attach_lora(loaded.model, LoraSettings(rank=4, scale=4.0))
    tiny.randomise_adapter(loaded.model, seed, scale)
    save_adapter(folder / "adapter", loaded.model, info, loaded)
    detach_lora(loaded.model)
    (folder / "run.json").write_text(json.dumps({"id": f"{seed:032x}", "model": {"spec": loaded.spec}}))
    (folder / "recipe.yaml").write_text(f"model: {loaded.spec}\ndata: {{train: pairs.jsonl}}\n")
    return folder


def make_runs(root: Path) -> Path:
    """A tiny model, and three runs: two of it and one of another base. Returns the folder of the runs."""
    base = load_model(str(tiny.tiny_model(root / "base", tie_word_embeddings=False)))
    other = load_model(str(tiny.tiny_model(root / "other", seed=7)))
    for name, loaded, seed in (("athene", base, 1), ("hermes", base, 2), ("stranger", other, 3)):
        make_run(root / "runs" / name, loaded, seed)
    return root / "runs"


@dataclass
class Server:
    """A server at work: where it is, what it logged."""

    port: int
    app: App
    http: HttpServer
    loop: asyncio.AbstractEventLoop
    lines: list[AccessLine | str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(SECONDS)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for what the server does next."""

        async def poll() -> None:
            async with asyncio.timeout(SECONDS):
                while not condition():
                    await asyncio.sleep(0.005)

        self.do(poll())


@contextmanager
def serving(
    engine: Engine,
    offer: Offer,
    *,
    guard: Guard | None = None,
    limits: Limits | None = None,
    settings: Settings | None = None,
) -> Iterator[Server]:
    """Run a server on a free port of loopback."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server")
    thread.start()
    lines: list[AccessLine | str] = []
    app = App(engine, offer, guard or make_guard("127.0.0.1"), log=lines.append, settings=settings)
    http = HttpServer(app.handle, admit=app.admit, closed=app.closed, limits=limits)
    server = Server(0, app, http, loop, lines)
    try:
        server.port = server.do(http.start("127.0.0.1", 0))[1]
        yield server
    finally:
        app.cancel()
        server.do(http.stop(5.0))
        loop.call_soon_threadsafe(loop.stop)
        thread.join(SECONDS)
        loop.close()
