"""Two runs side by side: figures, recipe differences, curves in one picture, and answers to the same prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from localdpo.report.answers import answers_of
from localdpo.report.charts import Chart, charts_of
from localdpo.report.differences import recipe_differences
from localdpo.report.formats import count_bytes, duration, percent, plain
from localdpo.report.page import render
from localdpo.report.record import Record
from localdpo.report.summary import headline, last_of
from localdpo.report.values import Figure, figure, object_at, text

__all__ = ["FigureRow", "compare_page", "compared_charts", "compared_figures", "names_of"]


_SHORT = 14
"""A longer name does not fit beside the lines of a chart."""


@dataclass(frozen=True, slots=True)
class FigureRow:
    """One figure of two runs, in words; `key` names it for programs and `values` are the bare numbers."""

    key: str
    name: str
    first: str
    second: str
    values: tuple[float | None, float | None] = (None, None)


def names_of(first: Record, second: Record) -> tuple[str, str]:
    """What the two are called: their folders' names, after a letter where those are the same or long."""
    if _letters(first, second):
        return f"A {first.name}", f"B {second.name}"
    return first.name, second.name


def _letters(first: Record, second: Record) -> bool:
    return first.name == second.name or max(len(first.name), len(second.name)) > _SHORT


def _held(key: str) -> Callable[[Record], Figure | None]:
    """A held-out figure of eval.json, else of the last evaluation while training."""
    metric = {"accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins", "loss": "eval_loss"}[key]

    def get(record: Record) -> Figure | None:
        found = figure(object_at(record.evaluation, "held_out").get(key))
        return found or last_of(record, metric)

    return get


def _drift(part: str, key: str) -> Callable[[Record], Figure | None]:
    return lambda record: figure(object_at(record.evaluation, "drift", part).get(key))


def _plan(key: str) -> Callable[[Record], Figure | None]:
    return lambda record: figure(record.plan.get(key))


def _right(record: Record) -> Figure | None:
    """The share of judged answers that are right after training."""
    judged = [answer.tuned_right for answer in answers_of(record) if answer.tuned_right is not None]
    return Figure(sum(judged) / len(judged)) if judged else None


def _count(found: Figure | None) -> str:
    return "–" if found is None else f"{found.value:,.0f}"


def _seconds(record: Record) -> Figure | None:
    return Figure(record.end.seconds) if record.end and record.end.seconds else None


_FIGURES: tuple[tuple[str, str, Callable[[Record], Figure | None], Callable[[Figure | None], str]], ...] = (
    ("held_out_accuracy", "Held-out accuracy", _held("accuracy"), percent),
    ("held_out_margin", "Held-out margin", _held("margin"), plain),
    ("held_out_loss", "Held-out loss", _held("loss"), plain),
    ("answers_right", "Judged answers right", _right, percent),
    ("facts_kept", "Right answers kept", _drift("probes", "facts_kept"), percent),
    ("retain_unchanged", "Retained answers unchanged", _drift("retain", "unchanged"), percent),
    ("retain_kl", "KL to the base, retained", _drift("retain", "kl_per_token"), plain),
    ("pairs", "Pairs", _plan("train_pairs"), _count),
    ("steps", "Steps", lambda record: figure(record.status.step) if record.status else None, _count),
    ("seconds", "Time", _seconds, lambda found: duration(found.value) if found else "–"),
    (
        "peak_memory_bytes",
        "Peak memory",
        lambda record: figure(record.peak_memory_bytes or None),
        lambda found: count_bytes(found.value) if found else "–",
    ),
)


def compared_figures(first: Record, second: Record) -> list[FigureRow]:
    """What can be compared; figures that neither has are left out. The verdict comes first, in words."""
    rows = [FigureRow("verdict", "Verdict", headline(first), headline(second))]
    for key, name, get, show in _FIGURES:
        a, b = get(first), get(second)
        if a is not None or b is not None:
            values = (a.value if a else None, b.value if b else None)
            rows.append(FigureRow(key, name, show(a), show(b), values))
    return rows


def compared_charts(first: Record, second: Record) -> list[Chart]:
    """The curves of both, one colour a run."""
    return charts_of([first, second], ("A", "B") if _letters(first, second) else (first.name, second.name))


def compare_page(first: Record, second: Record, now: float | None = None) -> str:
    """The page of two runs."""
    return render(
        "compare.html",
        first=first,
        second=second,
        names=names_of(first, second),
        charts=compared_charts(first, second),
        now=time.time() if now is None else now,
        compared_figures=compared_figures,
        same_files=_same_files,
        recipe_differences=recipe_differences,
    )


def _same_files(first: Record, second: Record) -> bool:
    return _sums(first.info) == _sums(second.info)


def _sums(info: Mapping[str, Any]) -> dict[str, str]:
    return {key: text(object_at(file).get("sha256")) for key, file in object_at(info, "files").items()}
