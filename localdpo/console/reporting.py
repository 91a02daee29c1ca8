"""`localdpo report` and `localdpo runs compare`: pages and charts written, and what they say in a few lines."""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localdpo.console.terminal import bytes_text, columns, say
from localdpo.report.charts import charts_of
from localdpo.report.compare import FigureRow, compared_charts, compared_figures, names_of
from localdpo.report.differences import recipe_differences
from localdpo.report.formats import value_text
from localdpo.report.record import Record, read_record
from localdpo.report.summary import headline
from localdpo.report.values import object_at, text
from localdpo.report.write import ChartFormat, chart_format, write_charts, write_comparison, write_report
from localdpo.text import sanitise

__all__ = ["Request", "compare", "run"]

_MOST_DIFFERENCES = 20


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for beside the runs."""

    output: Path | None = None
    show: bool = False
    charts: Path | None = None
    format: str = "svg"
    as_json: bool = False


def run(folder: Path, request: Request) -> None:
    """Write the page of a run and, if asked for, its charts. Raises InputError, EnvironmentFault."""
    kind = chart_format(request.format)
    record = read_record(folder)
    charts = _charts(charts_of([record]), request.charts, kind)
    page = write_report(record, request.output)
    missing = list(_missing(record))
    if request.as_json:
        said = {"report": str(page), "charts": [str(chart) for chart in charts], "verdict": _verdict(record)}
        print(json.dumps({**said, "missing": missing}, indent=2))
    else:
        say(f"{headline(record)}.")
        _say_written(page, charts)
        for line in missing:
            say(f"missing: {line}")
    _open(page, request)


def compare(first: Path, second: Path, request: Request) -> None:
    """Print two runs side by side; write their page and charts if asked for. Raises InputError, EnvironmentFault."""
    kind = chart_format(request.format)
    a, b = read_record(first, check=False), read_record(second, check=False)
    charts = _charts(compared_charts(a, b), request.charts, kind)
    output = request.output or (Path(f"{a.name}-{b.name}.html") if request.show else None)
    page = write_comparison(a, b, output) if output else None
    figures = compared_figures(a, b)
    differences = recipe_differences(object_at(a.info, "recipe"), object_at(b.info, "recipe"))
    if request.as_json:
        print(json.dumps(_comparison(a, b, figures, differences, page, charts), indent=2))
    else:
        say(*_lines(names_of(a, b), figures, differences))
        if page is None:
            say("", "--output FILE writes this with curves and answers as a page.")
        else:
            say("")
            _say_written(page, charts)
    if page is not None:
        _open(page, request)


def _charts(charts: Sequence[Any], folder: Path | None, kind: ChartFormat) -> list[Path]:
    return write_charts(charts, folder, kind) if folder is not None else []


def _say_written(page: Path, charts: Sequence[Path]) -> None:
    say(f"{page}  {bytes_text(page.stat().st_size)}")
    if charts:
        say(f"{len(charts)} charts in {charts[0].parent}")


def _open(page: Path, request: Request) -> None:
    if request.show and not webbrowser.open(page.absolute().as_uri()) and not request.as_json:
        say(f"There is no browser to open here: the page is {page}")


def _verdict(record: Record) -> dict[str, Any] | None:
    return {**record.verdict, "provisional": record.provisional} if record.verdict else None


def _missing(record: Record) -> Iterator[str]:
    if not record.evaluation and record.has_adapter:
        yield f"the verdict: `localdpo eval {record.argument}` measures it"
    if not record.evaluation and not record.has_adapter:
        yield "an adapter: the run has not saved one"
    if record.pairs.missing:
        yield record.pairs.missing


def _lines(
    names: Sequence[str], figures: Sequence[FigureRow], differences: Sequence[tuple[str, Any, Any]]
) -> Iterator[str]:
    rows = [[row.name, row.first, row.second] for row in figures]
    yield from columns(("", *map(sanitise, names)), [[sanitise(cell) for cell in row] for row in rows])
    if not differences:
        yield from ("", "Their recipes are the same.")
        return
    yield from ("", "Settings that differ:")
    cells = [[key, value_text(a), value_text(b)] for key, a, b in differences[:_MOST_DIFFERENCES]]
    yield from (f"  {line}" for line in columns(("", "", ""), [[sanitise(cell) for cell in row] for row in cells])[1:])
    if len(differences) > _MOST_DIFFERENCES:
        yield f"  and {len(differences) - _MOST_DIFFERENCES} more"


def _comparison(
    first: Record,
    second: Record,
    figures: Sequence[FigureRow],
    differences: Sequence[tuple[str, Any, Any]],
    page: Path | None,
    charts: Sequence[Path],
) -> Mapping[str, Any]:
    return {
        "runs": [str(first.run.path), str(second.run.path)],
        "verdicts": [_verdict(first), _verdict(second)],
        "states": [first.state, second.state],
        "models": [text(first.model), text(second.model)],
        "figures": {row.key: list(row.values) for row in figures if row.values != (None, None)},
        "recipe": {key: [a, b] for key, a, b in differences},
        "report": page and str(page),
        "charts": [str(chart) for chart in charts],
    }
