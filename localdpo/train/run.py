"""The run folder: the contract between a trainer and everything that looks at a run.

One trainer at a time owns the folder through a lock that dies with its process
(:class:`ActiveRun`); any number of viewers read it and may ask for a pause or a stop
(:class:`RunFolder`). This module knows files and states. It knows no models and never loads mlx.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import psutil
from filelock import FileLock, Timeout

from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.files import atomic_write, environment_faults, write_json
from localdpo.paths import follow, follow_recipe
from localdpo.train.events import Event, EventChunk, ProgressEvent, SampleEvent, event_line, read_events

Request = Literal["resume", "pause", "stop"]

ACTIVE_STATES = frozenset({"starting", "training", "paused", "finishing"})
_PIECE = 1 << 20  # bytes
STATUS_SECONDS = 0.5
"""status.json is replaced no more often than this, unless the state changes."""


@dataclass(frozen=True, slots=True)
class Status:
    """What a run is doing now.

    ``state``: starting, training, paused, finishing; finished, stopped, diverged, failed; or
    interrupted, when its trainer is gone without a word. ``fraction`` is that of ``stage``.
    ``attempt`` grows with every resume. Times are seconds since 1970.
    """

    state: str = "starting"
    stage: str = ""
    fraction: float = 0.0
    step: int = 0
    total_steps: int = 0
    eta_seconds: float | None = None
    reason: str = ""
    message: str = ""
    best_step: int | None = None
    best_loss: float | None = None
    adapter_step: int | None = None
    attempt: int = 0
    pid: int = 0
    host: str = ""
    started: float = 0.0
    updated: float = 0.0


class Control:
    """Requests to a trainer in this process; plain assignments, so a signal handler may make them."""

    def __init__(self) -> None:
        self._request: Request = "resume"

    @property
    def request(self) -> Request:
        """The latest request; "resume" when there is none."""
        return self._request

    def stop(self) -> None:
        """Finish the step, save, end. Stays in force whatever comes after it."""
        self._request = "stop"

    def pause(self) -> None:
        """Finish the step, save, wait."""
        self.ask("pause")

    def resume(self) -> None:
        """Go on after a pause."""
        self.ask("resume")

    def ask(self, request: Request) -> None:
        """Make a request by its name."""
        if self._request != "stop":
            self._request = request


class RunFolder:
    """The files of a run at ``path``, for reading. Nothing here needs the folder to exist or to be whole."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.info_file = self.path / "run.json"
        self.recipe_file = self.path / "recipe.yaml"
        self.pairs_file = self.path / "pairs.jsonl"
        self.retain_file = self.path / "retain.jsonl"
        self.metrics_file = self.path / "metrics.jsonl"
        self.samples_file = self.path / "samples.jsonl"
        self.status_file = self.path / "status.json"
        self.control_file = self.path / "control"
        self.lock_file = self.path / "lock"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.start = self.path / "start"

    def info(self) -> dict[str, Any]:
        """What the run was started with (run.json); empty when this is no run folder.

        The file may come from anywhere: parts that have another form than this program writes are left out.
        """
        info = {key: value for key, value in _read_object(self.info_file).items() if _is_sound(key, value)}
        return self._where_it_is(info) if "recipe" in info else info

    def _where_it_is(self, info: dict[str, Any]) -> dict[str, Any]:
        """The same with its paths as they are now: a run may have been moved together with what it names."""
        before = info["recipe"].get("output_dir")
        if not isinstance(before, str) or os.path.abspath(self.path) == before:
            return info
        files = {
            key: {**entry, "path": follow(entry["path"], before, self.path)}
            for key, entry in info.get("files", {}).items()
        }
        found = {
            **info,
            "recipe": {**follow_recipe(info["recipe"], self.path), "output_dir": str(self.path.absolute())},
        }
        if "files" in info:
            found["files"] = files
        if "model" in info:
            found["model"] = {**info["model"], "spec": follow(info["model"]["spec"], before, self.path)}
        return found

    def damaged_info(self) -> list[str]:
        """The keys of run.json that :meth:`info` leaves out."""
        return [key for key, value in _read_object(self.info_file).items() if not _is_sound(key, value)]

    def is_running(self) -> bool:
        """Whether a trainer holds the lock. A lock file left by a dead process counts for nothing."""
        try:
            with self.lock_file.open("rb") as file:
                # Shared and read-only: looking must neither write nor keep another viewer from looking.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        except OSError:
            # The lock is another user's, or this file system has none: whether its process lives must do.
            status = _read_object(self.status_file)
            pid, here = status.get("pid"), status.get("host") == socket.gethostname()
            active = status.get("state") in ACTIVE_STATES
            return active and here and isinstance(pid, int) and pid > 0 and psutil.pid_exists(pid)
        return False

    def status(self) -> Status | None:
        """The latest status, None before there is one; "interrupted" when an active state has no trainer."""
        data = _read_object(self.status_file)
        if not data:
            return None
        status = _status(data)
        if status.state in ACTIVE_STATES and not self.is_running():
            return replace(status, state="interrupted", eta_seconds=None)
        return status

    def events(self, offset: int = 0, limit: int = -1) -> EventChunk:
        """The events after byte ``offset`` of metrics.jsonl; see :func:`read_events`."""
        return read_events(self.metrics_file, offset, limit)

    def every_event(self) -> Iterator[Event]:
        """All events from the beginning, read piece by piece: a long run has more than should be in memory at once."""
        offset = 0
        while (chunk := self.events(offset, _PIECE)).offset > offset and not chunk.restarted:
            yield from chunk.events
            offset = chunk.offset

    def samples(self) -> list[SampleEvent]:
        """The probe answers of a finished run."""
        return [event for event in read_events(self.samples_file).events if isinstance(event, SampleEvent)]

    def request(self, request: Request) -> bool:
        """Ask the trainer to pause, resume or stop after its step; False when none is at work."""
        if not self.is_running():
            return False
        atomic_write(self.control_file, request + "\n")
        return True


