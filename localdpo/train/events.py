"""What happens in a run, as typed values: the trainer yields them, ``metrics.jsonl`` keeps them.

Every event has a ``step`` (optimizer steps finished when it happened, by which events are ordered)
and a ``time`` (seconds since 1970, for people; clocks jump, so nothing is computed from it).
``ProgressEvent`` alone is for the moment only and never written.

This module knows how events look as JSON. It knows nothing about where they go or how they are shown.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

Metrics = Mapping[str, float]


def _now() -> float:
    return round(time.time(), 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What all events share."""

    kind: ClassVar[str] = ""
    step: int = 0
    time: float = field(default_factory=_now)

    def to_json(self) -> dict[str, Any]:
        """The event as one flat JSON object; metrics stand beside the other keys under their own names."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "metrics"}
        return {"event": self.kind, **values, **getattr(self, "metrics", {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class StartEvent(Event):
    """Training is about to begin, or to go on at ``step`` when ``resumed``; ``plan`` says what it will do."""

    kind: ClassVar[str] = "start"
    run: str = ""
    total_steps: int = 0
    steps_per_epoch: int = 0
    resumed: bool = False
    plan: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressEvent(Event):
    """How far a stage outside the steps is: ``done`` of ``total`` units, ``fraction`` in [0, 1].

    Stages, in order: read, load, encode, retain, reference, evaluate, paused, samples, save.
    """

    kind: ClassVar[str] = "progress"
    stage: str = ""
    detail: str = ""
    done: int = 0
    total: int = 0
    fraction: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEvent(Event):
    """One optimizer step is done. ``metrics`` has TRL's names; ``eta_seconds`` is the time left, if known."""

    kind: ClassVar[str] = "step"
    total_steps: int = 0
    eta_seconds: float | None = None
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalEvent(Event):
    """The held-out pairs were scored; ``best`` when no earlier evaluation of this run had a lower loss."""

    kind: ClassVar[str] = "eval"
    best: bool = False
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleEvent(Event):
    """The base's and the tuned model's answers to one probe prompt (chat messages).

    ``final`` is false for a glimpse of a model that was still training. ``base_right`` and
    ``tuned_right`` say whether an accepted answer was found, None where the probe lists none.
    """

    kind: ClassVar[str] = "sample"
    prompt: list[dict[str, str]] = field(default_factory=list)
    base: str = ""
    tuned: str = ""
    tags: list[str] = field(default_factory=list)
    accept: list[str] = field(default_factory=list)
    base_right: bool | None = None
    tuned_right: bool | None = None
    final: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEvent(Event):
    """A checkpoint is whole on disk, at ``path`` inside the run folder."""

    kind: ClassVar[str] = "checkpoint"
    path: str = ""
    best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WarningEvent(Event):
    """Something the user should know, in words; ``code`` names the kind of warning for programs."""

    kind: ClassVar[str] = "warning"
    code: str = ""
    message: str = ""
    where: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndEvent(Event):
    """The run is over for now.

    ``reason`` is finished, stop_loss, early_stopping, alarm, stopped or diverged. ``adapter`` is the folder
    of the published adapter (None: nothing was published), made at ``adapter_step``. ``figures`` are
    the closing figures of the probes. A run with ``resumable`` goes on with ``--resume``.
    """

    kind: ClassVar[str] = "end"
    reason: str = ""
    message: str = ""
    adapter: str | None = None
    adapter_step: int | None = None
    seconds: float = 0.0
    resumable: bool = False
    figures: Mapping[str, Any] = field(default_factory=dict)


_KINDS: dict[str, type[Event]] = {
    cls.kind: cls
    for cls in (
        StartEvent,
        ProgressEvent,
        StepEvent,
        EvalEvent,
        SampleEvent,
        CheckpointEvent,
        WarningEvent,
        EndEvent,
    )
}


def event_line(event: Event) -> str:
    """The event as one line of JSON with its newline.

    Pure ASCII: a terminal that shows the raw file meets no control characters from a model's answer.
    Raises ValueError for a number that is not finite.
    """
    return json.dumps(event.to_json(), allow_nan=False) + "\n"


def event_from_json(data: Mapping[str, Any]) -> Event | None:
    """The event that ``to_json`` described; None for a kind this version does not know.

    Keys it does not know are metrics where the event has metrics, and dropped elsewhere. Values of
    the wrong type count as absent: a run folder may come from anywhere.
    """
    name = data.get("event")
    cls = _KINDS.get(name) if isinstance(name, str) else None
    if cls is None:
        return None
    own = {f.name: f for f in fields(cls)}
    values = {key: value for key, value in data.items() if key in own and _fits(value, str(own[key].type))}
    if "metrics" in own:
        values["metrics"] = {
            key: value for key, value in data.items() if key not in own and key != "event" and _is_number(value)
        }
    return cls(**values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _fits(value: object, annotation: str) -> bool:
    """Whether a JSON value may stand in a field; annotations are strings here."""
    if value is None or isinstance(value, bool):
        return ("None" if value is None else "bool") in annotation
    if isinstance(value, str):
        return annotation.startswith("str")
    if isinstance(value, list):
        item = dict if "dict" in annotation else str
        return annotation.startswith("list") and all(isinstance(entry, item) for entry in value)
    if isinstance(value, dict):
        return annotation.startswith("Mapping")
    if isinstance(value, int) and annotation.startswith("int"):
        return True
    return _is_number(value) and annotation.startswith("float")


class EventChunk(NamedTuple):
    """Events read so far; pass ``offset`` (bytes) to the next read.

    ``restarted``: the file was cut back (a run was resumed) and these events are from its beginning.
    """

    events: list[Event]
    offset: int
    restarted: bool = False


def read_events(path: Path, offset: int = 0, limit: int = -1) -> EventChunk:
    """The events after ``offset`` of a file that may be growing; a line being written is left for later.

    With a ``limit`` (bytes) a long file comes in pieces: read on until nothing comes. Lines that are
    not events of a known kind are passed over. A missing file has no events.
    """
    try:
        with path.open("rb") as file:
            if offset > file.seek(0, 2):
                return read_events(path, 0, limit)._replace(restarted=True)
            file.seek(max(0, offset - 1))
            if offset and file.read(1) != b"\n":
                # Cut back and grown past our offset between two reads: we are in the middle of a line.
                return read_events(path, 0, limit)._replace(restarted=True)
            data = file.read(limit)
            if limit > 0 and len(data) == limit and b"\n" not in data:
                data += file.readline()
    except FileNotFoundError:
        return EventChunk([], 0, offset > 0)
    lines = data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]
    events = []
    for line in lines:
        parsed = _parse(line)
        event = event_from_json(parsed) if parsed else None
        if event is not None:
            events.append(event)
    return EventChunk(events, offset + sum(len(line) + 1 for line in lines))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
