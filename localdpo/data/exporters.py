"""Write pairs for other tools: JSONL in TRL's two forms, CSV that a spreadsheet runs nothing of, Parquet.

Rows pass one at a time. What a form cannot hold is left out, counted and named. This module knows nothing about
terminals; the command line and the UI call the same function.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from localdpo.data.flat import COLUMNS, flat_row, harmless_cell
from localdpo.data.importers.tables import require_pyarrow
from localdpo.data.jsonl import ProblemLog, Progress, read_rows
from localdpo.data.leftout import LeftOut
from localdpo.data.output import STDOUT, open_output
from localdpo.data.pairs import PreferencePair, Skipped, pair_to_json, parse_pair
from localdpo.data.provenance import PROVENANCE
from localdpo.errors import InputError, Problem

__all__ = ["ExportOptions", "ExportReport", "Form", "Target", "export_pairs", "target_of"]

Target = Literal["jsonl", "csv", "parquet"]
Form = Literal["auto", "standard", "conversational"]

_BATCH = 1000
_SUFFIXES: dict[str, Target] = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_NOT_STANDARD = "has a system message, tools or earlier turns, which the standard form cannot hold"


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """`form` is TRL's standard (texts) or conversational (messages) one; auto: standard where that holds every pair.

    `bare` leaves out all but prompt, answers and tools. `provenance` False leaves out where pairs come from. `bom`
    begins a CSV file with a byte order mark, by which Excel knows UTF-8.
    """

    target: Target = "jsonl"
    form: Form = "auto"
    bare: bool = False
    provenance: bool = True
    bom: bool = False

    def __post_init__(self) -> None:
        """Raise InputError for a form that there is not."""
        if self.form not in get_args(Form):
            raise InputError(Problem("--form", f"{self.form!r} is no form", f"One of {', '.join(get_args(Form))}"))


@dataclass(slots=True)
class ExportReport:
    """What came of an export: rows read, pairs written in which form, and the others with their reasons."""

    target: Target = "jsonl"
    form: Form = "standard"
    rows: int = 0
    written: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)

    def sentences(self) -> list[str]:
        """The report in words."""
        form = "" if self.target == "csv" else f", {self.form} form"
        what = f"{self.written:,} of {self.rows:,} rows exported as {self.target.upper()}{form}"
        lines = [what if not self.left_out.total else f"{what}, {self.left_out.total:,} left out:"]
        return lines + [f"  {sentence}" for sentence in self.left_out.sentences()]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, for programs."""
        return {
            "to": self.target, "form": self.form, "rows": self.rows, "written": self.written,
            "left_out": self.left_out.to_json(),
        }  # fmt: skip


def target_of(out: str | Path, asked: str | None = None) -> Target:
    """The kind of file to write: as asked for, else by the name of the file. Raises InputError."""
    if asked is not None:
        if asked not in get_args(Target):
            raise InputError(Problem("--to", f"{asked!r} is no format", f"One of {', '.join(get_args(Target))}"))
        return asked  # type: ignore[return-value]
    if str(out) == STDOUT:
        return "jsonl"
    found = _SUFFIXES.get(Path(out).suffix.lower())
    if found is None:
        raise InputError(Problem(str(out), "its name does not say which format", "Add --to jsonl, csv or parquet"))
    return found