def find_runs(root: str | Path) -> list[RunFolder]:
    """The run folders directly inside ``root``, by name; none when ``root`` is not a folder."""
    folder = Path(root)
    if not folder.is_dir():
        return []
    return [RunFolder(child) for child in sorted(folder.iterdir()) if (child / "run.json").is_file()]


class ActiveRun(RunFolder):
    """A run folder held by this process: the only one that writes to it. Made by :func:`open_run`.

    Leaving the ``with`` block releases the lock and, if the block ended by an exception without
    ``finish``, records the run as failed.
    """

    def __init__(self, path: Path, lock: FileLock, before: Status | None = None) -> None:
        """``before`` is the status of the attempt that this one resumes."""
        super().__init__(path)
        self._lock = lock
        self._metrics = self.metrics_file.open("ab")
        self._written = float("-inf")
        self._status = replace(
            before or Status(),
            attempt=before.attempt + 1 if before else 0,
            state="starting",
            reason="",
            message="",
            pid=os.getpid(),
            host=socket.gethostname(),
            started=round(time.time(), 3),
        )
        self.poll_seconds = 0.2

    def __enter__(self) -> ActiveRun:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None and self._status.state in ACTIVE_STATES:
                # The reason the block is left matters more than a status that cannot be written.
                with suppress(EnvironmentFault):
                    left = isinstance(error, KeyboardInterrupt | GeneratorExit)
                    state = "interrupted" if left else "failed"
                    self.set_status(state=state, message=str(error) or type(error).__name__, eta_seconds=None)
        finally:
            try:
                # What a full disk did not take was reported when it was logged.
                with suppress(OSError):
                    self._metrics.close()
            finally:
                self._lock.release()

    @property
    def current(self) -> Status:
        """The status as last set, written or not."""
        return self._status

    @property
    def metrics_bytes(self) -> int:
        """Size of metrics.jsonl: where :meth:`cut_metrics` cuts after a resume."""
        return self._metrics.tell()

    def log(self, event: Event) -> None:
        """Append an event to metrics.jsonl (final samples to samples.jsonl too); progress goes to the status alone.

        One write a line, so a reader never meets half a line that stays half. Raises EnvironmentFault.
        """
        if isinstance(event, ProgressEvent):
            self.set_status(stage=event.stage, fraction=round(event.fraction, 4))
            return
        line = event_line(event).encode()
        with environment_faults(self.metrics_file):
            self._metrics.write(line)
            self._metrics.flush()
            if isinstance(event, SampleEvent) and event.final:
                with self.samples_file.open("ab") as samples:
                    samples.write(line)

    def sync(self) -> None:
        """Push metrics.jsonl to the disk, as before a checkpoint that refers to its size."""
        with environment_faults(self.metrics_file):
            os.fsync(self._metrics.fileno())

    def cut_metrics(self, size: int) -> bool:
        """Cut metrics.jsonl back to ``size`` bytes; False (and nothing done) when it is shorter than that."""
        with environment_faults(self.metrics_file):
            if self._metrics.tell() < size:
                return False
            self._metrics.truncate(size)
            self._metrics.seek(size)
        return True

    def set_status(self, **changes: Any) -> None:
        """Change fields of the status and replace status.json, at once if the state changes.

        Raises EnvironmentFault.
        """
        before = self._status.state
        self._status = replace(self._status, **changes)
        now = time.monotonic()
        if self._status.state != before or now - self._written >= STATUS_SECONDS:
            self._written = now
            self._status = replace(self._status, updated=round(time.time(), 3))
            write_json(self.status_file, asdict(self._status))

    def finish(self, state: str, **changes: Any) -> None:
        """Record how the run ended."""
        self._written = float("-inf")
        self.set_status(state=state, eta_seconds=None, **changes)

    def poll(self, control: Control) -> Request:
        """The request in force, after taking up what a viewer left in the control file."""
        taken = self.control_file.with_name(".control.taken")
        try:
            # Renamed first: a request that comes while this one is read is not lost.
            os.replace(self.control_file, taken)
            text = taken.read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return control.request
        if text in ("pause", "resume", "stop"):
            control.ask(text)  # type: ignore[arg-type]
        return control.request

    def bind_model(self, spec: str, fingerprint: str) -> None:
        """Note which model this run trains; on a resume, refuse another one with InputError."""
        info = self.info()
        bound = info.get("model")
        if bound is None:
            write_json(self.info_file, {**info, "model": {"spec": spec, "fingerprint": fingerprint}})
        elif bound["fingerprint"] != fingerprint:
            raise InputError(
                Problem(
                    "model",
                    f"{spec} is not the model this run was started with "
                    f"(fingerprint {fingerprint[:12]}, was {bound['fingerprint'][:12]}: other weights, "
                    "configuration, tokenizer or chat template)",
                    "Restore the model, or start a new run by leaving out --resume",
                )
            )


