"""Read JSON Lines strictly, one row at a time, and say exactly where a file is broken.

A row ends at `\\n` and nowhere else (a U+2028 inside a string ends nothing). What JSON libraries let
through and later code trips over is refused here: duplicate keys, NaN, infinities, giant numbers, lone
surrogates, deep nesting. Memory is bounded by the longest allowed line. This module knows nothing about
preference pairs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from localdpo.errors import InputError, Problem, first_problems

__all__ = ["MAX_LINE_BYTES", "ProblemLog", "Progress", "Row", "check_opening", "parse_object", "read_rows"]

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the size of the file."""

MAX_LINE_BYTES = 10_000_000
MAX_DEPTH = 64
_MAX_DIGITS = 300  # more than any float can use
_SHOWN = 10
_PROGRESS_ROWS = 1000
_UTF8_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(slots=True)
class ProblemLog:
    """The first problems of a file, and how many there are: a million bad rows must not fill the memory."""

    first: list[Problem] = field(default_factory=list)
    total: int = 0

    def add(self, where: str, message: str, fix: str = "") -> None:
        """Record a problem."""
        self.total += 1
        if len(self.first) < _SHOWN:
            self.first.append(Problem(where, message, fix))

    def raise_if_any(self) -> None:
        """Raise `InputError` with the first problems and the count of the others."""
        if self.total:
            raise InputError(*first_problems(self.first, _SHOWN, self.total))


@dataclass(frozen=True, slots=True)
class Row:
    """One JSON object of a file and its 1-based line."""

    line: int
    value: dict[str, Any]


class _RowError(ValueError):
    pass


def read_rows(path: str | Path, log: ProblemLog, progress: Progress | None = None) -> Iterator[Row]:
    """Yield the objects of a JSONL file; blank lines are passed over, broken ones go to `log`.

    A UTF-8 byte order mark, CRLF and a missing final newline are fine. Raises `InputError` at once when the
    file cannot be read or is not UTF-8 text at all.
    """
    name = str(path)
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise InputError(Problem(name, "is not a file"))
        with open(path, "rb") as file:
            yield from _rows(file, name, Path(path).stat().st_size, log, progress)
    except OSError as error:
        fix = "Check the path: those in a recipe are relative to its folder"
        raise InputError(Problem(name, f"cannot be read ({error.strerror})", fix)) from None


def _rows(file: BinaryIO, name: str, size: int, log: ProblemLog, progress: Progress | None) -> Iterator[Row]:
    offset = line = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        line += 1
        start, offset = offset, offset + len(raw)
        where = f"{name}:{line}"
        if line == 1:
            raw, start = _opening(raw, name)
        if len(raw) > MAX_LINE_BYTES:
            offset += _skip_line(file, raw)
            log.add(where, f"is longer than {MAX_LINE_BYTES:,} bytes", "Is this a JSONL file, one row a line?")
            continue
        try:
            value = _parse(raw, start)
        except _RowError as error:
            log.add(where, str(error))
            continue
        if progress is not None and line % _PROGRESS_ROWS == 0:
            progress(offset, size)
        if value is not None:
            yield Row(line, value)
    if progress is not None:
        progress(offset, size)


def parse_object(text: str) -> dict[str, Any]:
    """Return the JSON object that is all of `text`, as strictly as a line is read. Raises `ValueError`, saying why."""
    value = _parse(text.encode("utf-8", "surrogatepass"), 0)
    if value is None:
        raise _RowError("is blank")
    return value


def check_opening(raw: bytes, name: str) -> None:
    """Raise `InputError` when a file that begins with `raw` is UTF-16 or UTF-32."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in raw[:4]:
        raise InputError(
            Problem(f"{name}:1", "is UTF-16 or UTF-32, not UTF-8 (byte offset 0)", "Save the file as UTF-8")
        )


def _opening(raw: bytes, name: str) -> tuple[bytes, int]:
    """Return the first line without its byte order mark and where it starts. Raises on UTF-16 and UTF-32."""
    check_opening(raw, name)
    return (raw[len(_UTF8_BOM) :], len(_UTF8_BOM)) if raw.startswith(_UTF8_BOM) else (raw, 0)


def _skip_line(file: BinaryIO, raw: bytes) -> int:
    skipped = 0
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(1 << 16)
        skipped += len(raw)
    return skipped


def _parse(raw: bytes, start: int) -> dict[str, Any] | None:
    """Return the object on a line, None for a blank one. `start` is the line's byte offset in the file."""
    try:
        text = raw.decode("utf-8").strip(" \t\r\n")
    except UnicodeDecodeError as error:
        bad = raw[error.start]
        message = f"is not UTF-8: byte 0x{bad:02x} at byte offset {start + error.start:,} of the file"
        raise _RowError(f"{message}. Save the file as UTF-8") from None
    if not text:
        return None
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if not raw.endswith(b"\n") and _cut_off(error, text):
            raise _RowError("ends in the middle of a row. Complete it or delete it") from None
        hint = ". One object a line is expected, no list around them" if text == "[" else ""
        raise _RowError(f"is not JSON: {error.msg} at character {error.colno}{hint}") from None
    except RecursionError:
        raise _RowError(f"is nested deeper than {MAX_DEPTH}") from None
    if not isinstance(value, dict):
        raise _RowError(f"is a JSON {_kind(value)}, not an object with keys")
    _check_inside(text, value)
    return value


def _cut_off(error: json.JSONDecodeError, text: str) -> bool:
    # An unfinished string is reported where it starts; an unfinished `true` or \\u00e9 a few characters before.
    return error.msg.startswith("Unterminated") or error.pos > len(text) - 6


def _kind(value: Any) -> str:
    names = {list: "list", str: "string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "number")


def _check_inside(text: str, value: Any) -> None:
    """Refuse deep nesting and lone surrogates. Most rows can have neither, and are not walked."""
    deep = text.count("[") + text.count("{") > MAX_DEPTH
    if not deep and "\\ud" not in text and "\\uD" not in text:
        return
    waiting = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise _RowError(f"is nested deeper than {MAX_DEPTH}")
        if isinstance(item, str) and (found := _SURROGATE.search(item)):
            raise _RowError(f"has half of a surrogate pair, \\u{ord(found.group()):04x}, which is not a character")
        if isinstance(item, dict):
            waiting += [(key, depth) for key in item] + [(inner, depth + 1) for inner in item.values()]
        elif isinstance(item, list):
            waiting += [(inner, depth + 1) for inner in item]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise _RowError(f"has the key {repeated[:60]!r} twice. Keep one of the two")
    return result


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _RowError(f"has a number of {len(digits):,} digits")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise _RowError(f"has the number {digits[:40]}, which is too large")
    return number


def _constant(name: str) -> float:
    raise _RowError(f"has {name}, which is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer, parse_float=_float, parse_constant=_constant)
