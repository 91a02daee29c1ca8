"""Import pairs from other tools' files: what is it, which column is what, what was left out and why.

The command line and the UI call the same functions: `inspect_file` tells what a file looks like, `import_pairs`
writes it as JSONL pairs, with where each came from. Rows pass one at a time, so a file may be larger than memory.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from localdpo.data.flat import original_cell, row_of
from localdpo.data.importers.columns import parse_mapping
from localdpo.data.importers.guess import FAMILIES, Chosen, choose_family
from localdpo.data.importers.prompts import PROMPTS, prompt_of
from localdpo.data.importers.source import Container, Source, open_source, sniff
from localdpo.data.importers.tables import read_csv, read_json_list, read_parquet
from localdpo.data.jsonl import ProblemLog, Progress, Row, read_rows
from localdpo.data.leftout import LeftOut
from localdpo.data.output import open_output
from localdpo.data.pairs import PreferencePair, Skipped, pair_to_json, parse_pair
from localdpo.data.provenance import now, with_provenance
from localdpo.data.rowform import RowRefused, plain_row, with_line_ends
from localdpo.errors import InputError, Problem

__all__ = ["ImportOptions", "ImportReport", "Inspection", "format_names", "import_pairs", "inspect_file", "iter_pairs"]

SAMPLE_ROWS = 50
"""The rows by which the format is guessed."""


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """`format` is a family's name, None to guess; `mapping` are `target=column` assignments for a table.

    `encoding` is that of a CSV file. `prompts` writes prompts with their answer as `target` in place of pairs.
    `keep_apostrophes` leaves the apostrophe before a formula sign in a CSV cell. `provenance` notes the source.
    """

    format: str | None = None
    mapping: tuple[str, ...] = ()
    encoding: str | None = None
    prompts: bool = False
    keep_apostrophes: bool = False
    provenance: bool = True


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a file looks like: its container, the format of its rows, and which column is taken for what."""

    name: str
    container: Container
    format: str
    title: str
    guessed: bool
    columns: dict[str, str]

    def sentence(self) -> str:
        """The same in words."""
        names = {
            "jsonl": "JSON Lines", "json": "a JSON list", "objects": "JSON over several lines", "csv": "CSV",
            "parquet": "Parquet",
        }  # fmt: skip
        how = f" (guessed from the first {SAMPLE_ROWS} rows)" if self.guessed else ""
        text = f"{self.name}: {names[self.container]}, {self.title}{how}"
        if self.columns:
            text += ": " + ", ".join(f"{target} = {column!r}" for target, column in self.columns.items())
        return text


