"""The parts pages are made of: sections, tables, figures with their intervals, what is missing. Knows no run."""

from __future__ import annotations

from collections.abc import Sequence

from localdpo.report.markup import Child, Markup, tag
from localdpo.report.svg import interval_svg
from localdpo.report.values import Figure
from localdpo.series import number_text

__all__ = [
    "MAX_TEXT",
    "chip",
    "code",
    "cut",
    "facts",
    "figure_cell",
    "fold",
    "missing",
    "note",
    "percent",
    "plain",
    "section",
    "sentence",
    "table",
]

MAX_TEXT = 4_000
"""Characters of one text that a page shows; the rest is counted."""


def section(key: str, title: str, *children: Child) -> Markup:
    """A section with a heading that can be linked to."""
    return tag("section", tag("h2", title), *children, id=key)


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Child]], *, right: Sequence[int] = ()) -> Markup:
    """A table that scrolls inside itself where it is too wide; the first cell of a row is its heading."""
    head = tag("tr", [tag("th", name, scope="col", class_="number" if i in right else None)
                      for i, name in enumerate(header)])  # fmt: skip
    body = [
        tag(
            "tr",
            [
                tag("th", cell, scope="row") if i == 0 else tag("td", cell, class_="number" if i in right else None)
                for i, cell in enumerate(row)
            ],
        )
        for row in rows
    ]
    return tag(
        "div",
        tag("table", tag("caption", caption, class_="unseen"), tag("thead", head), tag("tbody", body)),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=caption,
    )


def facts(rows: Sequence[tuple[str, Child]]) -> Markup:
    """Names and values in two columns; rows without a value are left out."""
    shown = [(name, value) for name, value in rows if value is not None and value != ""]
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in shown], class_="facts")


def fold(summary: Child, *children: Child, class_: str | None = None) -> Markup:
    """What is shown when it is asked for."""
    return tag("details", tag("summary", summary), *children, class_=class_)


def chip(words: str, kind: str = "") -> Markup:
    """A few words that stand out; `kind` is good, fair or bad. The words say what the colour says."""
    return tag("span", words, class_=f"chip {kind}".strip())


def code(words: str) -> Markup:
    """Something to type."""
    return tag("code", words)


def note(*children: Child) -> Markup:
    """A quiet line."""
    return tag("p", *children, class_="note")


def missing(what: str, command: str = "") -> Markup:
    """Say what a page lacks, and the command that gives it."""
    return tag("p", what, [" ", code(command), " gives it."] if command else None, class_="missing")


def cut(text: str, most: int = MAX_TEXT) -> str:
    """A text of at most `most` characters, which says how many more there are."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} more characters)"


def sentence(words: str) -> str:
    """Words with a capital and a full stop, where their author left these to others."""
    return words[:1].upper() + words[1:] + ("" if words.endswith((".", "!", "?", "…")) or not words else ".")


def percent(figure: Figure | None) -> str:
    """A share with its interval: 92% (84% to 97%)."""
    if figure is None:
        return "–"
    if figure.low is None or figure.high is None:
        return f"{figure.value:.0%}"
    return f"{figure.value:.0%} ({figure.low:.0%} to {figure.high:.0%})"


def plain(figure: Figure | None) -> str:
    """A number with its interval."""
    if figure is None:
        return "–"
    if figure.low is None or figure.high is None:
        return number_text(figure.value)
    return f"{number_text(figure.value)} ({number_text(figure.low)} to {number_text(figure.high)})"


def figure_cell(figure: Figure | None, *, share: bool, threshold: float | None = None) -> Child:
    """A figure in words and, where it has an interval or a threshold, as a small gauge."""
    words = percent(figure) if share else plain(figure)
    if figure is None or (figure.low is None and threshold is None):
        return words
    gauge = interval_svg(figure.value, figure.low, figure.high, threshold)
    return [tag("span", words, class_="nowrap"), gauge]
