"""Reporting a run to TensorBoard, Weights & Biases or Trackio, as ``train.report_to`` asks for.

Each tracker works in a process of its own (``reporting``) and gets the run's events through a pipe. Training never
waits for one but at its beginning and its end, for a bounded time, and no tracker can stop it: what goes wrong after
the first step becomes one warning. This module knows no tracker's interface and never loads mlx.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import IO, Any

from localdpo.errors import EnvironmentFault, Problem
from localdpo.paths import child_environment
from localdpo.recipe import Recipe, dump_recipe
from localdpo.train.events import EndEvent, Event, ProgressEvent, StartEvent, WarningEvent, event_line
from localdpo.train.run import RunFolder

__all__ = ["Trackers", "require_trackers"]

START_SECONDS = 20.0
"""A tracker that has said neither yes nor no by then is left to it, and training begins."""
CLOSE_SECONDS = 20.0
LINGER_SECONDS = 300.0
"""How long a tracker may go on by itself, when it has not sent everything by the end of the run."""
_LEAVE_SECONDS = 3.0
_WAITING_LINES = 100_000


def require_trackers(names: Sequence[str]) -> None:
    """Raise EnvironmentFault, exit code 3, naming every package of ``names`` that is not installed."""
    missing = [name for name in names if not _installed(name)]
    if missing:
        raise EnvironmentFault(
            *(
                Problem(
                    "train.report_to",
                    f"{name} is not installed",
                    f"Install it with: pip install 'localdpo[{name}]' (or uv pip install …), or leave it out",
                )
                for name in missing
            )
        )


def _installed(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    # A folder of that name, such as wandb makes for its files, is found as a package without a file.
    return spec is not None and spec.origin is not None


class Trackers:
    """The trackers of a run; a context manager around it."""

    def __init__(self, recipe: Recipe, run: RunFolder) -> None:
        self._recipe, self._run = recipe, run
        self._links: list[_Link] = []

    def __enter__(self) -> Trackers:
        """Start them; they load while the model does."""
        names = self._recipe.train.report_to
        if names:
            hello = {
                "folder": str(self._run.path.absolute()),
                "name": self._run.path.name,
                "id": self._run.info().get("id") or self._run.path.name,
                "recipe": _without_folders(self._recipe.model_dump(mode="json")),
                "yaml": dump_recipe(self._recipe),
            }
            self._links = [_Link(name, hello) for name in dict.fromkeys(names)]
        return self

    def __exit__(self, *exc: object) -> None:
        for link in self._links:
            link.end()
        limit = time.monotonic() + _LEAVE_SECONDS
        for link in self._links:
            link.wait("over", limit)

    def reported(self, work: Iterator[Event]) -> Iterator[Event]:
        """Pass on the events of ``work``, reporting each, with a warning for every tracker that fails.

        Raises EnvironmentFault when a tracker cannot start at all.
        """
        for event in work:
            if self._links:
                yield from self._report(event)
            yield event

    def _report(self, event: Event) -> list[WarningEvent]:
        if isinstance(event, ProgressEvent):
            return []
        if isinstance(event, StartEvent):
            self._require_started()
        line = event_line(event)
        for link in self._links:
            link.send(line)
        if isinstance(event, EndEvent):
            self._finish()
        failed = [link for link in self._links if link.error]
        self._links = [link for link in self._links if not link.error]
        return [_warning(link, event.step) for link in failed]

    def _require_started(self) -> None:
        limit = time.monotonic() + START_SECONDS
        for link in self._links:
            link.wait("ready", limit)
        problems = [
            Problem("train.report_to", f"{link.name} cannot start ({link.error})", _FIXES[link.name])
            for link in self._links
            if link.error
        ]
        if problems:
            raise EnvironmentFault(*problems)

    def _finish(self) -> None:
        for link in self._links:
            link.end()
        limit = time.monotonic() + CLOSE_SECONDS
        for link in self._links:
            if not link.wait("over", limit):
                link.error = (
                    f"it has not taken everything within {CLOSE_SECONDS:.0f} s of the end, and goes on by itself for "
                    f"{LINGER_SECONDS:.0f} s at most"
                )


def _without_folders(value: Any) -> Any:
    """The settings with no more of a path than its last part: folders name people and machines."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value


_FIXES = {
    "tensorboard": "Look at the run folder's disk space, or leave tensorboard out of train.report_to",
    "wandb": "Use `wandb login`, or set WANDB_MODE=offline and `wandb sync` later, or leave it out of train.report_to",
    "trackio": "Look at TRACKIO_DIR and the other TRACKIO_ variables, or leave trackio out of train.report_to",
}


def _warning(link: _Link, step: int) -> WarningEvent:
    return WarningEvent(
        step=step,
        code="tracker-failed",
        where=link.name,
        message=f"The run is no longer reported there: {link.error}. Training is not affected.",
        fix=f"{_FIXES[link.name]}. Everything is in metrics.jsonl of the run folder as well.",
    )


class _Link:
    """A tracker's process, a thread that writes to it and one that hears what it says."""

    def __init__(self, name: str, hello: dict[str, Any]) -> None:
        self.name = name
        self.error = ""
        self._waiting: queue.Queue[str | None] = queue.Queue(_WAITING_LINES)
        self._states = {"ready": threading.Event(), "over": threading.Event()}
        self._ended = False
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "localdpo.train.reporting", name, str(LINGER_SECONDS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                # Ctrl-C in the terminal is for the trainer, which then tells the tracker that it is over.
                start_new_session=True,
                env=child_environment(),
            )
        except OSError as error:
            self._failed(str(error))
            return
        self.send(json.dumps(hello) + "\n")
        assert process.stdin is not None
        assert process.stdout is not None
        for work, pipe in ((self._write, process.stdin), (self._hear, process.stdout)):
            threading.Thread(target=work, args=(process, pipe), name=f"{name} {work.__name__}", daemon=True).start()

    def send(self, line: str) -> None:
        """Pass on a line, without waiting."""
        if self.error or self._ended:
            return
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            self._failed(f"it does not keep up, {_WAITING_LINES:,} events are waiting")

    def end(self) -> None:
        """Say that nothing more comes."""
        if not self._ended:
            self._ended = True
            with suppress(queue.Full):
                self._waiting.put_nowait(None)

    def wait(self, state: str, limit: float) -> bool:
        """Wait until it is "ready" or "over", or has failed, or until ``limit`` on the monotonic clock."""
        return self._states[state].wait(max(0.0, limit - time.monotonic()))

    def _failed(self, error: str) -> None:
        self.error = self.error or " ".join(error.split())[:300]
        for state in self._states.values():
            state.set()

    def _write(self, _process: subprocess.Popen[str], pipe: IO[str]) -> None:
        with suppress(OSError, ValueError):
            while (line := self._waiting.get()) is not None:
                pipe.write(line)
                pipe.flush()
        with suppress(OSError, ValueError):
            pipe.close()

    def _hear(self, process: subprocess.Popen[str], pipe: IO[str]) -> None:
        said: dict[str, str] = {}
        with pipe:
            for line in pipe:
                with suppress(ValueError):
                    said = json.loads(line)
                if said.get("state") == "ready":
                    self._states["ready"].set()
        code = process.wait()
        if said.get("state") == "closed":
            self._states["over"].set()
        else:
            self._failed(said.get("error") or f"its process ended with code {code}")
