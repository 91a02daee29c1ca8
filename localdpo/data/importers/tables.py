"""Rows out of CSV, a JSON list and Parquet: one object at a time, with its line, in bounded memory.

JSON Lines is `localdpo.data.jsonl`'s. A row that cannot be read is handed to `broken`; a file that cannot be read
at all raises. This module knows nothing about what rows mean.
"""

from __future__ import annotations

import csv
import importlib
import json
import math
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO

from localdpo.data.importers.source import Broken, Source, bad_encoding
from localdpo.data.jsonl import MAX_LINE_BYTES, Progress, Row, parse_object
from localdpo.errors import EnvironmentFault, InputError, Problem

__all__ = ["read_csv", "read_json_list", "read_parquet", "require_pyarrow"]

DELIMITERS = ",;\t|"
_PROGRESS_ROWS = 1000
_FIRST_READ = 1 << 16


def read_csv(source: Source, broken: Broken, progress: Progress | None, encoding: str | None = None) -> Iterator[Row]:
    """Yield the rows of a CSV file as texts by column; its first row names them.

    Comma, semicolon, tab and bar are told apart by the header. A row's line is that of its first character. Raises
    InputError for a wrong encoding and for a header that names no columns or one twice.
    """
    chosen = encoding or _csv_encoding(source)
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    try:
        with source.path.open(encoding=chosen, newline="") as file:
            yield from _csv_rows(file, source, broken, progress)
    except UnicodeError:
        raise bad_encoding(source, chosen) from None
    except LookupError:
        raise InputError(Problem("--encoding", f"{chosen!r} is not an encoding", "Such as cp1252 or utf-16")) from None


def _csv_encoding(source: Source) -> str:
    with source.path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            message = "is UTF-16, not UTF-8 (byte offset 0)"
            raise InputError(Problem(f"{source.name}:1", message, "Save it as UTF-8, or give --encoding utf-16"))
    return "utf-8-sig"