def acquire(path: Path) -> FileLock:
    """Take the lock of an existing run folder; EnvironmentFault when another trainer holds it."""
    folder = RunFolder(path)
    before = folder.info().get("id")
    lock = _lock(folder.lock_file)
    with environment_faults(folder.lock_file):
        try:
            # A viewer that asks whether the run is alive holds the lock for an instant.
            lock.acquire(timeout=1, poll_interval=0.02)
        except Timeout:
            raise _busy(folder) from None
    # The folder may have been set aside and made anew between our look and our lock.
    if folder.info().get("id") != before:
        lock.release()
        raise _busy(folder)
    return lock


def _busy(folder: RunFolder) -> EnvironmentFault:
    data = _read_object(folder.status_file)
    who = f" (process {data['pid']} on {data.get('host', '?')})" if data.get("pid") else ""
    return EnvironmentFault(
        Problem(
            str(folder.path),
            f"another trainer{who} is at work on this run",
            "Wait for it or stop it, or give this run another folder with --set output_dir=…",
        )
    )


def _lock(path: Path) -> FileLock:
    # thread_local off: an abandoned generator may be closed by another thread.
    return FileLock(path, thread_local=False, mode=0o600)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _is_sound(key: str, value: object) -> bool:
    if key == "files":
        return isinstance(value, dict) and all(_has_texts(entry, "path", "sha256") for entry in value.values())
    if key == "model":
        return _has_texts(value, "spec", "fingerprint")
    return key not in ("recipe", "fork") or isinstance(value, dict)


def _has_texts(value: object, *keys: str) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in keys)


def _status(data: Mapping[str, Any]) -> Status:
    """Only values of the right type are taken: the file may come from anywhere."""
    return Status(**dict(_sound_values(data)))


def _sound_values(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for field in fields(Status):
        value = data.get(field.name)
        wanted: tuple[type, ...] = {"s": (str,), "i": (int,), "f": (int, float)}[str(field.type)[0]]
        if isinstance(value, wanted) and not isinstance(value, bool):
            yield field.name, value
