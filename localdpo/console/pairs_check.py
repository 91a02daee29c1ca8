"""`localdpo pairs check`: what is wrong with a file of pairs, told to people or programs, and mended where safe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import wrap

from localdpo.console.terminal import is_live, progress_line, say, width
from localdpo.data.check.findings import KINDS, Finding, Severity, counted, exit_code, in_order
from localdpo.data.check.fix import Fixed, fix_file, signature_of
from localdpo.data.check.leaks import Other
from localdpo.data.check.report import DEFAULT_MAX_LENGTH, CheckOptions, Report, check_file
from localdpo.data.check.tokens import ExactCounter
from localdpo.data.pairs import listed, read_prompts
from localdpo.errors import InputError, LocalDPOError, Problem
from localdpo.paths import from_here
from localdpo.recipe import Truncation, load_recipe
from localdpo.text import sanitise

__all__ = ["Request", "exact_counter", "lines", "run", "settings_of"]

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.INFO: "cyan"}
_EACH = 10


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for on the command line."""

    file: Path | None = None
    recipe: Path | None = None
    eval_file: Path | None = None
    model: str | None = None
    expect: tuple[str, ...] = ()
    max_length: int | None = None
    fix: bool = False
    json_lines: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """What a recipe, if any, says about the file."""

    file: Path
    others: tuple[Other, ...] = ()
    expected: tuple[str, ...] = ()
    max_length: int = DEFAULT_MAX_LENGTH
    truncation: Truncation = "keep_start"
    model: str | None = None


def settings_of(file: Path | None, recipe_file: Path | None) -> Settings:
    """Return the file and its settings: the recipe's, whose training file it is unless named. Raises `InputError`."""
    if recipe_file is None:
        if file is None:
            raise InputError(Problem("FILE", "is missing", "Name a file of pairs, or a recipe with --recipe"))
        return Settings(file)
    recipe = load_recipe(recipe_file, check_files=False)
    data = recipe.data
    named = (("eval", data.eval), ("probes", data.probes), ("retain", data.retain))
    others = tuple(Other(Path(from_here(path)), purpose) for purpose, path in named if isinstance(path, Path))  # type: ignore[arg-type]
    expected = [text for row in read_prompts(data.probes) for text in row.accept] if data.probes else []
    return Settings(
        file or Path(from_here(data.train)), others, tuple(expected), data.max_length, data.truncation, recipe.model
    )


def exact_counter(spec: str | None, only_from: int, *, required: bool) -> tuple[ExactCounter | None, str]:
    """Return a counter with the tokenizer of a model, and a note where tokens are estimated instead.

    A recipe's model that is not on this machine is not fetched for this; one that is `required` is.
    """
    if spec is None:
        return None, "tokens are estimated from characters; --model counts them"
    from localdpo.console.fetch import fetch
    from localdpo.model.load import load_tokenizer
    from localdpo.model.resolve import cached_path
    from localdpo.model.safety import check_model_folder

    try:
        if not required and cached_path(spec) is None:
            return None, f"tokens are estimated from characters: {spec} is not on this machine"
        return ExactCounter(load_tokenizer(check_model_folder(fetch(spec).path)), only_from), ""
    except LocalDPOError as error:
        if required:
            raise
        return None, f"tokens are estimated from characters: {error}"


def run(request: Request) -> int:
    """Check, mend where asked to, print, and return the exit code. Raises `LocalDPOError`."""
    settings = settings_of(request.file, request.recipe)
    if not settings.file.is_file():
        fix = "Check the path: those in a recipe are relative to its folder"
        raise InputError(Problem(str(settings.file), "is not a file that can be read", fix))
    limit = request.max_length or settings.max_length
    counter, note = exact_counter(request.model or settings.model, limit, required=request.model is not None)
    extra = (Other(request.eval_file, "eval"),) if request.eval_file else ()
    options = CheckOptions(
        (*extra, *settings.others), (*request.expect, *settings.expected), limit, settings.truncation, counter
    )
    checked = signature_of(settings.file)
    report = _checked(settings.file, options, request)
    fixed = None
    if request.fix:
        fixed = fix_file(settings.file, report.findings, checked)
        if fixed.changes:
            report = _checked(settings.file, options, request)
    if request.model is not None:
        report.findings = in_order([*report.findings, *_distances(settings.file, options, request)])
    if note and any(f.kind == "too_long" for f in report.findings):
        report.notes.append(note)
    _show(report, fixed, request)
    return exit_code(report.findings)


def _checked(path: Path, options: CheckOptions, request: Request) -> Report:
    with progress_line("checking", quiet=request.json_lines) as progress:
        return check_file(path, options, progress)


def _distances(path: Path, options: CheckOptions, request: Request) -> Iterator[Finding]:
    from localdpo.console.fetch import fetch
    from localdpo.evaluate.distance import distance_findings, measure_distances
    from localdpo.model.load import load_model

    fetch(str(request.model))
    loaded = load_model(str(request.model))
    with progress_line("scoring with the model", quiet=request.json_lines) as progress:
        distances = measure_distances(
            path, loaded, max_length=options.max_length, truncation=options.truncation, progress=progress
        )
    yield from (replace(finding, file=str(path)) for finding in distance_findings(distances))


