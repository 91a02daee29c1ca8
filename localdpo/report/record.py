"""What a page says about a run, read from its folder once: events, answers, eval.json, and how its pairs are.

Memory stays bounded whatever the length of the run: curves are `localdpo.series`, lists keep their first entries and
count the rest. Files that are missing or damaged leave their part empty. Nothing here runs a model or writes anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from localdpo.data.check.report import CheckOptions, Report, check_file
from localdpo.errors import InputError, LocalDPOError, Problem
from localdpo.evaluate.evidence import EVAL_FILE, verdict_of_run
from localdpo.report.values import number, object_at, read_object, text, tilde
from localdpo.series import Series
from localdpo.train.events import EndEvent, EvalEvent, Event, SampleEvent, StartEvent, StepEvent, WarningEvent
from localdpo.train.run import RunFolder, Status

__all__ = ["CHECK_BYTES", "MAX_SAMPLES", "Pairs", "Record", "check_pairs", "read_record"]

MAX_SAMPLES = 400
MAX_WARNINGS = 40
CHECK_BYTES = 40_000_000
"""Larger pair files are not checked while a page is made; `localdpo pairs check` does it at any size."""

JUDGE_BYTES = 40_000_000
"""A verdict from training's own figures reads all events at once: not where they are more than this."""

_CHUNK_BYTES = 400_000
_STEP_METRICS = frozenset(
    {
        "loss",
        "nll_loss",
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
        "step_seconds",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "retain/drift",
    }
)
_EVAL_METRICS = frozenset(
    {
        "eval_loss",
        "eval_rewards/accuracies",
        "eval_rewards/margins",
        "eval_rewards/chosen",
        "eval_rewards/rejected",
        "eval_logps/chosen",
        "eval_logps/rejected",
    }
)


@dataclass(slots=True)
class Pairs:
    """What was found in the pairs a run was trained on; `missing` says why nothing was looked at."""

    report: Report | None = None
    missing: str = ""


@dataclass(slots=True)
class Record:
    """A run as it was found.

    `curves` are by TRL's metric names, with `words/base` and `words/tuned` for the mean length of sample answers
    (words). `samples` are the closing answers, at most `MAX_SAMPLES`. `evaluation` is eval.json, empty without one.
    `verdict` is its verdict, else a `provisional` one from training's own figures, as in eval.json.
    """

    run: RunFolder
    info: Mapping[str, Any] = field(default_factory=dict)
    status: Status | None = None
    start: StartEvent | None = None
    end: EndEvent | None = None
    last_eval: EvalEvent | None = None
    curves: dict[str, Series] = field(default_factory=dict)
    samples: list[SampleEvent] = field(default_factory=list)
    num_samples: int = 0
    warnings: list[WarningEvent] = field(default_factory=list)
    num_warnings: int = 0
    peak_memory_bytes: float = 0.0
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    verdict: Mapping[str, Any] = field(default_factory=dict)
    provisional: bool = False
    pairs: Pairs = field(default_factory=Pairs)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.run.path.resolve().name or "run"

    @property
    def argument(self) -> str:
        """The folder as it is typed, from the current one where it is below; without the user's home."""
        path = self.run.path.absolute()
        here = Path.cwd()
        return quote(str(path.relative_to(here)) if path.is_relative_to(here) else tilde(str(path)))

    @property
    def state(self) -> str:
        """The state of the run, "new" before there is one."""
        return self.status.state if self.status else "new"

    @property
    def model(self) -> str:
        """The base as it was named."""
        return text(object_at(self.info, "model").get("spec")) or text(object_at(self.info, "recipe").get("model"))

    @property
    def plan(self) -> Mapping[str, Any]:
        """What the trainer said before the first step."""
        return self.start.plan if self.start else {}

    @property
    def outdated(self) -> bool:
        """Whether eval.json is of another step than the adapter that is published now."""
        step = number(self.evaluation.get("step"))
        published = self.status.adapter_step if self.status else None
        return step is not None and published is not None and step != published

    @property
    def imported(self) -> Mapping[str, Any]:
        """Where an adapter that another tool trained came from; empty for a run of our own."""
        return object_at(self.info, "imported")

    @property
    def has_adapter(self) -> bool:
        """Whether there is something to evaluate and to chat with."""
        return (self.run.adapter / "adapter_config.json").is_file()


