"""The runs of a workspace: what a table says about each, their curves side by side, and the trash.

Everything is read from run folders; a deleted run is moved to the trash and can be brought back. This module
knows no widgets and no models; its functions read and write files, so they are not for the UI thread.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from localdpo.console.terminal import bytes_text, duration_text
from localdpo.errors import EnvironmentFault, Problem
from localdpo.evaluate.evidence import EVAL_FILE, verdict_of_run
from localdpo.evaluate.figures import TAUGHT
from localdpo.evaluate.verdict import Verdict
from localdpo.files import environment_faults
from localdpo.report.differences import recipe_differences
from localdpo.train.events import EndEvent, EvalEvent, Event, StartEvent, StepEvent, event_from_json
from localdpo.train.run import ACTIVE_STATES, RunFolder, Status, find_runs
from localdpo_tui.services.run_view import CHARTS, CHUNK_BYTES, HELD_OUT
from localdpo_tui.widgets.chart_data import Series, number_text
from localdpo_tui.widgets.chart_layout import ChartModel, Line

__all__ = [
    "Curves",
    "RunRow",
    "compared",
    "compared_figures",
    "curves",
    "delete_run",
    "empty_trash",
    "folder_size",
    "read_row",
    "read_rows",
    "recipe_differences",
    "restore_run",
    "share_text",
]

_HEAD_BYTES, _TAIL_BYTES = 40_000, 200_000


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run as the table shows it.

    ``accuracy`` is that of the held-out pairs at the published step, in [0, 1]; ``retained`` counts (kept,
    before) over the probes that the base had right; ``seconds`` is how long it took. None: not known.
    """

    path: Path
    state: str
    step: int = 0
    total_steps: int = 0
    pairs: int | None = None
    accuracy: float | None = None
    held_out_loss: float | None = None
    retained: tuple[int, int] | None = None
    retain_logp: float | None = None
    taught: tuple[int, int] | None = None
    bytes: int = 0
    created: float = 0.0
    seconds: float | None = None
    model: str = ""
    message: str = ""
    lines: tuple[str, ...] = ()
    adapter: bool = False
    verdict: Verdict | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def running(self) -> bool:
        """Whether a trainer is at work on it."""
        return self.state in ACTIVE_STATES

    @property
    def resumable(self) -> bool:
        """Whether it can go on from a checkpoint."""
        return self.state in ("stopped", "interrupted", "failed") and self.step < self.total_steps


def read_rows(folder: Path) -> list[RunRow]:
    """All runs in a folder, the newest first."""
    return sorted(map(read_row, find_runs(folder)), key=lambda row: (-row.created, row.name))


def read_row(run: RunFolder) -> RunRow:
    """What is known of one run; a folder that is damaged gives an emptier row."""
    info, status = run.info(), run.status() or Status(state="new")
    start = next((e for e in run.events(0, _HEAD_BYTES).events if isinstance(e, StartEvent)), None)
    tail = _tail(run.metrics_file)
    end = next((e for e in reversed(tail) if isinstance(e, EndEvent)), None)
    figures = end.figures if end is not None else {}
    held = _published([e for e in tail if isinstance(e, EvalEvent)], status.adapter_step)
    last = next((e for e in reversed(tail) if isinstance(e, StepEvent)), None)
    recipe = info.get("recipe")
    model = info.get("model")
    return RunRow(
        path=run.path,
        state=status.state,
        step=status.step,
        total_steps=status.total_steps,
        pairs=_whole(start.plan.get("train_pairs")) if start is not None else None,
        accuracy=held.metrics.get("eval_rewards/accuracies") if held is not None else None,
        held_out_loss=held.metrics.get("eval_loss") if held is not None else None,
        retained=_counted(figures, "kept", "base_right", taught=False),
        taught=_counted(figures, "tuned_right", "judged", taught=True),
        retain_logp=_logp_change(last),
        bytes=folder_size(run.path),
        created=_number(info.get("created")),
        seconds=end.seconds if end is not None and end.seconds else None,
        model=str(model.get("spec", "")) if isinstance(model, Mapping) else "",
        message=status.message or (end.message if end is not None else ""),
        lines=tuple(line for line in figures.get("lines", ()) if isinstance(line, str)),
        adapter=(run.adapter / "adapter_config.json").is_file(),
        verdict=_verdict(run.path, (status, *_stamps(run))),
        recipe=recipe if isinstance(recipe, Mapping) else {},
    )


@lru_cache(maxsize=1000)
def _verdict(path: Path, stamps: tuple[object, ...]) -> Verdict | None:
    """The verdict on a run as it is now; read once, for a long run has many events."""
    return verdict_of_run(RunFolder(path))


def _stamps(run: RunFolder) -> tuple[object, ...]:
    return tuple(map(_stamp, (run.samples_file, run.path / EVAL_FILE, run.adapter / "adapter_config.json")))


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _logp_change(last: StepEvent | None) -> float | None:
    """By how many nats a token the base's own answers to retain prompts have become more likely."""
    lost = last.metrics.get("retain/drift") if last is not None else None
    return None if lost is None else -lost


def _published(evaluations: list[EvalEvent], step: int | None) -> EvalEvent | None:
    """The evaluation of the adapter that was published, else the latest one after training began."""
    later = [event for event in evaluations if event.step > 0]
    at = [event for event in later if event.step == step]
    found = at or later
    return found[-1] if found else None