def _show(report: Report, fixed: Fixed | None, request: Request) -> None:
    done = [] if fixed is None else list(_fix_lines(fixed))
    if request.json_lines:
        print(json.dumps([finding.to_json() for finding in report.findings], indent=2))
        for line in done:
            say(line, file=sys.stderr)
        return
    live = is_live(sys.stdout)
    for text in done:
        say(text)
    shown = lines(report, width() if live else 0)
    if live:
        _print_styled(shown)
    else:
        say(*(text for text, _ in shown))


def _print_styled(shown: Sequence[tuple[str, Severity | None]]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)  # rich leaves colours out under NO_COLOR
    for line, severity in shown:
        text = Text(sanitise(line))
        if severity is not None:
            text.stylize(_STYLES[severity], 0, len(severity))
        console.print(text)


def lines(report: Report, columns: int = 0) -> list[tuple[str, Severity | None]]:
    """Return the report in sanitised lines, wrapped to `columns` unless that is 0.

    A line that a finding starts with comes with its severity, whose word it begins with.
    """
    skipped = f", {counted(report.skipped, 'row', 'rows')} that training skips" if report.skipped else ""
    shown: list[tuple[str, Severity | None]] = [
        (f"{sanitise(report.file)}: {counted(report.pairs, 'pair', 'pairs')}{skipped}", None)
    ]
    for finding in _first_of_each(report.findings):
        shown += [
            (line, finding.severity if i == 0 else None) for i, line in enumerate(_entry(finding, report, columns))
        ]
    hidden = len(report.findings) - len(list(_first_of_each(report.findings)))
    if hidden:
        shown.append((f"… and {hidden:,} more broken rows or the like; --json has all", None))
    for note in report.notes:
        shown += [(line, None) for line in _wrapped(f"note: {sanitise(note)}", columns, 6)]
    shown += [(line, None) for line in _wrapped(_closing(report), columns, 0)]
    return shown


def _first_of_each(findings: Sequence[Finding]) -> Iterator[Finding]:
    seen: dict[str, int] = {}
    for finding in findings:
        seen[finding.kind] = seen.get(finding.kind, 0) + 1
        if seen[finding.kind] <= _EACH:
            yield finding


def _entry(finding: Finding, report: Report, columns: int) -> Iterator[str]:
    head = f"{finding.severity:8} {KINDS[finding.kind].title}: {sanitise(finding.message)}"
    yield from _wrapped(head, columns, 9)
    if finding.rows:
        elsewhere = f" of {sanitise(finding.file)}" if finding.file != report.file else ""
        yield from _wrapped(f"{'':9}{listed(finding.rows)}{elsewhere}", columns, 9)
    if finding.fix:
        yield from _wrapped(f"{'':9}→ {sanitise(finding.fix)}", columns, 11)


def _wrapped(text: str, columns: int, indent: int) -> list[str]:
    flat = text.replace("\n", " ")
    if not columns:
        return [flat]
    indent = min(indent, columns // 4)
    lead = " " * min(len(flat) - len(flat.lstrip()), indent)
    return wrap(flat.strip(), columns, initial_indent=lead, subsequent_indent=" " * indent) or [""]


def _closing(report: Report) -> str:
    counts = {severity: sum(f.severity is severity for f in report.findings) for severity in Severity}
    names = {
        Severity.ERROR: ("error", "errors"),
        Severity.WARNING: ("warning", "warnings"),
        Severity.INFO: ("note", "notes"),
    }
    parts = [counted(counts[s], *names[s]) for s in reversed(Severity) if counts[s]]
    text = ", ".join(parts) if parts else "nothing found"
    fixable = sorted({KINDS[f.kind].title for f in report.findings if f.fixable})
    return text + (f"; --fix puts right: {', '.join(fixable)}" if fixable else "")


def _fix_lines(fixed: Fixed) -> Iterator[str]:
    reasons = {"blank": "blank", "identical": "with twice the same answer", "duplicate": "repeated"}
    for kind, rows in fixed.deleted.items():
        yield f"fixed: {_rows(rows)} deleted, {reasons[kind]} ({listed(rows)})"
    if fixed.cleaned:
        what = "terminal escapes and control characters removed from"
        yield f"fixed: {what} {_rows(fixed.cleaned)} ({listed(fixed.cleaned)})"
    if fixed.kept:
        yield f"left: {_rows(fixed.kept)} repeated with another weight, tags or the like ({listed(fixed.kept)})"
    if fixed.backup is not None:
        yield f"the file as it was: {fixed.backup}"
    else:
        yield "nothing to fix"


def _rows(rows: Sequence[int]) -> str:
    return counted(len(rows), "row", "rows")
