"""A run on the screen, from its events alone: live on a terminal, plain lines in a pipe, JSON for programs.

It knows events and nothing else of the trainer: a run that is watched from its ``metrics.jsonl`` would look
the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Protocol, TextIO

from localdpo.console import preflight
from localdpo.console.results import closing_lines, closing_table, glimpse_line
from localdpo.console.terminal import duration_text, is_live, say, sparkline, width
from localdpo.text import sanitise
from localdpo.train.events import (
    CheckpointEvent,
    EndEvent,
    EvalEvent,
    Event,
    Metrics,
    ProgressEvent,
    SampleEvent,
    StartEvent,
    StepEvent,
    WarningEvent,
    event_line,
)

STAGES = {
    "read": "reading the pairs",
    "answers": "answering the prompts",
    "rewrites": "rewriting the answers",
    "verdicts": "judging the answers",
    "load": "loading the model",
    "encode": "encoding the pairs",
    "retain": "asking the base model what to retain",
    "reference": "scoring the answers with the reference",
    "evaluate": "scoring the held-out pairs",
    "paused": "paused",
    "samples": "answering the probes",
    "save": "saving",
}
_LINES_A_RUN = 60
_NOTES = ("set-aside",)
_STYLES: dict[type[Event], str] = {WarningEvent: "yellow", EvalEvent: "dim"}


class Display(Protocol):
    """What `localdpo train` tells its events to; a context manager around the run."""

    def __enter__(self) -> Display:
        """Take the terminal."""
        ...

    def __exit__(self, *exc: object) -> None:
        """Give the terminal back."""
        ...

    def show(self, event: Event) -> None:
        """Show one event."""
        ...

    def notice(self, text: str) -> None:
        """Say something that is not an event; may be called from another thread."""
        ...

    def leave(self, text: str) -> None:
        """Say ``text`` right before the process ends abruptly, from another thread."""
        ...


def make_display(json_lines: bool, stream: TextIO | None = None) -> Display:
    """Return the display that suits ``stream`` (standard output when None)."""
    stream = stream or sys.stdout
    if json_lines:
        return JsonDisplay(stream)
    return LiveDisplay(stream) if is_live(stream) else PlainDisplay(stream)


def metrics_text(metrics: Metrics, prefix: str = "") -> str:
    """Name the metrics that a reader follows, in a fixed order; ``prefix`` is 'eval_' or nothing."""
    wanted = (
        ("loss", "loss", ".4f"),
        ("accuracy", "rewards/accuracies", ".2f"),
        ("margin", "rewards/margins", "+.2f"),
    )
    return "  ".join(f"{name} {metrics[prefix + key]:{form}}" for name, key, form in wanted if prefix + key in metrics)


def pace_text(event: StepEvent) -> str:
    """Give tokens a second, seconds a step and the time left."""
    parts = []
    if "tokens_per_second" in event.metrics:
        parts.append(f"{event.metrics['tokens_per_second']:.0f} tok/s")
    if "step_seconds" in event.metrics:
        parts.append(f"{event.metrics['step_seconds']:.2f} s/step")
    if event.eta_seconds is not None:
        parts.append(f"{duration_text(event.eta_seconds)} left")
    return "  ".join(parts)


def event_text(event: Event, columns: int = 0) -> str | None:
    """Return what stays on the screen for ``event``, sanitised; None for one that leaves nothing.

    The plan is wrapped to ``columns`` unless that is 0.
    """
    match event:
        case StartEvent():
            return "\n".join(preflight.lines(event.plan, columns)) if event.plan else None
        case EvalEvent():
            best = "  (best so far)" if event.best else ""
            return f"step {event.step}  held out: {metrics_text(event.metrics, 'eval_')}{best}"
        case CheckpointEvent():
            return f"step {event.step}  checkpoint {sanitise(event.path)}"
        case WarningEvent():
            where = f"{event.where}: " if event.where else ""
            kind = "note" if event.code in _NOTES else "warning"
            return sanitise(f"{kind}: {where}{event.message} {event.fix}".rstrip())
    return None


class JsonDisplay:
    """One event a line on ``stream`` and nothing else; notices go to standard error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __enter__(self) -> JsonDisplay:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def show(self, event: Event) -> None:
        """Write the event."""
        self._stream.write(event_line(event))
        self._stream.flush()

    def notice(self, text: str) -> None:
        """Write to standard error."""
        say(text, file=sys.stderr, flush=True)

    leave = notice