def export_pairs(
    path: str | Path,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the pairs of a JSONL file to `out` (`-`: standard output), whole or not at all.

    Raises InputError when the file cannot be read, when `out` is there already (unless `force`), and when no pair is
    left; EnvironmentFault for the disk, and for Parquet without pyarrow.
    """
    options = options or ExportOptions()
    if options.target == "parquet":
        require_pyarrow()
    form = options.form
    if form == "auto":
        pairs = _pairs(path, ExportReport(), None)
        form = "standard" if all(_is_standard(pair) for pair in pairs) else "conversational"
    report = ExportReport(options.target, form)
    with open_output(out, force) as file:
        _WRITERS[options.target](_kept(_pairs(path, report, progress), report, options), file, report, options)
        if not report.written:
            reasons = [Problem("", sentence) for sentence in report.left_out.sentences()[:10]]
            raise InputError(Problem(str(path), f"0 pairs to export of {report.rows:,} rows"), *reasons)
    return report


def _pairs(path: str | Path, report: ExportReport, progress: Progress | None) -> Iterator[PreferencePair]:
    broken = ProblemLog()
    for row in read_rows(path, broken, progress):
        report.rows += 1
        log = ProblemLog()
        line = row.line
        found = parse_pair(row, str(path), log)
        if isinstance(found, PreferencePair):
            yield found
        elif isinstance(found, Skipped):
            report.left_out.add(line, found.reason)
        else:
            report.left_out.add(line, "; ".join(problem.message for problem in log.first))
    report.rows += broken.total
    for problem in broken.first:
        report.left_out.add(int(problem.where.rpartition(":")[2]), problem.message)
    if broken.total > len(broken.first):
        report.left_out.add(0, "cannot be read", broken.total - len(broken.first))


def _kept(pairs: Iterator[PreferencePair], report: ExportReport, options: ExportOptions) -> Iterator[PreferencePair]:
    for pair in pairs:
        if report.form == "standard" and options.target != "csv" and not _is_standard(pair):
            report.left_out.add(pair.line, _NOT_STANDARD)
            continue
        report.written += 1
        yield _stripped(pair, options)


def _stripped(pair: PreferencePair, options: ExportOptions) -> PreferencePair:
    if options.bare:
        tools, line, source = pair.tools, pair.line, pair.source
        return PreferencePair(pair.prompt, pair.chosen, pair.rejected, tools=tools, line=line, source=source)
    if not options.provenance and PROVENANCE in pair.extra:
        pair.extra.pop(PROVENANCE)
    return pair


def _is_standard(pair: PreferencePair) -> bool:
    turns = pair.prompt
    return len(turns) == 1 and set(turns[0]) == {"role", "content"} and turns[0]["role"] == "user" and not pair.tools


def _formed(pair: PreferencePair, form: Form) -> dict[str, Any]:
    """The pair's row in one of the two forms, its other keys after the three."""
    row = pair_to_json(pair)
    rest = {key: value for key, value in row.items() if key not in ("prompt", "chosen", "rejected", "system")}
    if form == "standard":
        return {"prompt": pair.prompt[0]["content"], "chosen": pair.chosen, "rejected": pair.rejected} | rest
    answers = {"chosen": pair.chosen, "rejected": pair.rejected}
    turns = {key: [{"role": "assistant", "content": text}] for key, text in answers.items()}
    return {"prompt": [dict(turn) for turn in pair.prompt]} | turns | rest


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


Pairs = Iterator[PreferencePair]


def _write_jsonl(pairs: Pairs, file: BinaryIO, report: ExportReport, options: ExportOptions) -> None:
    for pair in pairs:
        file.write(f"{_json(_formed(pair, report.form))}\n".encode())


def _write_csv(pairs: Pairs, file: BinaryIO, report: ExportReport, options: ExportOptions) -> None:
    columns = COLUMNS[:5] if options.bare else COLUMNS
    text = io.StringIO(newline="")
    # \r\n as RFC 4180 has it; a text's own line ends are kept, inside quotes.
    writer = csv.writer(text, lineterminator="\r\n")
    if options.bom:
        file.write(b"\xef\xbb\xbf")
    writer.writerow(columns)
    for pair in pairs:
        cells = flat_row(pair)
        writer.writerow([harmless_cell(cells[column]) for column in columns])
        file.write(text.getvalue().encode())
        text.seek(0)
        text.truncate()
    file.write(text.getvalue().encode())


def _write_parquet(pairs: Pairs, file: BinaryIO, report: ExportReport, options: ExportOptions) -> None:
    parquet = require_pyarrow()
    pyarrow: Any = importlib.import_module("pyarrow")
    text = pyarrow.string()
    turns = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)]))
    kind = text if report.form == "standard" else turns
    fields = [("prompt", kind), ("chosen", kind), ("rejected", kind)]
    if report.form == "conversational":
        fields.append(("messages", text))
    fields.append(("tools", text))
    if not options.bare:
        fields += [("id", text), ("tags", pyarrow.list_(text)), ("weight", pyarrow.float64())]
        fields += [("kind", text), ("extra", text)]
    schema = pyarrow.schema(fields)
    with parquet.ParquetWriter(file, schema) as writer:
        batch: list[dict[str, Any]] = []
        for pair in pairs:
            batch.append(_parquet_row(pair, report.form))
            if len(batch) == _BATCH:
                writer.write_table(pyarrow.Table.from_pylist(batch, schema))
                batch = []
        if batch or not report.written:
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))


def _parquet_row(pair: PreferencePair, form: Form) -> dict[str, Any]:
    """The row; a prompt whose messages hold more than role and content is whole in `messages`, as JSON."""
    row = _formed(pair, form)
    plain = all(set(turn) == {"role", "content"} for turn in pair.prompt)
    return {
        **{key: row[key] for key in ("prompt", "chosen", "rejected")},
        "messages": None if plain else _json(row["prompt"]),
        "tools": _json(list(pair.tools)) if pair.tools else None,
        "id": pair.id,
        "tags": list(pair.tags) or None,
        "weight": None if pair.weight == 1.0 else pair.weight,
        "kind": None if pair.kind == "preference" else pair.kind,
        "extra": _json(pair.extra) if pair.extra else None,
    }


_WRITERS: dict[Target, Callable[[Pairs, BinaryIO, ExportReport, ExportOptions], None]] = {
    "jsonl": _write_jsonl,
    "csv": _write_csv,
    "parquet": _write_parquet,
}
