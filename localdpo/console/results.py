"""The closing table: base and tuned answers to prompts that were never trained on, and the figures over all.

What went wrong comes first; of every group a few rows are shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from localdpo.console.terminal import duration_text
from localdpo.evaluate.figures import TAUGHT, group_of
from localdpo.paths import from_here
from localdpo.text import sanitise
from localdpo.train.events import EndEvent, SampleEvent

_WRONG_A_GROUP, _OTHERS_A_GROUP = 12, 6
_CELL = 160


def chosen_rows(samples: Sequence[SampleEvent]) -> list[SampleEvent]:
    """Return the samples to show: by group, first those that went wrong, then others, a few of each."""
    groups: dict[str, list[SampleEvent]] = {}
    for sample in samples:
        groups.setdefault(group_of(sample), []).append(sample)
    rows = []
    for members in groups.values():
        wrong = [sample for sample in members if _went_wrong(sample)]
        rest = [sample for sample in members if not _went_wrong(sample)]
        rows += wrong[:_WRONG_A_GROUP] + rest[:_OTHERS_A_GROUP]
    return rows


def _went_wrong(sample: SampleEvent) -> bool:
    """Whether what was to be learned is missing, or what was right is lost; wrong as before is neither."""
    return sample.tuned_right is False and (sample.base_right is True or group_of(sample) == TAUGHT)


def _cell(text: str) -> str:
    line = " ".join(sanitise(text).split())
    return line if len(line) <= _CELL else line[: _CELL - 1] + "…"


def _mark(right: bool | None) -> str:
    return {True: "✓ ", False: "✗ ", None: ""}[right]


def closing_lines(samples: Sequence[SampleEvent], end: EndEvent) -> list[str]:
    """Return the closing table as plain lines, for a pipe."""
    rows = chosen_rows(samples)
    lines = []
    group = None
    for sample in rows:
        if group_of(sample) != group:
            group = group_of(sample)
            lines += ["", f"[{sanitise(group)}]"]
        lines += [
            f"  {_cell(sample.prompt[-1]['content'])}",
            f"    base:  {_mark(sample.base_right)}{_cell(sample.base)}",
            f"    tuned: {_mark(sample.tuned_right)}{_cell(sample.tuned)}",
        ]
    return [*lines, *_left_out(samples, rows), *end_lines(end)]


def glimpse_line(sample: SampleEvent) -> str:
    """Return what the model says by now to a prompt, in a line."""
    mark = _mark(sample.tuned_right)
    return f"  after step {sample.step}: {_cell(sample.prompt[-1]['content'])} {mark}{_cell(sample.tuned)}"


def closing_table(samples: Sequence[SampleEvent], end: EndEvent, width: int) -> Iterable[Any]:
    """Yield what a terminal of ``width`` columns is shown: a table where it fits, and lines."""
    if width < 60 or not samples:
        yield "\n".join(closing_lines(samples, end))
        return
    from rich.table import Table
    from rich.text import Text

    rows = chosen_rows(samples)
    table = Table("prompt", "base", "tuned", expand=True, show_lines=False, pad_edge=False, box=None)
    for column, ratio in zip(table.columns, (3, 5, 5), strict=True):
        column.ratio = ratio
    group = None
    for sample in rows:
        if group_of(sample) != group:
            group = group_of(sample)
            table.add_row(Text(sanitise(group), style="bold"), "", "")
        table.add_row(
            Text(_cell(sample.prompt[-1]["content"])),
            Text(_mark(sample.base_right) + _cell(sample.base), style="dim"),
            Text(
                _mark(sample.tuned_right) + _cell(sample.tuned),
                style="red" if sample.tuned_right is False else "",
            ),
        )
    yield table
    yield "\n".join([*_left_out(samples, rows), *end_lines(end)])


def _left_out(samples: Sequence[SampleEvent], rows: Sequence[SampleEvent]) -> list[str]:
    if len(rows) == len(samples):
        return []
    return [f"  … {len(samples) - len(rows)} more in samples.jsonl"]


def end_lines(end: EndEvent) -> list[str]:
    """Return how the run ended, with the figures over all probes and where the adapter is."""
    if end.reason == "diverged":
        return []  # the error says it
    lines = ["", *map(sanitise, end.figures.get("lines", ()))]
    took = f" in {duration_text(end.seconds)}" if end.seconds else ""
    lines.append(sanitise(f"{end.reason.replace('_', ' ')}{took}. {end.message}".strip()))
    if end.adapter:
        at = "" if end.adapter_step is None else f" (step {end.adapter_step})"
        lines.append(f"adapter{at}: {sanitise(from_here(end.adapter))}")
    return lines
