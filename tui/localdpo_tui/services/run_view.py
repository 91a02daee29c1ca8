"""What a run's events come to on a screen: chart models, notes in words, sample answers, and a headline.

It reads a run folder and nothing else, so it shows a run of this machine or a copied one, live or long over. It
knows no widgets and starts nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from localdpo.console.display import STAGES
from localdpo.console.terminal import duration_text
from localdpo.evaluate.verdict import Verdict
from localdpo.train.events import (
    CheckpointEvent,
    EndEvent,
    EvalEvent,
    Event,
    EventChunk,
    SampleEvent,
    StartEvent,
    StepEvent,
    WarningEvent,
)
from localdpo.train.run import ACTIVE_STATES, RunFolder, Status
from localdpo_tui.widgets.chart_data import Range, number_text
from localdpo_tui.widgets.chart_layout import ChartModel, Line

__all__ = ["CHARTS", "ChartSpec", "Note", "RunView", "chart_models", "read_chunk", "state_sign"]

CHUNK_BYTES = 200_000
"""What is read of metrics.jsonl at a time: some 300 events, which take a few milliseconds to gather."""

NOTES, SAMPLES = 50, 60
_SIGNS = {
    "starting": "◌",
    "training": "▶",
    "paused": "⏸",
    "finishing": "▶",
    "finished": "✓",
    "stopped": "■",
    "interrupted": "!",
    "diverged": "✗",
    "failed": "✗",
}


@dataclass(frozen=True, slots=True)
class ChartSpec:
    """A chart of a run: its lines as (label, metric), the metric of its evaluations, values to compare with."""

    title: str
    lines: tuple[tuple[str, str], ...]
    held_out: str = ""
    references: tuple[float, ...] = ()
    share: Range | None = None
    smoothing: float = 0.6


CHARTS = (
    ChartSpec("Loss", (("training", "loss"),), "eval_loss"),
    ChartSpec("Reward margin", (("training", "rewards/margins"),), "eval_rewards/margins", (0.0,)),
    ChartSpec("Accuracy", (("training", "rewards/accuracies"),), "eval_rewards/accuracies", (0.5,), Range(0, 1)),
    ChartSpec("Rewards", (("chosen", "rewards/chosen"), ("rejected", "rewards/rejected")), "", (0.0,)),
    ChartSpec("Learning rate", (("rate", "learning_rate"),), smoothing=0.0),
    ChartSpec("Tokens a second", (("tokens/s", "tokens_per_second"),), share=Range(0, 1), smoothing=0.0),
)
HELD_OUT = "held out"


def chart_models(specs: Iterable[ChartSpec] = CHARTS) -> list[ChartModel]:
    """Empty models of the charts."""
    return [
        ChartModel(
            spec.title,
            [Line(label) for label, _ in spec.lines] + ([Line(HELD_OUT, sparse=True)] if spec.held_out else []),
            references=spec.references,
            share=spec.share,
            smoothing=spec.smoothing,
        )
        for spec in specs
    ]


@dataclass(frozen=True, slots=True)
class Note:
    """Something a run had to say, in words; ``kind`` is warning, note, best, checkpoint or end."""

    step: int
    kind: str
    text: str


def state_sign(state: str) -> str:
    """A sign for a state, so that it is seen without colour."""
    return _SIGNS.get(state, "·")


def read_chunk(run: RunFolder, offset: int) -> tuple[EventChunk, Status | None]:
    """The next events of a run and its status. Reads files: not for the UI thread."""
    return run.events(offset, CHUNK_BYTES), run.status()


@dataclass
class RunView:
    """What is known of one run. ``take`` is to be called with what ``read_chunk`` returned, in order."""

    run: RunFolder
    charts: list[ChartModel] = field(default_factory=chart_models)
    offset: int = 0
    status: Status | None = None
    start: StartEvent | None = None
    end: EndEvent | None = None
    last: StepEvent | None = None
    last_eval: EvalEvent | None = None
    notes: deque[Note] = field(default_factory=lambda: deque(maxlen=NOTES))
    samples: deque[SampleEvent] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    verdict: Verdict | None = None
    _judged: tuple[int, Status | None] | None = None

    @property
    def to_judge(self) -> bool:
        """Whether the run is over and was not judged as it is now."""
        return not self.running and self._judged != (self.offset, self.status)

    def judge(self, verdict: Verdict | None) -> None:
        """Take in the verdict on the run as it is."""
        self.verdict, self._judged = verdict, (self.offset, self.status)

    def take(self, chunk: EventChunk, status: Status | None) -> bool:
        """Take in events and a status; returns whether anything changed."""
        changed = bool(chunk.events) or chunk.restarted or status != self.status
        if chunk.restarted:
            self._forget()
        self.offset, self.status = chunk.offset, status
        for event in chunk.events:
            self._see(event)
        return changed

    def _forget(self) -> None:
        for model in self.charts:
            view, cursor = model.view, model.cursor
            model.clear()
            model.view, model.cursor = view, cursor
        self.start = self.end = self.last = self.last_eval = None
        self.notes.clear()
        self.samples.clear()

    def _see(self, event: Event) -> None:
        match event:
            case StepEvent():
                self._see_step(event)
            case EvalEvent():
                self._see_evaluation(event)
            case SampleEvent():
                self.samples.append(event)
            case WarningEvent():
                where = f"{event.where}: " if event.where else ""
                kind = "note" if event.code == "set-aside" else "warning"
                self._note(event.step, kind, f"{where}{event.message} {event.fix}".strip())
            case CheckpointEvent():
                # One is enough: the latest says from where the run could go on.
                kept = [note for note in self.notes if note.kind != "checkpoint"]
                self.notes = deque(kept, maxlen=NOTES)
                self._note(event.step, "checkpoint", "everything up to here is saved")
            case StartEvent():
                self.start, self.end = event, None
            case EndEvent():
                self.end = event
                self._note(event.step, "end", event.message or event.reason)

    def _see_step(self, event: StepEvent) -> None:
        self.last, self.end = event, None
        for spec, model in zip(CHARTS, self.charts, strict=True):
            for label, metric in spec.lines:
                if metric in event.metrics:
                    model.add(label, event.step, event.metrics[metric])

    def _see_evaluation(self, event: EvalEvent) -> None:
        self.last_eval = event
        for spec, model in zip(CHARTS, self.charts, strict=True):
            if spec.held_out in event.metrics:
                model.add(HELD_OUT, event.step, event.metrics[spec.held_out])
        accuracy = event.metrics.get("eval_rewards/accuracies")
        said = f"held out: loss {number_text(event.metrics.get('eval_loss', float('nan')))}"
        said += f", accuracy {accuracy:.0%}" if accuracy is not None else ""
        self._note(event.step, "best" if event.best else "eval", said + (", the best so far" if event.best else ""))

    def _note(self, step: int, kind: str, text: str) -> None:
        self.notes.append(Note(step, kind, text))

    @property
    def state(self) -> str:
        """The state of the run, "new" before there is one."""
        return self.status.state if self.status else "new"

    @property
    def running(self) -> bool:
        """Whether a trainer is at work."""
        return self.state in ACTIVE_STATES

    @property
    def resumable(self) -> bool:
        """Whether the run can go on from where it was."""
        return self.state in ("stopped", "interrupted", "failed")

    def headline(self) -> str:
        """State, step and time left in one line."""
        status = self.status
        if status is None:
            return "no run yet"
        parts = [f"{state_sign(status.state)} {status.state}"]
        if status.state in ("starting", "finishing") and status.stage:
            counting = f" {status.fraction:.0%}" if 0 < status.fraction < 1 else ""
            parts.append(STAGES.get(status.stage, status.stage) + counting)
        if status.total_steps:
            parts.append(f"step {status.step:,} of {status.total_steps:,}")
        if status.eta_seconds is not None and status.state == "training":
            parts.append(f"{duration_text(status.eta_seconds)} left")
        if status.message and status.state in ("failed", "diverged", "interrupted"):
            parts.append(status.message)
        return ", ".join(parts)

    def figures(self) -> str:
        """The latest figures in one line; empty before the first step."""
        if self.last is None:
            return ""
        metrics, parts = self.last.metrics, []
        for name, key, form in (
            ("loss", "loss", ".3f"),
            ("margin", "rewards/margins", "+.2f"),
            ("accuracy", "rewards/accuracies", ".0%"),
        ):
            if key in metrics:
                parts.append(f"{name} {metrics[key]:{form}}")
        if "retain/drift" in metrics:  # what the retained answers have lost
            parts.append(f"retain logp {-metrics['retain/drift']:+.3f}")
        if "tokens_per_second" in metrics:
            parts.append(f"{metrics['tokens_per_second']:.0f} tokens/s")
        return "  ".join(parts)
