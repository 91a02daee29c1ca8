"""What the Runs place says below its charts: one run in figures and words, or two side by side. Text only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from textual.content import Content

from localdpo_tui.services.run_list import RunRow, compared_figures, recipe_differences
from localdpo_tui.services.run_view import state_sign
from localdpo_tui.shown import fit, inert, one_line

__all__ = ["about", "differences"]


def about(shown: Sequence[RunRow], current: str | None) -> Iterator[Content]:
    """Runs one after another; `current` is the name of the one that is kept."""
    for row in shown:
        yield Content.assemble((f"{state_sign(row.state)} {one_line(row.state)}", "bold"), f"  {one_line(row.model)}")
        if row.message:
            yield Content(one_line(row.message, 1000))
        if row.name == current:
            yield Content.styled("★ the current run: Chat opens it first", "$text-success")
        yield Content("")
        if row.verdict is not None:
            yield Content.styled(f"Verdict: {one_line(row.verdict.words, 1000)}", "bold")
            yield Content("")
        for name, _, value in compared_figures(row, row):
            yield inert(f"{name:20} {value}")
        yield Content("")
        for line in row.lines:
            yield Content(one_line(line, 400))
        if not row.adapter:
            yield Content.styled("No adapter yet: a run has one when it finishes or is stopped.", "$text-muted")
        yield Content.styled("Space marks a run; two marked ones are compared.", "$text-muted")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def differences(first: RunRow, second: RunRow) -> Iterator[Content]:
    """Figures and recipes of two runs side by side."""
    yield Content.assemble(("A ", "bold"), one_line(first.name), ("   B ", "bold"), one_line(second.name))
    for name, left, right in compared_figures(first, second):
        yield inert(f"{name:20} {fit(left or '-', 12)} {right or '-'}")
    yield Content("")
    differing = recipe_differences(first.recipe, second.recipe)
    if not differing:
        yield Content.styled("Their recipes are the same.", "$text-muted")
        return
    yield Content.styled("Recipes differ in", "bold")
    for key, left, right in differing:
        yield Content.assemble(one_line(key), ": ", one_line(_plain(left)), " → ", one_line(_plain(right)))
