"""Pages and charts as files. PNG needs resvg: small wheels for every platform that carry their own renderer, where
cairo would have to be installed beside Python and Pillow cannot read SVG.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.files import atomic_write, environment_faults
from localdpo.machine import describe_machine
from localdpo.report.charts import Chart
from localdpo.report.compare import compare_page
from localdpo.report.page import run_page
from localdpo.report.record import Record
from localdpo.report.svg import chart_file

__all__ = ["PAGE", "ChartFormat", "chart_format", "write_charts", "write_comparison", "write_report"]

PAGE = "report.html"
ChartFormat = Literal["svg", "png"]


def write_report(record: Record, output: Path | None = None) -> Path:
    """Write the page of a run, by default `report.html` in its folder. Returns where. Raises EnvironmentFault."""
    target = output or record.run.path / PAGE
    if output is None and target.is_symlink():
        # A run folder may come from anywhere: what it points to is not ours to replace.
        raise InputError(Problem(str(target), "is a link to somewhere else", "Remove it, or name a file with --output"))
    _write(target, run_page(record, describe_machine()))
    return target


def write_comparison(first: Record, second: Record, output: Path) -> Path:
    """Write the page of two runs. Raises EnvironmentFault."""
    _write(output, compare_page(first, second))
    return output


def _write(target: Path, page: str) -> None:
    if target.is_dir():
        raise InputError(Problem(str(target), "is a folder", "Name a file with --output"))
    with environment_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(target, page)


def chart_format(name: str) -> ChartFormat:
    """`name` as a format of charts. Raises InputError."""
    for known in get_args(ChartFormat):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise InputError(Problem("--format", f"{name!r} is not a format of charts", "Use svg or png"))


def write_charts(charts: Sequence[Chart], folder: Path, kind: ChartFormat) -> list[Path]:
    """Write each chart as a file of its own, named by what it shows. Raises EnvironmentFault."""
    render = _png_renderer() if kind == "png" else None
    with environment_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
    written = []
    for chart in charts:
        drawing = str(chart_file(chart))
        target = folder / f"{chart.key}.{kind}"
        atomic_write(target, drawing + "\n" if render is None else bytes(render(svg_string=drawing)))
        written.append(target)
    return written


def _png_renderer() -> Callable[..., bytes]:
    try:
        render: Callable[..., bytes] = importlib.import_module("resvg_py").svg_to_bytes
    except ImportError:
        raise EnvironmentFault(
            Problem("--format png", "needs the package resvg-py", "pip install 'localdpo[png]', or use --format svg")
        ) from None
    return render
