"""A run as one HTML page: no script, nothing loaded, and a policy that would refuse both.

The theme follows the system, or the choice at the top, which is plain HTML and CSS. Everything works without a mouse,
at the width of a phone, and on paper.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from localdpo.report.answers import answers_section
from localdpo.report.charts import TABLE_ROWS, Chart, charts_of
from localdpo.report.made import data_section, made_section, recipe_section, when
from localdpo.report.markup import Child, Markup, tag
from localdpo.report.measured import (
    blind_section,
    drift_section,
    fairness_section,
    held_out_section,
    task_section,
    unmeasured_section,
)
from localdpo.report.palette import page_css
from localdpo.report.parts import fold, missing, section, table
from localdpo.report.record import Record
from localdpo.report.summary import headline, state_chip, tiles, verdict
from localdpo.report.svg import chart_svg
from localdpo.report.values import number
from localdpo.series import Bucket, number_text

__all__ = ["charts_section", "document", "run_page"]

_THEMES = (("system", "System"), ("light", "Light"), ("dark", "Dark"))
_NAMES = {
    "curves": "Curves",
    "answers": "Answers",
    "held-out": "Held-out pairs",
    "drift": "What else changed",
    "tasks": "Tasks",
    "fairness": "Fairness",
    "blind": "Blind comparison",
    "unmeasured": "Not measured",
    "data": "Data",
    "recipe": "Recipe",
    "figures": "Figures",
    "made": "How it was made",
}


def run_page(record: Record, machine: Mapping[str, Any] | None = None, now: float | None = None) -> str:
    """The page of one run. `machine` is what the page is made on (`localdpo.machine`), `now` a time since 1970."""
    moment = time.time() if now is None else now
    charts = charts_of([record])
    parts = {
        "curves": charts_section(charts),
        "answers": answers_section(record),
        "held-out": held_out_section(record),
        "drift": drift_section(record),
        "tasks": task_section(record),
        "fairness": fairness_section(record),
        "blind": blind_section(record),
        "unmeasured": unmeasured_section(record),
        "data": data_section(record),
        "recipe": recipe_section(record),
        "made": made_section(record, machine or {}, moment),
    }
    facts = [record.model, when(number(record.info.get("created")))]
    return document(
        f"{record.name}: {headline(record)}",
        record.name,
        [state_chip(record), " ", " · ".join(fact for fact in facts if fact)],
        [verdict(record), tiles(record)],
        parts,
    )


def document(title: str, heading: str, under: Child, top: Sequence[Child], parts: Mapping[str, Markup | None]) -> str:
    """A whole page from its sections; those that are None are left out, the others can be jumped to."""
    style = Markup(page_css())  # our own text: the one thing that is put in as it is
    shown = {key: part for key, part in parts.items() if part is not None}
    links = [tag("li", tag("a", _NAMES[key], href=f"#{key}")) for key in shown]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content="localdpo"),
        tag("title", title),
        tag("style", style),
    )
    title_block = [
        tag("p", "localdpo report", class_="kicker"),
        tag("h1", heading),
        tag("p", under, class_="under"),
    ]
    body = tag(
        "body",
        tag("a", "Skip to the content", href="#main", class_="skip"),
        tag("header", tag("div", title_block, class_="title"), _theme(), class_="top"),
        tag("nav", tag("ul", links), aria_label="Sections"),
        tag("main", top, list(shown.values()), id="main", tabindex=-1),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _policy(style: str) -> str:
    """Nothing may be loaded, run, framed or sent; of styles, only the page's own."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _theme() -> Markup:
    choices = [
        [
            tag("input", type="radio", name="theme", id=f"theme-{key}", checked=key == "system"),
            tag("label", name, for_=f"theme-{key}"),
        ]
        for key, name in _THEMES
    ]
    return tag("fieldset", tag("legend", "Theme", class_="unseen"), choices, class_="theme")


def charts_section(charts: Sequence[Chart]) -> Markup:
    """All curves, each with its meaning, a text alternative and a table of its points."""
    if not charts:
        return section("curves", "Curves", missing("No step has been recorded."))
    return section("curves", "Curves", tag("div", [_figure(chart) for chart in charts], class_="charts"))


def _figure(chart: Chart) -> Markup:
    return tag(
        "figure",
        tag("figcaption", tag("h3", chart.title), tag("p", chart.meaning)),
        chart_svg(chart),
        fold("Data", *[_points(chart, number) for number in range(len(chart.lines))], class_="points"),
    )


def _points(chart: Chart, number: int) -> Markup:
    line = chart.lines[number]
    buckets = line.series.thinned(TABLE_ROWS).buckets
    if all(bucket.count == 1 for bucket in buckets):
        rows: list[list[Child]] = [[f"{bucket.first:g}", number_text(bucket.mean, 4)] for bucket in buckets]
        return table(f"{chart.title}, {line.label}", ("Step", line.label), rows, right=(0, 1))
    rows = [[_steps(b), number_text(b.mean, 4), number_text(b.low, 4), number_text(b.high, 4)] for b in buckets]
    header = ("Steps", f"{line.label}, mean", "lowest", "highest")
    return table(f"{chart.title}, {line.label}", header, rows, right=(0, 1, 2, 3))


def _steps(bucket: Bucket) -> str:
    return f"{bucket.first:g}" if bucket.first == bucket.last else f"{bucket.first:g}–{bucket.last:g}"
