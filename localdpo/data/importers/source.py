"""Find out what kind of file a source is by its first bytes, and make standard input and gzip a plain file.

This module knows bytes; it knows nothing about rows.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.files import environment_faults, require_space

__all__ = ["Broken", "Container", "Source", "bad_encoding", "open_source", "require_json_lines", "sniff"]

Container = Literal["jsonl", "json", "objects", "csv", "parquet"]
Broken = Callable[[int, str], None]
"""Called with the line and the reason for each row that cannot be read."""

STDIN = "-"
_GZIP, _PARQUET, _ZIP = b"\x1f\x8b", b"PAR1", b"PK\x03\x04"
_BOMS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}
_MAX_UNPACKED = 64 << 30
_PIECE = 1 << 20
_START = 1 << 16  # bytes that tell what a file is


@dataclass(frozen=True, slots=True)
class Source:
    """A file to read at `path`, and the `name` to call it by."""

    path: Path
    name: str


@contextmanager
def open_source(given: str | Path) -> Iterator[Source]:
    """Yield a plain file: standard input (`-`) and gzip are copied into a temporary one first.

    Raises InputError when there is nothing to read.
    """
    if str(given) == STDIN:
        with _copied(sys.stdin.buffer, "standard input") as source:
            yield source
        return
    path = Path(given)
    try:
        if path.exists() and not path.is_file():
            raise InputError(Problem(str(path), "is not a file"))
        with path.open("rb") as file:
            packed = file.read(2) == _GZIP
    except OSError as error:
        raise InputError(Problem(str(path), f"cannot be read ({error.strerror})", "Check the path")) from None
    if not packed:
        yield Source(path, str(path))
        return
    with gzip.open(path, "rb") as inner, _copied(inner, str(path)) as source:
        yield source


@contextmanager
def _copied(file: BinaryIO | gzip.GzipFile, name: str) -> Iterator[Source]:
    with environment_faults(Path(tempfile.gettempdir())):
        handle, path = tempfile.mkstemp(prefix="localdpo-import-")
    try:
        with open(handle, "wb") as out:
            _pump(file, out, name)
        yield Source(Path(path), name)
    finally:
        os.unlink(path)


def _pump(file: BinaryIO | gzip.GzipFile, out: BinaryIO, name: str) -> None:
    size = 0
    try:
        while piece := file.read(_PIECE):
            size += len(piece)
            if size > _MAX_UNPACKED:
                raise InputError(Problem(name, f"is longer than {_MAX_UNPACKED >> 30} GiB unpacked", "Split the file"))
            if size % (64 * _PIECE) < _PIECE:
                require_space(tempfile.gettempdir(), _PIECE)
            out.write(piece)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise InputError(Problem(name, "is a damaged gzip file", "Fetch it again")) from None
    except OSError as error:
        raise EnvironmentFault(Problem(name, f"cannot be copied ({error.strerror or error})")) from None


def sniff(source: Source) -> Container:
    """The container by its first bytes: JSON Lines, one JSON list, Parquet, else CSV. Raises InputError."""
    with environment_faults(source.path), source.path.open("rb") as file:
        start = file.read(_START)
    if start.startswith(_PARQUET):
        return "parquet"
    if start.startswith(_ZIP):
        raise InputError(Problem(source.name, "is a zip file", "Unpack it; spreadsheets: save as CSV"))
    encoding = next((name for bom, name in _BOMS.items() if start.startswith(bom)), "utf-8")
    text = start.decode(encoding, errors="replace").lstrip("\ufeff \t\r\n")
    if not text:
        raise InputError(Problem(source.name, "0 rows: the file is empty"))
    return "json" if text[0] == "[" else "csv" if text[0] != "{" else "objects" if _spans_lines(text) else "jsonl"


def _spans_lines(text: str) -> bool:
    """Whether the first object of a text goes over several lines, as in JSON that was laid out to be read."""
    line, _, rest = text.partition("\n")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return line.strip() == "{" and bool(rest.strip())  # it may be longer than what is looked at
    return end > len(line)


_KINDS = {"json": "a JSON list", "objects": "JSON over several lines", "csv": "a table (CSV)", "parquet": "Parquet"}
_KNOWN_COLUMNS = frozenset(
    {"prompt", "chosen", "rejected", "messages", "conversations", "instruction", "input", "output", "question",
     "answer", "response", "accept", "system", "completion", "label"}
)  # fmt: skip


def require_json_lines(path: str | Path) -> None:
    """Raise InputError for a file of another kind than training reads, with the command that makes it one.

    A file that cannot be read, or is of no kind that can be told, is left to whoever reads it.
    """
    place = Path(path)
    try:
        with place.open("rb") as file:
            start = file.read(_START)
        found = "gzip" if start.startswith(_GZIP) else "" if start.startswith(_ZIP) or not start.strip() else None
        if found is None:
            kind = sniff(Source(place, str(place)))
            found = "" if kind == "csv" and not _is_header(start) else _KINDS.get(kind, "")
    except (OSError, InputError, EnvironmentFault):
        return
    if found:
        out = place.with_name(f"{place.name.partition('.')[0]}-pairs.jsonl")
        command = shlex.join(["localdpo", "pairs", "import", str(place), "--out", str(out)])
        raise InputError(Problem(str(place), f"is {found}, and JSON Lines is read here", f"`{command}` makes it so"))


def _is_header(start: bytes) -> bool:
    """Whether a text begins with the names of columns that pairs have."""
    line = start.decode("utf-8", errors="replace").lstrip("\ufeff").partition("\n")[0].strip()
    names = {name.strip().strip('"').lower() for name in re.split(r"[,;\t|]", line)}
    return len(names & _KNOWN_COLUMNS) > 1


def bad_encoding(source: Source, encoding: str) -> InputError:
    """The error for a file that is not in `encoding`, with the place of the first wrong byte."""
    fix = "Save the file as UTF-8, or name its encoding with --encoding, such as cp1252 or utf-16"
    offset = 0
    with environment_faults(source.path), source.path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_PIECE), b""), 1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError as error:
                where = f"{source.name}:{number}"
                at = f"byte 0x{line[error.start]:02x} at byte offset {offset + error.start:,} of the file"
                return InputError(Problem(where, f"is not {encoding}: {at}", fix))
            offset += len(line)
    return InputError(Problem(source.name, f"is not {encoding}", fix))
