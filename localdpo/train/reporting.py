"""One experiment tracker in a process of its own: events as JSON lines in, what became of them out.

``python -m localdpo.train.reporting NAME SECONDS`` is started by ``trackers``; once nothing more can come, it has so
many seconds to send what is left. A process, because these packages print, keep threads and exit hooks, and may wait
for a network that is not there: none of that can reach the trainer. Metrics have the names they have in TRL's
trackers, ``train/loss`` and ``eval/rewards/margins``. Nothing is sent that is not in the run folder, and nothing about
the machine.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO, get_args

from localdpo.recipe import AlarmName
from localdpo.text import sanitise
from localdpo.train.events import (
    EvalEvent,
    Event,
    SampleEvent,
    StartEvent,
    StepEvent,
    WarningEvent,
    event_from_json,
)

__all__ = ["TRACKERS", "Hello", "Tracker", "main", "scalars"]

PROJECT = "localdpo"
_SAMPLES = ("prompt", "base", "tuned", "tags")
_WARNINGS = ("code", "message", "fix")


class Hello:
    """What a tracker is told first: the run's folder, name and id, its recipe as nested values and as YAML."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.folder = Path(values["folder"])
        self.name = str(values["name"])
        self.id = str(values["id"])
        self.recipe: dict[str, Any] = values["recipe"]
        self.yaml = str(values["yaml"])

    def flat(self) -> dict[str, str | float | bool]:
        """The settings by their dotted keys; what is no number or flag as text."""
        return dict(_flat(self.recipe))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | float | bool]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, bool | int | float) else str(value)


