"""A line of fields for the options that choose tokens; `values` says what is wrong in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widgets import Input, Static

from localdpo.errors import InputError, Problem
from localdpo.model.sampling import SamplingOptions
from localdpo_tui.widgets.safe_input import SafeInput

__all__ = ["SamplingForm"]

_LABELS = {
    "count": ("answers", 4),
    "temperature": ("temperature", 6),
    "top_p": ("top p", 6),
    "max_tokens": ("max tokens", 7),
    "seed": ("seed", 8),
}
_OPTIONS = {field.name for field in fields(SamplingOptions)}
_WHOLE = {"count", "max_tokens", "seed"}


class SamplingForm(Horizontal):
    """Fields by name, out of those of `_LABELS`. An empty seed is no seed."""

    DEFAULT_CSS = """
    SamplingForm {
        height: 1; width: 1fr;
        Static { width: auto; color: $text-muted; }
        Input { margin: 0 1 0 1; }
    }
    """

    def __init__(self, names: Sequence[str], values: Mapping[str, Any], id: str | None = None) -> None:
        super().__init__(id=id)
        self._names = list(names)
        self._values = dict(values)

    def compose(self) -> ComposeResult:
        """Lay the fields out in one line."""
        for name in self._names:
            label, width = _LABELS[name]
            value = self._values.get(name)
            yield Static(label)
            field = SafeInput(
                "" if value is None else f"{value}", compact=True, id=f"sampling-{name}", select_on_focus=True
            )
            field.styles.width = width
            yield field

    def values(self) -> dict[str, Any]:
        """The values typed. Raises InputError naming every one that cannot be."""
        found: dict[str, Any] = {}
        problems = []
        for name in self._names:
            text = self.query_one(f"#sampling-{name}", Input).value.strip()
            if not text and name == "seed":
                found[name] = None
                continue
            try:
                found[name] = int(text) if name in _WHOLE else float(text)
            except ValueError:
                kind = "a whole number" if name in _WHOLE else "a number"
                problems.append(Problem(_LABELS[name][0], f"{text or 'nothing'} is not {kind}"))
        try:
            SamplingOptions(**{name: value for name, value in found.items() if name in _OPTIONS})
        except InputError as error:
            problems += [Problem(_LABELS[problem.where][0], problem.message, problem.fix) for problem in error.problems]
        if problems:
            raise InputError(*problems)
        return found