def _counted(figures: Mapping[str, Any], part: str, whole: str, *, taught: bool) -> tuple[int, int] | None:
    groups = figures.get("groups")
    if not isinstance(groups, Mapping):
        return None
    counts = [
        (_whole(group.get(part)) or 0, _whole(group.get(whole)) or 0)
        for name, group in groups.items()
        if isinstance(group, Mapping) and (name == TAUGHT) == taught
    ]
    total = sum(of for _, of in counts)
    return (sum(count for count, _ in counts), total) if total else None


def _tail(path: Path) -> list[Event]:
    """The last events of a file, however long it is."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - _TAIL_BYTES)
            file.seek(start)
            data = file.read()
    except OSError:
        return []
    lines = data.split(b"\n")[1 if start else 0 : -1]
    return [event for line in lines if (event := _event(line)) is not None]


def _event(line: bytes) -> Event | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event_from_json(value) if isinstance(value, dict) else None


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder, 0 when there is none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue  # a trainer deletes its old checkpoints
    return total


# -- curves


@dataclass(frozen=True, slots=True)
class Curves:
    """The metrics of a run over its steps, by their names."""

    name: str
    series: Mapping[str, Series]


def curves(run: RunFolder) -> Curves:
    """Read all metrics that charts show; memory stays bounded, whatever the length of the run."""
    wanted = {metric for spec in CHARTS for _, metric in spec.lines} | {spec.held_out for spec in CHARTS}
    series: dict[str, Series] = {metric: Series() for metric in sorted(wanted - {""})}
    offset = 0
    while True:
        chunk = run.events(offset, CHUNK_BYTES)
        if chunk.restarted:
            series = {metric: Series() for metric in series}
        for event in chunk.events:
            if isinstance(event, StepEvent | EvalEvent):
                for metric in series.keys() & event.metrics.keys():
                    series[metric].add(event.step, event.metrics[metric])
        if chunk.offset == offset or not chunk.events:
            return Curves(run.path.name, series)
        offset = chunk.offset


def compared(runs: Iterable[Curves]) -> list[ChartModel]:
    """A chart for each metric, with a line and the evaluations of every run; runs are called A, B and so on."""
    lettered = list(zip("AB", runs, strict=False))
    models = []
    for spec in CHARTS:
        lines = []
        for letter, run in lettered:
            for label, metric in spec.lines:
                name = f"{letter} {label}" if len(spec.lines) > 1 else f"{letter} {run.name}"
                lines.append(Line(name, run.series[metric]))
        for sign, (letter, run) in zip("●○", lettered, strict=False):
            if spec.held_out and run.series[spec.held_out].buckets:
                lines.append(Line(f"{letter} {HELD_OUT}", run.series[spec.held_out], sparse=True, sign=sign))
        models.append(
            ChartModel(spec.title, lines, references=spec.references, share=spec.share, smoothing=spec.smoothing)
        )
    return models


def compared_figures(first: RunRow, second: RunRow) -> list[tuple[str, str, str]]:
    """What can be compared of two runs, as (name, first, second); what neither has is left out."""
    rows = [(name, figure(first), figure(second)) for name, figure in _FIGURES.items()]
    return [row for row in rows if row[1] or row[2]]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def share_text(counted: tuple[int, int] | None) -> str:
    """A count of a whole, empty where there is none."""
    return "" if counted is None else f"{counted[0]}/{counted[1]}"


def _kl(row: RunRow) -> float | None:
    """KL(base || tuned) on retained answers, which `localdpo eval` measures."""
    reasons = row.verdict.reasons if row.verdict is not None else ()
    return next((reason.value for reason in reasons if reason.figure == "KL a token"), None)


_FIGURES: dict[str, Callable[[RunRow], str]] = {
    "verdict": lambda row: row.verdict.short if row.verdict is not None else "",
    "steps": lambda row: f"{row.step:,} of {row.total_steps:,}",
    "pairs": lambda row: "" if row.pairs is None else f"{row.pairs:,}",
    "held-out accuracy": lambda row: _percent(row.accuracy),
    "held-out loss": lambda row: "" if row.held_out_loss is None else number_text(row.held_out_loss),
    "taught probes right": lambda row: share_text(row.taught),
    "right answers kept": lambda row: share_text(row.retained),
    "KL (nats a token)": lambda row: "" if (kl := _kl(row)) is None else number_text(kl),
    "retained log-prob": lambda row: "" if row.retain_logp is None else f"{row.retain_logp:+.3g} nats a token",
    "time": lambda row: "" if row.seconds is None else duration_text(row.seconds),
    "size": lambda row: bytes_text(row.bytes),
}


# -- the trash


def delete_run(run: RunFolder, trash: Path) -> Path:
    """Move a run to the folder ``trash``; returns where it is now. Raises EnvironmentFault for a live trainer."""
    if run.is_running():
        raise EnvironmentFault(Problem(str(run.path), "a trainer is at work on this run", "Stop it first"))
    with environment_faults(trash):
        trash.mkdir(exist_ok=True, parents=True)
        target = trash / f"{run.path.name}-{time.time_ns()}"
        os.rename(run.path, target)
    return target


def restore_run(trashed: Path, runs: Path) -> Path:
    """Bring a run back into the folder ``runs``, under a free name; returns where it is. Raises EnvironmentFault."""
    name = trashed.name.rpartition("-")[0]
    target, number = runs / name, 1
    while target.exists():
        target, number = runs / f"{name}.{number}", number + 1
    with environment_faults(trashed):
        os.rename(trashed, target)
    return target


def empty_trash(trash: Path) -> None:
    """Delete what is in the trash for good. Raises EnvironmentFault."""
    with environment_faults(trash):
        if trash.is_dir():
            shutil.rmtree(trash)
