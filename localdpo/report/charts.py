"""Which curves a page shows, with what they mean, for one run or for two in one picture.

A chart here is data: lines over steps, reference values, words. How it is drawn is `localdpo.report.svg`'s to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from localdpo.report.record import Record
from localdpo.series import Bucket, Range, Series, number_text

__all__ = ["CURVE_POINTS", "TABLE_ROWS", "Chart", "Line", "charts_of"]

CURVE_POINTS, TABLE_ROWS = 200, 60
"""The most points a line is drawn with (each with its lowest and highest value) and rows in a chart's table."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A chart of a run: lines as (label, metric), the metric of held-out pairs, values to compare with."""

    key: str
    title: str
    meaning: str
    lines: tuple[tuple[str, str], ...]
    held_out: str = ""
    references: tuple[float, ...] = ()
    share: Range | None = None
    smoothing: float = 0.6


SPECS = (
    Spec("loss", "Loss", "What training lowers. It says nothing yet about new prompts.", (("training", "loss"),),
         "eval_loss"),
    Spec("margins", "Reward margin", "How much more the chosen answer is preferred than by the base; above 0 is right.",
         (("training", "rewards/margins"),), "eval_rewards/margins", (0.0,)),
    Spec("accuracies", "Accuracy", "The share of pairs with the chosen answer preferred. 0.5 is a coin's.",
         (("training", "rewards/accuracies"),), "eval_rewards/accuracies", (0.5,), Range(0, 1)),
    Spec("rewards", "Rewards", "How far each answer has moved from the base; a sinking chosen line is a warning.",
         (("chosen", "rewards/chosen"), ("rejected", "rewards/rejected")), "", (0.0,)),
    Spec("logps", "Log-probabilities", "Of whole answers, in nats: how likely the model is to write them.",
         (("chosen", "logps/chosen"), ("rejected", "logps/rejected"))),
    Spec("drift", "Retained answers",
         "By how many nats a token the base's answers to retain prompts became less likely.",
         (("retained answers", "retain/drift"),), "", (0.0,)),
    Spec("lengths", "Length of answers", "Mean words of the sample answers, while training and after it.",
         (("tuned", "words/tuned"), ("base", "words/base")), smoothing=0.0),
    Spec("grad_norm", "Gradient norm", "Before clipping. Spikes mean that single batches pull hard.",
         (("norm", "grad_norm"),)),
    Spec("learning_rate", "Learning rate", "The schedule as it was run.", (("rate", "learning_rate"),),
         smoothing=0.0),
    Spec("speed", "Tokens a second", "Speed of training steps.", (("tokens/s", "tokens_per_second"),),
         share=Range(0, 1)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """A curve with its name; `colour` and `dash` number its style. `sparse` lines show their points."""

    label: str
    series: Series
    colour: int
    dash: int = 0
    sparse: bool = False
    smoothing: float = 0.0

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The line in numbers, at most `TABLE_ROWS` rows: the header, and the rows."""
        buckets = self.series.thinned(TABLE_ROWS).buckets
        if all(bucket.count == 1 for bucket in buckets):
            return ("Step", self.label), [(f"{bucket.first:g}", number_text(bucket.mean, 4)) for bucket in buckets]
        rows = [(_steps(b), *(number_text(value, 4) for value in (b.mean, b.low, b.high))) for b in buckets]
        return ("Steps", f"{self.label}, mean", "lowest", "highest"), rows


def _steps(bucket: Bucket) -> str:
    return f"{bucket.first:g}" if bucket.first == bucket.last else f"{bucket.first:g}–{bucket.last:g}"


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over the optimizer's steps. `share` is a range of y that is always shown."""

    key: str
    title: str
    meaning: str
    lines: tuple[Line, ...]
    references: tuple[float, ...] = ()
    share: Range | None = None
    names: tuple[str, ...] = field(default=())

    def summary(self) -> str:
        """The chart in one sentence, for those who do not see it."""
        parts = [part for line in self.lines if (part := _course(line))]
        return f"{self.title} over training steps. " + "; ".join(parts) + "."


def _course(line: Line) -> str:
    buckets = line.series.buckets
    first, last = buckets[0], buckets[-1]
    low, high = min(bucket.low for bucket in buckets), max(bucket.high for bucket in buckets)
    if first is last:
        return f"{line.label}: {number_text(first.mean)} at step {first.last:g}"
    return (
        f"{line.label}: from {number_text(first.mean)} at step {first.first:g} to {number_text(last.mean)} at step "
        f"{last.last:g}, between {number_text(low)} and {number_text(high)}"
    )


def charts_of(records: Sequence[Record], names: Sequence[str] = ()) -> list[Chart]:
    """The charts of one run, or of two whose lines are called by `names`; charts without a point are left out."""
    found = []
    for spec in SPECS:
        lines = tuple(_lines(spec, records, names))
        # Answers are sampled while training only on request; after it alone they make a point, not a course.
        if lines and (spec.key != "lengths" or len(lines[0].series.buckets) > 1):
            found.append(Chart(spec.key, spec.title, spec.meaning, lines, spec.references, spec.share, tuple(names)))
    return found


def _lines(spec: Spec, records: Sequence[Record], names: Sequence[str]) -> Iterator[Line]:
    """One run: a colour a metric. Two: a colour a run, a dash a metric."""
    several = len(records) > 1
    for run, record in enumerate(records):
        prefix = f"{names[run]} " if several else ""
        wanted = [(label, metric, False) for label, metric in spec.lines]
        wanted += [("held out", spec.held_out, True)] if spec.held_out else []
        for number, (label, metric, held_out) in enumerate(wanted):
            series = record.curves.get(metric)
            if series is None or not series.buckets:
                continue
            shown = prefix.strip() if several and len(wanted) == 1 else prefix + label
            yield Line(
                shown,
                series.thinned(CURVE_POINTS),
                colour=run if several else number,
                dash=number,
                sparse=held_out or metric.startswith("words/"),
                smoothing=0.0 if held_out else spec.smoothing,
            )