class Tracker(Protocol):
    """What a tracker can do. ``when`` is in seconds since 1970."""

    def start(self, step: int) -> None:
        """The run begins, or goes on after ``step``: what was reported of later steps will come again."""
        ...

    def scalars(self, step: int, when: float, values: Mapping[str, float]) -> None:
        """Report figures of a step."""
        ...

    def table(self, name: str, step: int, when: float, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Report texts of a step."""
        ...

    def close(self) -> None:
        """Write out what is left."""
        ...


class TensorBoard:
    """Event files in the run's folder ``tensorboard``, for `tensorboard --logdir`."""

    def __init__(self, hello: Hello) -> None:
        self._event: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._summary: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        self._text: Any = importlib.import_module("tensorboard.plugins.text.summary_v2").text_pb
        files: Any = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        hparams: Any = importlib.import_module("tensorboard.plugins.hparams.summary_v2")
        self._hello = hello
        self._hparams = hparams.hparams_pb(hello.flat(), trial_id=hello.id)
        self._writer: Any = files.EventFileWriter(str(hello.folder / "tensorboard"), flush_secs=5)

    def start(self, step: int) -> None:
        """Mark what comes again as orphaned, and write the settings."""
        session = self._event.SessionLog(status=self._event.SessionLog.START)
        self._writer.add_event(self._event.Event(step=step + 1 if step else 0, session_log=session))
        if step == 0:
            yaml = "".join(f"    {line}\n" for line in self._hello.yaml.splitlines())
            self._add(0, None, [self._text("recipe", yaml)])
            self._writer.add_event(self._event.Event(summary=self._hparams))

    def scalars(self, step: int, when: float, values: Mapping[str, float]) -> None:
        """One scalar a metric, in the plain form: readers take back what is orphaned in no other."""
        plain = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step, when, [self._summary(value=plain)])

    def table(self, name: str, step: int, when: float, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A Markdown table."""
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)
        self._add(step, when, [self._text(name, text)])

    def _add(self, step: int, when: float | None, summaries: Sequence[Any]) -> None:
        values = [value for summary in summaries for value in summary.value]
        event = self._event.Event(step=step, summary=self._summary(value=values))
        if when is not None:
            event.wall_time = when
        self._writer.add_event(event)

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


class WeightsAndBiases:
    """A run of Weights & Biases: sent to its server, or kept in the run's folder ``wandb`` with WANDB_MODE=offline."""

    def __init__(self, hello: Hello) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        # What it would gather by itself: console output, git remote, packages, host name, load of the machine.
        settings = self._wandb.Settings(
            silent=True,
            console="off",
            host=PROJECT,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        self._run: Any = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=hello.name,
            id=hello.id,
            dir=str(hello.folder),
            resume="allow",
            config=hello.recipe,
            settings=settings,
        )

    def start(self, step: int) -> None:
        """A row of a step that it has already is dropped there: what comes again is the same to the bit."""

    def scalars(self, step: int, when: float, values: Mapping[str, float]) -> None:
        """Figures join the row of their step."""
        self._run.log({**values, "train/global_step": step}, step=step)

    def table(self, name: str, step: int, when: float, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of texts."""
        table = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({name: table}, step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class Trackio:
    """A run of Trackio in its own folder on this machine, for `trackio show --project localdpo`."""

    def __init__(self, hello: Hello) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        self._run: Any = self._trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or PROJECT,
            name=f"{hello.name}-{hello.id[:8]}",
            config=hello.flat(),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def start(self, step: int) -> None:
        """It cannot take back rows: those of steps that come again are there twice, with equal figures."""

    def scalars(self, step: int, when: float, values: Mapping[str, float]) -> None:
        """A row of figures."""
        self._run.log(dict(values), step=step)

    def table(self, name: str, step: int, when: float, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of texts."""
        table = self._trackio.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({name: table}, step=step)

    def close(self) -> None:
        """Write out what is left."""
        self._trackio.finish()


TRACKERS: dict[str, Callable[[Hello], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def scalars(event: Event) -> dict[str, float]:
    """The figures of an event under the names of TRL's trackers; empty for an event without any."""
    if isinstance(event, StepEvent):
        return {f"train/{name}": value for name, value in event.metrics.items()}
    if isinstance(event, EvalEvent):
        own = ((name.removeprefix("eval_"), value) for name, value in event.metrics.items() if name.startswith("eval_"))
        return {f"eval/{name}": value for name, value in own}
    return {}


class Feed:
    """Events to what a tracker understands; sample answers of one moment become one table."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._samples: list[SampleEvent] = []

    def take(self, event: Event) -> None:
        """Report one event."""
        first = self._samples[0] if self._samples else None
        if first and not (isinstance(event, SampleEvent) and (event.step, event.final) == (first.step, first.final)):
            self.flush()
        if isinstance(event, StartEvent):
            self._tracker.start(event.step)
        elif isinstance(event, SampleEvent):
            self._samples.append(event)
        elif isinstance(event, WarningEvent):
            # Other warnings than alarms quote files of this machine: of them no more than the code.
            said = [event.message, event.fix] if event.code in get_args(AlarmName) else ["", ""]
            self._table("warnings", event, _WARNINGS, [[event.code, *said]])
        elif values := scalars(event):
            self._tracker.scalars(event.step, event.time, values)

    def flush(self) -> None:
        """Report the sample answers that were gathered."""
        samples, self._samples = self._samples, []
        if samples:
            rows = [[_asked(sample), sample.base, sample.tuned, ", ".join(sample.tags)] for sample in samples]
            self._table("samples/final" if samples[0].final else "samples/training", samples[0], _SAMPLES, rows)

    def _table(self, name: str, event: Event, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        inert = [[sanitise(cell) for cell in row] for row in rows]
        self._tracker.table(name, event.step, event.time, columns, inert)


def _asked(sample: SampleEvent) -> str:
    return sample.prompt[-1].get("content", "") if sample.prompt else ""


def main(name: str, lines: Iterator[str], say: TextIO) -> int:
    """Report the events of ``lines`` to tracker ``name``; ``say`` hears "ready", then "closed", or the error."""

    def tell(**word: str) -> None:
        say.write(json.dumps(word) + "\n")
        say.flush()

    try:
        tracker = TRACKERS[name](Hello(json.loads(next(lines))))
        tell(state="ready")
        feed = Feed(tracker)
        for line in lines:
            event = event_from_json(json.loads(line))
            if event is not None:
                feed.take(event)
        feed.flush()
        tracker.close()
    except BaseException as error:
        tell(state="failed", error=f"{type(error).__name__}: {error}")
        return 1
    tell(state="closed")
    return 0


def _incoming(stream: TextIO, linger: float) -> Iterator[str]:
    """The lines of ``stream``, read on a thread that sees its end even while the tracker hangs."""
    waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in stream:
            waiting.put(line)
        waiting.put(None)
        time.sleep(linger)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    while (line := waiting.get()) is not None:
        yield line


def _run(name: str, linger: str) -> None:
    # Whatever a package prints goes nowhere; what we say goes through a descriptor that it does not know.
    say = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    code = main(name, _incoming(sys.stdin, float(linger)), say)
    if code:
        # The exit hooks of a package that has just failed may wait for what will not come.
        os._exit(code)


if __name__ == "__main__":
    _run(*sys.argv[1:])