def read_record(path: str | Path, *, check: bool = True) -> Record:
    """Read the run at `path`; with `check` its pairs are checked too. Raises InputError when it is no run folder."""
    run = RunFolder(path)
    info = run.info()
    if not info:
        what = "is not a run folder: it has no run.json" if run.path.is_dir() else "there is no such folder"
        raise InputError(Problem(str(run.path), what, "`localdpo runs` lists the runs of this folder"))
    record = Record(run, info, run.status(), evaluation=read_object(run.path / EVAL_FILE))
    _read_events(record)
    _judge(record)
    if check:
        record.pairs = check_pairs(record)
    return record


def _judge(record: Record) -> None:
    record.verdict = object_at(record.evaluation, "verdict")
    size = record.run.metrics_file.stat().st_size if record.run.metrics_file.is_file() else 0
    if record.verdict or record.imported or size > JUDGE_BYTES:
        return
    found = verdict_of_run(record.run)
    if found is not None:
        record.verdict, record.provisional = found.to_json(), True


def _read_events(record: Record) -> None:
    words: dict[int, list[tuple[int, int]]] = {}
    offset = 0
    while True:
        chunk = record.run.events(offset, _CHUNK_BYTES)
        if chunk.restarted:
            record.curves.clear()
            record.samples.clear()
            words.clear()
            record.num_samples = record.num_warnings = 0
            record.warnings.clear()
        for event in chunk.events:
            _take(record, event, words)
        if chunk.offset == offset:
            break
        offset = chunk.offset
    for step in sorted(words):
        counts = words[step]
        base, tuned = (sum(count[side] for count in counts) / len(counts) for side in (0, 1))
        _add(record, step, {"words/base": base, "words/tuned": tuned})


def _take(record: Record, event: Event, words: dict[int, list[tuple[int, int]]]) -> None:
    match event:
        case StepEvent():
            record.end = None
            record.peak_memory_bytes = max(record.peak_memory_bytes, event.metrics.get("peak_memory_bytes", 0.0))
            _add(record, event.step, {name: event.metrics[name] for name in _STEP_METRICS & event.metrics.keys()})
        case EvalEvent():
            record.last_eval = event
            _add(record, event.step, {name: event.metrics[name] for name in _EVAL_METRICS & event.metrics.keys()})
        case SampleEvent():
            _take_sample(record, event, words)
        case WarningEvent():
            record.num_warnings += 1
            if len(record.warnings) < MAX_WARNINGS:
                record.warnings.append(event)
        case StartEvent():
            record.start, record.end = event, None
        case EndEvent():
            record.end = event


def _take_sample(record: Record, event: SampleEvent, words: dict[int, list[tuple[int, int]]]) -> None:
    if len(words) < MAX_SAMPLES or event.step in words:
        words.setdefault(event.step, []).append((len(event.base.split()), len(event.tuned.split())))
    if not event.final:
        return
    if record.samples and record.samples[-1].step != event.step:
        record.samples.clear()  # the run went on: these are of an earlier adapter
        record.num_samples = 0
    record.num_samples += 1
    if len(record.samples) < MAX_SAMPLES:
        record.samples.append(event)


def _add(record: Record, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        record.curves.setdefault(name, Series()).add(step, value)


def check_pairs(record: Record) -> Pairs:
    """Check the run's own copy of its pairs. The words it was to teach count as meant, not as a shortcut."""
    path = record.run.pairs_file
    if record.imported:
        return Pairs(missing="This adapter was trained by another tool; its data is not known.")
    if not path.is_file():
        return Pairs(missing="The run has no copy of its pairs yet.")
    if path.stat().st_size > CHECK_BYTES:
        return Pairs(missing="The pairs were not checked here: the file is large. `localdpo pairs check FILE` does it.")
    data = object_at(record.info, "recipe", "data")
    taught = record.end.figures.get("terms") if record.end else None
    expected = tuple(term for term in taught if isinstance(term, str)) if isinstance(taught, list) else ()
    length, cut = number(data.get("max_length")), data.get("truncation")
    options = CheckOptions(expected=expected)
    if length and cut in ("keep_start", "keep_end", "skip"):
        options = CheckOptions(expected=expected, max_length=int(length), truncation=cut)
    try:
        return Pairs(check_file(path, options))
    except LocalDPOError as error:
        return Pairs(missing=f"The copy of the pairs cannot be read: {error.problems[0].message}")
