"""Where the lines of a file start and end, and a copy of the file that nobody else changes.

A line ends at `\\n`; a `\\r` before it belongs to the line end. A byte order mark belongs to no line. Memory is
some 20 bytes a line, whatever its length. This module knows nothing about what lines hold.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from localdpo.data.jsonl import check_opening

__all__ = [
    "BOM",
    "CHUNK",
    "CRLF",
    "ENDS",
    "LF",
    "OPEN",
    "Ints",
    "Layout",
    "chunks_of",
    "copy_lines",
    "digest_of",
    "line_at",
    "line_hashes",
    "lines_of",
    "read_range",
]

BOM = b"\xef\xbb\xbf"
OPEN, LF, CRLF = 0, 1, 2
"""How a line ends: with the file, in `\\n`, in `\\r\\n`."""
ENDS = (b"", b"\n", b"\r\n")
CHUNK = 1 << 20
_WHITE = b" \t\r"

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Layout:
    """The lines of a file of `size` bytes with the blake2b `digest`.

    `starts` and `stops` are byte offsets of each line without its end; `ends` is OPEN, LF or CRLF; `blank` marks
    lines of white space.
    """

    starts: Ints
    stops: Ints
    ends: npt.NDArray[np.uint8]
    blank: npt.NDArray[np.bool_]
    size: int
    digest: str
    bom: bool

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def unfinished(self) -> bool:
        """Whether the file has a last line without an end."""
        return bool(len(self.ends)) and int(self.ends[-1]) == OPEN

    @property
    def line_end(self) -> int:
        """How a new line should end: as the file's first line does."""
        return CRLF if len(self.ends) and int(self.ends[0]) == CRLF else LF


def chunks_of(path: str | Path) -> Iterator[bytes]:
    """Yield a file piece by piece. Raises OSError."""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def copy_lines(chunks: Iterable[bytes], into: BinaryIO, name: str) -> Layout:
    """Write `chunks` to `into`, which can be read too, and return where their lines are.

    Raises `InputError` when they are UTF-16 or UTF-32, naming the file `name`.
    """

    def passed() -> Iterator[bytes]:
        for chunk in chunks:
            into.write(chunk)
            yield chunk
        into.flush()

    return _scan(passed(), into.fileno(), name)


def lines_of(file: BinaryIO, name: str) -> Layout:
    """Return where the lines of an open file are. Raises `InputError` for UTF-16 and UTF-32."""
    file.seek(0)
    return _scan(iter(lambda: file.read(CHUNK), b""), file.fileno(), name)


def digest_of(path: str | Path) -> str:
    """Return the digest that the layout of a file has. Raises OSError."""
    digest = _hasher()
    for chunk in chunks_of(path):
        digest.update(chunk)
    return digest.hexdigest()


def line_at(layout: Layout, file: BinaryIO, line: int) -> bytes:
    """Return a line of a file, without its end."""
    return b"".join(read_range(file.fileno(), int(layout.starts[line]), int(layout.stops[line])))


def line_hashes(layout: Layout, file: BinaryIO) -> Ints:
    """Return a hash of every line, good within this process."""
    hashes = np.empty(len(layout), np.int64)
    line = 0
    while line < len(layout):
        start = int(layout.starts[line])
        last = max(line + 1, int(np.searchsorted(layout.stops, start + CHUNK, "right")))
        data = b"".join(read_range(file.fileno(), start, int(layout.stops[last - 1])))
        starts, stops = layout.starts[line:last] - start, layout.stops[line:last] - start
        hashes[line:last] = [hash(data[a:b]) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
        line = last
    return hashes


def read_range(fd: int, start: int, stop: int) -> Iterator[bytes]:
    """Yield bytes `start` to `stop` of an open file in pieces. Raises OSError when they are not there."""
    while start < stop:
        piece = os.pread(fd, min(CHUNK, stop - start), start)
        if not piece:
            raise OSError(errno.EIO, "The file is shorter than it was")
        start += len(piece)
        yield piece


def _hasher() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=20)


def _scan(chunks: Iterable[bytes], fd: int, name: str) -> Layout:
    digest = _hasher()
    newlines: list[Ints] = []
    before: list[npt.NDArray[np.uint8]] = []  # the byte before each newline
    firsts: list[npt.NDArray[np.uint8]] = []  # the first byte of each line
    size, last, opening = 0, 0, b""
    for chunk in filter(None, chunks):
        if size < 4:
            opening = (opening + chunk)[:4]
            check_opening(opening, name)
        digest.update(chunk)
        data = np.frombuffer(chunk, np.uint8)
        found = np.flatnonzero(data == 10)
        newlines.append(found + size)
        after = found[:-1] + 1 if len(found) and found[-1] == len(data) - 1 else found + 1
        before.append(np.where(found > 0, data[found - 1], np.uint8(last)))
        opens = not size or last == 10
        firsts.append(np.concatenate((data[:1], data[after])) if opens else data[after])
        size, last = size + len(chunk), int(data[-1])
    return _layout(opening, size, digest.hexdigest(), newlines, before, firsts, fd)


def _layout(
    opening: bytes,
    size: int,
    digest: str,
    newlines: list[Ints],
    before: list[npt.NDArray[np.uint8]],
    firsts: list[npt.NDArray[np.uint8]],
    fd: int,
) -> Layout:
    bom = opening.startswith(BOM)
    head = len(BOM) if bom else 0
    breaks = np.concatenate([*newlines, np.empty(0, np.int64)])
    carriage = np.concatenate([*before, np.empty(0, np.uint8)]) == 13
    unfinished = size > (int(breaks[-1]) + 1 if len(breaks) else head)
    starts = np.concatenate(([head], breaks + 1))[: len(breaks) + unfinished]
    carriage &= breaks > starts[: len(breaks)]
    stops = np.concatenate((breaks - carriage, [size]))[: len(starts)]
    ends = np.concatenate((np.where(carriage, CRLF, LF), [OPEN]))[: len(starts)].astype(np.uint8)
    first = np.concatenate([*firsts, np.empty(0, np.uint8)])[: len(starts)]
    if bom and len(starts):
        first = first.copy()
        first[0] = 32  # look at it: its first byte is the mark's
    blank = _blank(starts, stops, first, fd)
    return Layout(starts.astype(np.int64), stops.astype(np.int64), ends, blank, size, digest, bom)


def _blank(starts: Ints, stops: Ints, first: npt.NDArray[np.uint8], fd: int) -> npt.NDArray[np.bool_]:
    """Return which lines are white space. Few lines begin with a space, so few are read."""
    blank: npt.NDArray[np.bool_] = starts == stops
    white = np.isin(first, np.frombuffer(_WHITE, np.uint8)) & ~blank
    for line in np.flatnonzero(white):
        start, stop = int(starts[line]), int(stops[line])
        blank[line] = all(not piece.strip(_WHITE) for piece in read_range(fd, start, stop))
    return blank