def _csv_rows(file: TextIO, source: Source, broken: Broken, progress: Progress | None) -> Iterator[Row]:
    size = source.path.stat().st_size
    lines = _Lines(file, broken)
    header = lines.peek()
    delimiter = max(DELIMITERS, key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    columns = _columns(reader, source)
    number = 0
    while True:
        line = lines.number + 1
        number += 1
        if progress is not None and number % _PROGRESS_ROWS == 0:
            progress(min(size, lines.read), size)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            broken(line, f"is not CSV: {error}")
            continue
        if cells is None:
            break
        if not any(cells):
            continue
        if len(cells) != len(columns):
            broken(line, f"has {len(cells)} cells, and the header names {len(columns)} columns")
            continue
        yield Row(line, dict(zip(columns, cells, strict=True)))
    if progress is not None:
        progress(size, size)


def _columns(reader: Iterator[list[str]], source: Source) -> list[str]:
    try:
        names = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise InputError(Problem(f"{source.name}:1", f"is not CSV: {error}")) from None
    names = [name or f"column {number}" for number, name in enumerate(names, 1)]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise InputError(Problem(f"{source.name}:1", f"names the column {repeated[0][:60]!r} twice"))
    return names


class _Lines:
    """The lines of a text file, none longer than a row may be; `number` counts those handed out."""

    def __init__(self, file: TextIO, broken: Broken) -> None:
        self._file = file
        self._broken = broken
        self._peeked: str | None = None
        self.number = 0
        self.read = 0

    def peek(self) -> str:
        """The next line, which stays the next one."""
        if self._peeked is None:
            self._peeked = self._next()
        return self._peeked

    def _next(self) -> str:
        line = self._file.readline(MAX_LINE_BYTES + 1)
        self.read += len(line)
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(("\n", "\r")):
                line = self._file.readline(_FIRST_READ)
                self.read += len(line)
            self._broken(self.number + 1, f"is longer than {MAX_LINE_BYTES:,} characters")
            return "\n"
        return line

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line, self._peeked = self.peek(), None
        if not line:
            raise StopIteration
        self.number += 1
        return line


def read_json_list(source: Source, broken: Broken, progress: Progress | None) -> Iterator[Row]:
    """Yield the objects of a file that is one JSON list, or of objects one after the other over any lines.

    No more than one of them and a piece is held. The line of a row is its number.
    """
    try:
        with source.path.open(encoding="utf-8-sig", newline="") as file:
            yield from _ListReader(file, source).rows(broken, progress)
    except UnicodeError:
        raise bad_encoding(source, "utf-8") from None


def _nothing(_digits: str) -> None:
    return None


# Only finds where an element ends: numbers are not made, as giant ones are slow; `parse_object` judges the element.
_SCANNER = json.JSONDecoder(parse_int=_nothing, parse_float=_nothing, parse_constant=_nothing)


class _ListReader:
    def __init__(self, file: TextIO, source: Source) -> None:
        self._file = file
        self._source = source
        self._size = source.path.stat().st_size
        self._text = ""
        self._at = 0
        self._line = 1
        self._read = 0

    def rows(self, broken: Broken, progress: Progress | None) -> Iterator[Row]:
        listed = self._skip_space() == "["
        if listed:
            self._expect("[")
        number = 0
        while (mark := self._skip_space()) != "]" and (mark or listed):
            if number and listed:
                self._expect(",")
                self._skip_space()
            number += 1
            element = self._element()
            try:
                yield Row(number, parse_object(element))
            except ValueError as error:
                broken(number, str(error))
            if progress is not None and number % _PROGRESS_ROWS == 0:
                progress(min(self._size, self._read), self._size)
            if not mark:
                break
        if listed:
            self._expect("]")
            if self._skip_space():
                raise self._fault("goes on after the end of its list")
        if progress is not None:
            progress(self._size, self._size)

    def _more(self, characters: int) -> bool:
        piece = self._file.read(characters)
        self._read += len(piece)
        self._text = self._text[self._at :] + piece
        self._at = 0
        return bool(piece)

    def _skip_space(self) -> str:
        """Pass over white space; the character after it, which stays, or nothing at the end of the file."""
        while True:
            rest = self._text[self._at :].lstrip(" \t\r\n\ufeff")
            passed = self._text[self._at : len(self._text) - len(rest)]
            self._line += passed.count("\n")
            self._at += len(passed)
            if rest:
                return rest[0]
            if not self._more(_FIRST_READ):
                return ""

    def _expect(self, mark: str) -> None:
        found = self._skip_space()
        if found != mark:
            raise self._fault(f"is not JSON: {mark!r} is missing" + ("" if found else " at the end of the file"))
        self._at += 1

    def _element(self) -> str:
        """The text of the next element."""
        wanted = _FIRST_READ
        while True:
            fault, at_end = "", False
            try:
                _, end = _SCANNER.raw_decode(self._text, self._at)
                at_end = end == len(self._text)  # a number cut in two is a number
            except json.JSONDecodeError as error:
                fault = f"is not JSON: {error.msg}"
            except RecursionError:
                raise self._fault("is nested too deep") from None
            if not fault and not at_end:
                break
            if len(self._text) - self._at > MAX_LINE_BYTES:
                raise self._fault(fault or f"is longer than {MAX_LINE_BYTES:,} characters")
            if not self._more(wanted):
                if fault:
                    raise self._fault(fault)
                break
            wanted *= 2
        element = self._text[self._at : end]
        self._line += element.count("\n")
        self._at = end
        return element

    def _fault(self, message: str) -> InputError:
        return InputError(Problem(f"{self._source.name}:{self._line}", message, "Nothing was imported"))


def require_pyarrow() -> Any:
    """The module pyarrow.parquet. Raises EnvironmentFault where it is not installed."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        fix = "Install it with: pip install 'localdpo[parquet]'"
        raise EnvironmentFault(Problem("Parquet", "pyarrow is not installed", fix)) from None


def read_parquet(source: Source, broken: Broken, progress: Progress | None) -> Iterator[Row]:
    """Yield the rows of a Parquet file as JSON values; the line of a row is its number. Raises InputError."""
    parquet = require_pyarrow()
    try:
        file = parquet.ParquetFile(source.path)
        total, number = file.metadata.num_rows, 0
        for batch in file.iter_batches(batch_size=_PROGRESS_ROWS):
            for value in batch.to_pylist():
                number += 1
                try:
                    yield Row(number, {key: _plain(inner) for key, inner in value.items()})
                except ValueError as error:
                    broken(number, str(error))
            if progress is not None:
                progress(number, total)
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's own errors are all of these
        reason = " ".join(str(error).split())[:200]
        raise InputError(Problem(source.name, f"cannot be read as Parquet ({reason})")) from None


def _plain(value: Any) -> Any:
    """A JSON value for one of Parquet's; not-a-number is null, as it is where most such files come from."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal | Path):
        return str(value)
    raise ValueError(f"holds a {type(value).__name__}, which JSON has no form for")