class PlainDisplay:
    """Lines without escapes: each stage once, some sixty steps a run, every evaluation and warning."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stage = ""
        self._samples: list[SampleEvent] = []

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def show(self, event: Event) -> None:
        """Write what the event has to say, if anything."""
        for line in self._lines(event):
            self.notice(line)

    def notice(self, text: str) -> None:
        """Write one line."""
        say(text, file=self._stream, flush=True)

    leave = notice

    def _lines(self, event: Event) -> Iterable[str]:
        match event:
            case ProgressEvent():
                if event.stage != self._stage:
                    self._stage = event.stage
                    return [stage_text(event, counting=False)]
            case StepEvent():
                self._stage = ""
                every = max(1, event.total_steps // _LINES_A_RUN)
                if event.step % every == 0 or event.step in (1, event.total_steps):
                    head = f"step {event.step}/{event.total_steps}"
                    return [f"{head}  {metrics_text(event.metrics)}  {pace_text(event)}"]
            case SampleEvent(final=False):
                return [glimpse_line(event)]
            case SampleEvent():
                self._samples.append(event)
            case EndEvent():
                return closing_lines(self._samples, event)
            case _:
                text = event_text(event)
                return [text] if text else []
        return []


class LiveDisplay:
    """A bar, the latest metrics and their curves, redrawn in place below what scrolls by."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._live = Live(console=self._console, refresh_per_second=8, transient=True, redirect_stderr=False)
        self._samples: list[SampleEvent] = []
        self._loss: list[float] = []
        self._margin: list[float] = []

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def notice(self, text: str) -> None:
        """Print a line above the live part."""
        self._console.print(sanitise(text))

    def leave(self, text: str) -> None:
        """Give the cursor back and write ``text``, without waiting for whoever is drawing."""
        self._console.file.write(f"\n\x1b[?25h{sanitise(text)}\n")
        self._console.file.flush()

    def show(self, event: Event) -> None:
        """Redraw the live part, or print above it."""
        match event:
            case ProgressEvent():
                self._live.update(self._bar(stage_text(event), event.fraction, ""))
            case StepEvent():
                self._step(event)
            case CheckpointEvent():
                return  # of use in a log, noise on a screen
            case SampleEvent(final=False):
                self.notice(glimpse_line(event))
            case SampleEvent():
                self._samples.append(event)
            case EndEvent():
                self._live.stop()
                for part in closing_table(self._samples, event, width()):
                    self._console.print(part, soft_wrap=False)
            case _:
                text = event_text(event, width())
                if text:
                    self._console.print(text, style=_STYLES.get(type(event)))

    def _step(self, event: StepEvent) -> None:
        from rich.console import Group
        from rich.text import Text

        if "loss" in event.metrics:
            self._loss.append(event.metrics["loss"])
        if "rewards/margins" in event.metrics:
            self._margin.append(event.metrics["rewards/margins"])
        fraction = event.step / max(event.total_steps, 1)
        length = max(8, min(40, (width() - 16) // 2))
        curves = f"loss {sparkline(self._loss, length)}  margin {sparkline(self._margin, length)}"
        self._live.update(
            Group(
                self._bar(f"step {event.step}/{event.total_steps}", fraction, pace_text(event)),
                Text(metrics_text(event.metrics), no_wrap=True, overflow="ellipsis"),
                Text(curves, no_wrap=True, overflow="ellipsis", style="cyan"),
            )
        )

    def _bar(self, label: str, fraction: float, note: str) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_row(Text(label), ProgressBar(total=1.0, completed=fraction), Text(note))
        return row


def stage_text(event: ProgressEvent, counting: bool = True) -> str:
    """Name a stage with its detail or how many things it goes through, and how far it is when ``counting``."""
    text = STAGES.get(event.stage, event.stage)
    if event.detail:
        text += f": {event.detail}"
    if event.total > 1 and counting:
        text += f" ({event.done}/{event.total})"
    elif event.total > 1 and not event.detail:
        text += f" ({event.total})"
    return sanitise(text)
