"""`localdpo pairs import` and `localdpo pairs export`: what was found, what was written, what was left out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localdpo.console.terminal import progress_line, say
from localdpo.data.exporters import ExportOptions, export_pairs, target_of
from localdpo.data.importing import ImportOptions, ImportReport, import_pairs, inspect_file
from localdpo.data.output import STDOUT
from localdpo.errors import InputError, Problem

__all__ = ["run_export", "run_import"]


def run_import(
    source: str,
    out: str | None,
    options: ImportOptions,
    *,
    dry_run: bool,
    force: bool,
    strict: bool,
    rejects: Path | None,
    json_lines: bool,
) -> None:
    """Serve `localdpo pairs import`; `strict` makes rows left out an error. Raises LocalDPOError."""
    if dry_run:
        found = inspect_file(source, options)
        _say([found.sentence()], {"source": found.name, "format": found.format}, json_lines, False)
        return
    target = out if out is not None else _beside(source)
    with progress_line("importing", json_lines or target == STDOUT) as progress:
        report = import_pairs(source, target, options, force=force, progress=progress, rejects=rejects)
    lines = [report.inspection.sentence(), *report.sentences()]
    if target != STDOUT:
        lines.append(f"written to {target}")
    _say(lines, {**report.to_json(), "out": target}, json_lines, target == STDOUT)
    if strict and report.left_out.total:
        raise InputError(Problem(report.inspection.name, _left(report), "The others were imported"))


def _left(report: ImportReport) -> str:
    return f"{report.left_out.total:,} of {report.rows:,} rows were left out"


def _beside(source: str) -> str:
    if source == STDOUT:
        raise InputError(Problem("--out", "standard input has no name to write beside", "Give --out FILE, or --out -"))
    path = Path(source)
    return str(path.with_name(f"{path.name.partition('.')[0]}.pairs.jsonl"))


def run_export(
    source: str, out: str, target: str | None, settings: dict[str, Any], *, force: bool, json_lines: bool
) -> None:
    """Serve `localdpo pairs export`; `settings` are the other fields of `ExportOptions`. Raises LocalDPOError."""
    options = ExportOptions(target=target_of(out, target), **settings)
    with progress_line("exporting", json_lines or out == STDOUT) as progress:
        report = export_pairs(source, out, options, force=force, progress=progress)
    lines = [*report.sentences()] + ([f"written to {out}"] if out != STDOUT else [])
    _say(lines, {**report.to_json(), "out": out}, json_lines, out == STDOUT)


def _say(lines: Sequence[str], data: dict[str, Any], json_lines: bool, to_stderr: bool) -> None:
    """Words or JSON; on standard error when standard output carries the rows."""
    stream = sys.stderr if to_stderr else sys.stdout
    say(*([json.dumps(data)] if json_lines else lines), file=stream)