@dataclass(slots=True)
class ImportReport:
    """What came of an import: rows read, rows written, and the others with their reasons."""

    inspection: Inspection
    rows: int = 0
    written: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)
    apostrophes: int = 0

    def sentences(self) -> list[str]:
        """The report in words: one sentence for all, one for each reason."""
        what = f"{self.written:,} of {self.rows:,} rows imported"
        lines = [what if not self.left_out.total else f"{what}, {self.left_out.total:,} left out:"]
        lines += [f"  {sentence}" for sentence in self.left_out.sentences()]
        if self.apostrophes:
            lines.append(
                f"{self.apostrophes:,} cells began with ' before a formula sign, as spreadsheets are guarded: the ' "
                "was taken off (--keep-apostrophes keeps it)"
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, for programs."""
        found = self.inspection
        return {
            "source": found.name, "container": found.container, "format": found.format, "guessed": found.guessed,
            "columns": found.columns, "rows": self.rows, "written": self.written, "left_out": self.left_out.to_json(),
            "apostrophes": self.apostrophes,
        }  # fmt: skip


_PLACES = {"jsonl": "line", "csv": "line"}
"""What a row is found by; in other containers rows do not stand on lines of their own."""


def inspect_file(path: str | Path, options: ImportOptions | None = None) -> Inspection:
    """Tell what a file is without importing it. Raises InputError when it cannot be read or is of no known format."""
    with open_source(path) as source:
        return _inspect(source, options or ImportOptions())[0]


def _inspect(source: Source, options: ImportOptions) -> tuple[Inspection, Chosen]:
    container = sniff(source)
    reader, broken = _Reader(source, container, options), LeftOut()
    rows = [_in_plain_form(row.value) for row in itertools.islice(reader.rows(broken.add), SAMPLE_ROWS)]
    if not rows:
        reasons = [Problem("", sentence) for sentence in broken.sentences()[:5]]
        raise InputError(Problem(source.name, "0 rows can be read"), *reasons)
    mapping = parse_mapping(options.mapping)
    chosen = Chosen(PROMPTS) if options.prompts else choose_family(rows, options.format, mapping, source.name)
    family = chosen.family
    found = Inspection(source.name, container, family.name, family.title, chosen.guessed, dict(chosen.columns))
    return found, chosen


def _in_plain_form(row: dict[str, Any]) -> dict[str, Any]:
    """For guessing what the rows are: one that will be left out tells that too."""
    try:
        return plain_row(row)
    except RowRefused:
        return row


def import_pairs(
    path: str | Path,
    out: str | Path,
    options: ImportOptions | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
    rejects: str | Path | None = None,
) -> ImportReport:
    """Write the pairs of a file by another tool as JSONL to `out` (`-`: standard output), whole or not at all.

    `rejects` is a file for the rows left out, each with its line and reason. Raises InputError when the source
    cannot be read, when `out` is there already (unless `force`), and when no row is left; EnvironmentFault.
    """
    options = options or ImportOptions()
    with open_source(path) as source:
        inspection, chosen = _inspect(source, options)
        report = ImportReport(inspection, left_out=LeftOut(place=_PLACES.get(inspection.container, "row")))
        refused = nullcontext(None) if rejects is None else open_output(rejects, force)
        with refused as bin_, open_output(out, force) as file:
            work = _Import(source, inspection, chosen, options, report, bin_)
            for row in work.rows(progress):
                file.write(_line(row))
            if not report.written:
                raise _nothing_left(report)
    return report


def iter_pairs(path: str | Path, options: ImportOptions | None, report: ImportReport) -> Iterator[PreferencePair]:
    """Yield the pairs of a file, for a caller that keeps them elsewhere; `report` fills on the way."""
    options = options or ImportOptions()
    with open_source(path) as source:
        inspection, chosen = _inspect(source, options)
        report.inspection = inspection
        yield from _Import(source, inspection, chosen, options, report, None).pairs(None)


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"


def _nothing_left(report: ImportReport) -> InputError:
    name, left = report.inspection.name, report.left_out
    problem = Problem(name, f"0 pairs are left of {report.rows:,} rows, as {report.inspection.title}")
    one_answer = any("no preference" in reason for reason in left.reasons)
    fix = "--prompts imports such rows as prompts, to generate the other answer" if one_answer else ""
    return InputError(problem, *(Problem("", sentence, fix) for sentence in left.sentences()[:10]))


@dataclass(slots=True)
class _Reader:
    """The rows of a container as objects, texts of a table made values."""

    source: Source
    container: Container
    options: ImportOptions
    apostrophes: int = 0

    def rows(self, broken: Callable[[int, str], None], progress: Progress | None = None) -> Iterator[Row]:
        if self.container == "jsonl":
            return self._json_lines(broken, progress)
        if self.container in ("json", "objects"):
            return read_json_list(self.source, broken, progress)
        if self.container == "csv":
            table = read_csv(self.source, broken, progress, self.options.encoding)
            return self._unflattened(self._original(table), broken)
        return self._unflattened(read_parquet(self.source, broken, progress), broken)

    def _json_lines(self, broken: Callable[[int, str], None], progress: Progress | None) -> Iterator[Row]:
        try:
            yield from read_rows(self.source.path, _Collector(broken), progress)
        except InputError as error:
            path = str(self.source.path)
            renamed = [
                replace(problem, where=problem.where.replace(path, self.source.name)) for problem in error.problems
            ]
            raise InputError(*renamed) from None

    def _original(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            if not self.options.keep_apostrophes:
                cells = {key: original_cell(cell) for key, cell in row.value.items()}
                self.apostrophes += sum(cells[key] != cell for key, cell in row.value.items())
                row = Row(row.line, cells)
            yield row

    def _unflattened(self, rows: Iterator[Row], broken: Callable[[int, str], None]) -> Iterator[Row]:
        for row in rows:
            try:
                yield Row(row.line, row_of(row.value))
            except ValueError as error:
                broken(row.line, str(error))


class _Collector(ProblemLog):
    """Hands on each broken line in place of keeping the first ones."""

    def __init__(self, broken: Callable[[int, str], None]) -> None:
        super().__init__()
        self._broken = broken

    def add(self, where: str, message: str, fix: str = "") -> None:
        """Hand on."""
        self._broken(int(where.rpartition(":")[2]), message)


class _Import:
    """One pass over a source."""

    def __init__(
        self,
        source: Source,
        inspection: Inspection,
        chosen: Chosen,
        options: ImportOptions,
        report: ImportReport,
        rejects: BinaryIO | None,
    ) -> None:
        self._source = source
        self._inspection = inspection
        self._convert = chosen.family.convert
        self._options = options
        self._report = report
        self._rejects = rejects
        self._time = now()

    def rows(self, progress: Progress | None) -> Iterator[dict[str, Any]]:
        if self._options.prompts:
            yield from self._prompts(progress)
            return
        for pair in self.pairs(progress):
            yield pair_to_json(pair)

    def pairs(self, progress: Progress | None) -> Iterator[PreferencePair]:
        for row in self._read(progress):
            pair = self._pair(row)
            if pair is not None:
                self._report.written += 1
                yield pair

    def _read(self, progress: Progress | None) -> Iterator[Row]:
        reader = _Reader(self._source, self._inspection.container, self._options)

        def broken(line: int, reason: str) -> None:
            self._report.rows += 1
            self._leave_out(line, reason, None)

        for row in reader.rows(broken, progress):
            self._report.rows += 1
            self._report.apostrophes = reader.apostrophes
            yield row

    def _leave_out(self, line: int, reason: str, value: dict[str, Any] | None) -> None:
        self._report.left_out.add(line, reason)
        if self._rejects is not None:
            kept = {} if value is None else {"row": value}
            self._rejects.write(_line({"line": line, "reason": reason, **kept}))

    def _pair(self, row: Row) -> PreferencePair | None:
        original = dict(row.value)
        try:
            converted = with_line_ends(self._convert(plain_row(row.value)))
        except RowRefused as refusal:
            self._leave_out(row.line, str(refusal), original)
            return None
        log = ProblemLog()
        pair = parse_pair(Row(row.line, converted), self._source.name, log)
        if isinstance(pair, PreferencePair):
            return self._traced(pair)
        if isinstance(pair, Skipped):
            reason = pair.reason
        else:
            reason = "; ".join(". ".join(filter(None, (p.message, p.fix))) for p in log.first) or "is no pair"
        self._leave_out(row.line, reason, original)
        return None

    def _traced(self, pair: PreferencePair) -> PreferencePair:
        if self._options.provenance:
            note = self._note(pair.line)
            return replace(pair, extra=with_provenance(pair.extra, "imported", **note, time=self._time))
        return pair

    def _note(self, line: int) -> dict[str, Any]:
        return {"file": Path(self._source.name).name, "line": line, "format": self._inspection.format}

    def _prompts(self, progress: Progress | None) -> Iterator[dict[str, Any]]:
        for row in self._read(progress):
            try:
                found = with_line_ends(prompt_of(plain_row(row.value)))
            except RowRefused as reason:
                self._leave_out(row.line, str(reason), row.value)
                continue
            if self._options.provenance:
                found = with_provenance(found, "imported", **self._note(row.line), time=self._time)
            self._report.written += 1
            yield found


def format_names() -> list[str]:
    """The names that `ImportOptions.format` may have."""
    return [*(family.name for family in FAMILIES), "columns"]
