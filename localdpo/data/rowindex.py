"""What a list of pairs shows and searches: lengths, tags, codes and folded texts of every row, kept as columns.

Some 70 bytes a row are in memory; the texts to search are in a temporary file, folded (case, width, accents composed)
and one row a line. A row's columns are filled when it is indexed and forgotten when it changes. This module knows
nothing about where rows come from: its caller hands them over and keeps other threads away.
"""

from __future__ import annotations

import os
import tempfile
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.typing as npt

from localdpo.data.check.findings import KINDS, Severity
from localdpo.data.check.repeats import digest_pair
from localdpo.data.check.rows import row_codes
from localdpo.data.pairs import PreferencePair
from localdpo.data.rows import Row
from localdpo.data.segments import Ints

__all__ = [
    "RELATIONS",
    "Entry",
    "RowIndex",
    "RowSummary",
    "State",
    "entry_of",
    "first_line",
    "own_codes",
    "state_of",
    "terms_of",
]

State = Literal["ok", "warned", "skipped", "broken"]
"""broken: no pair; skipped: a pair that teaches nothing; warned: one with a finding that is a warning."""

BLOCK = 4 << 20
_STATES: tuple[State, ...] = ("ok", "warned", "skipped", "broken")
RELATIONS = ("duplicate", "contradictory", "duplicate_id")
_ODD = np.uint64(0x9E3779B97F4A7C15)

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class RowSummary:
    """What the list shows of a row.

    Lengths are in characters, `tokens` is what was noted with `note_tokens`, None before. `codes` are names of
    `check.findings.KINDS`. `first_line` is the first line of the last user's turn, as it is in the file.
    """

    key: int
    state: State
    dirty: bool
    first_line: str
    prompt_chars: int
    chosen_chars: int
    rejected_chars: int
    tags: tuple[str, ...]
    codes: tuple[str, ...]
    weight: float = 1.0
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """What is indexed of one row. `digests` are those of prompt, chosen, rejected and id; 0 for none.

    `code` is why it is no pair or teaches nothing; what else can be said of it comes later (`RowIndex.check`).
    """

    code: str
    lengths: tuple[int, int, int]
    tags: tuple[str, ...]
    digests: tuple[int, int, int, int]
    text: bytes


def first_line(row: Row) -> str:
    """Return the line by which a row is known: the first one of the last user's turn that is not blank."""
    for turn in reversed(row.prompt):
        if turn["role"] == "user" and turn["content"].strip():
            return str(turn["content"]).strip().split("\n", 1)[0]
    return ""


def own_codes(row: Row) -> tuple[str, ...]:
    """Return the codes of a row by itself."""
    if row.problem is not None:
        return (row.code,)
    own = (row.code,) if row.code else ()
    return own + tuple(code for code in row_codes(_pair(row)) if code not in own)


def _pair(row: Row) -> PreferencePair:
    return PreferencePair(row.messages, row.chosen, row.rejected, row.id)


def state_of(row: Row, codes: Iterable[str]) -> State:
    """Return the state of a row with `codes`."""
    if row.problem is not None:
        return "broken"
    if row.skipped is not None:
        return "skipped"
    return "warned" if any(_warns(code) for code in codes) else "ok"


def _warns(code: str) -> bool:
    return code in KINDS and KINDS[code].severity != Severity.INFO


def entry_of(row: Row, raw: bytes) -> Entry:
    """Return what is indexed of a row; some tens of microseconds for an ordinary one."""
    prompt = "\n".join(turn["content"] for turn in row.messages)
    lengths = (sum(len(turn["content"]) for turn in row.prompt), len(row.chosen), len(row.rejected))
    digests = (0, 0, 0, 0)
    if row.problem is None and row.skipped is None:
        digest = digest_pair(_pair(row))
        digests = (*digest, 0 if row.id is None else hash(row.id) & 0xFFFFFFFFFFFFFFFF)
    text = "\x00".join((prompt, row.chosen, row.rejected))
    if row.problem is not None and not text.strip("\x00"):
        text = raw[:BLOCK].decode("utf-8", "replace")
    return Entry(row.code, lengths, row.tags, digests, fold(text) + b"\n")


def fold(text: str) -> bytes:
    """Return `text` as it is compared in a search, without line breaks."""
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text.casefold())
    return folded.replace("\r", " ").replace("\n", " ").encode("utf-8", "replace")


def terms_of(text: str) -> list[bytes]:
    """Return what a search looks for: every word, and what stands in double quotes as it is."""
    parts = text.split('"')
    quoted = [part for part in parts[1::2] if part.strip()]
    words = [word for part in parts[::2] for word in part.split()]
    return [fold(term) for term in (*quoted, *words)]


class RowIndex:
    """The columns, by key."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._size = 0
        self._file: IO[bytes] | None = None
        self._tags: dict[tuple[str, ...], int] = {(): 0}
        self._bits: dict[str, int] = {}
        self.done: Bools = np.zeros(0, np.bool_)
        self.checked: Bools = np.zeros(0, np.bool_)
        self._codes = np.zeros(0, np.uint64)
        self._related = np.zeros(0, np.uint8)
        self._tag = np.zeros(0, np.int32)
        self._lengths = np.zeros((0, 3), np.int32)
        self._digests = np.zeros((0, 4), np.uint64)
        self._start: Ints = np.zeros(0, np.int64)
        self._length: Ints = np.zeros(0, np.int64)
        self._stale_relations = True

    def grow(self, size: int) -> None:
        """Make room for keys up to `size`."""
        room = len(self.done)
        if size <= room:
            return
        more = max(size - room, room // 2, 1024)
        self.done = np.concatenate((self.done, np.zeros(more, np.bool_)))
        self.checked = np.concatenate((self.checked, np.zeros(more, np.bool_)))
        self._codes = np.concatenate((self._codes, np.zeros(more, np.uint64)))
        self._related = np.concatenate((self._related, np.zeros(more, np.uint8)))
        self._tag = np.concatenate((self._tag, np.zeros(more, np.int32)))
        self._lengths = np.concatenate((self._lengths, np.zeros((more, 3), np.int32)))
        self._digests = np.concatenate((self._digests, np.zeros((more, 4), np.uint64)))
        self._start = np.concatenate((self._start, np.zeros(more, np.int64)))
        self._length = np.concatenate((self._length, np.zeros(more, np.int64)))

    def forget(self, keys: Iterable[int]) -> None:
        """The contents of these rows changed."""
        for key in keys:
            if key < len(self.done):
                self.done[key] = self.checked[key] = False
        self._stale_relations = True

    def reordered(self) -> None:
        """Rows were added, deleted or brought back."""
        self._stale_relations = True

    def add(self, entries: Mapping[int, Entry]) -> None:
        """Take rows in. Raises OSError when the temporary file cannot be written."""
        self.grow(max(entries, default=-1) + 1)
        if self._file is None:
            self._file = _temporary(self._folder)
        texts = b"".join(entry.text for entry in entries.values())
        at = self._size
        view = memoryview(texts)
        while view:
            written = os.pwrite(self._file.fileno(), view, self._size)
            self._size += written
            view = view[written:]
        for key, entry in entries.items():
            self._start[key], self._length[key] = at, len(entry.text)
            at += len(entry.text)
            self._codes[key] = 1 << self._bit(entry.code) if entry.code else 0
            self._tag[key] = self._tags.setdefault(entry.tags, len(self._tags))
            self._lengths[key] = np.minimum(entry.lengths, np.iinfo(np.int32).max)
            self._digests[key] = entry.digests
            self.done[key] = True
        self._stale_relations = True

    def check(self, codes: Mapping[int, Sequence[str]]) -> None:
        """Take in what is wrong or remarkable with rows by themselves (`own_codes`)."""
        for key, names in codes.items():
            self._codes[key] = sum((1 << self._bit(code) for code in names), start=0)
            self.checked[key] = True

    def _bit(self, code: str) -> int:
        return self._bits.setdefault(code, len(self._bits))

    def tags_in_use(self, keys: Ints) -> dict[str, int]:
        """Return every tag of these rows with how many of them have it."""
        counts: dict[str, int] = {}
        numbers, times = np.unique(self._tag[keys[self.done[keys]]], return_counts=True)
        names = list(self._tags)
        for number, count in zip(numbers.tolist(), times.tolist(), strict=True):
            for tag in set(names[number]):
                counts[tag] = counts.get(tag, 0) + count
        return dict(sorted(counts.items()))

    def codes_in_use(self, keys: Ints) -> dict[str, int]:
        """Return every code of these rows with how many of them have it."""
        self._relate(keys)
        counts = {code: int(self._has(keys, code).sum()) for code in (*self._bits, *RELATIONS)}
        return {code: count for code, count in counts.items() if count}

    def related(self, key: int) -> tuple[str, ...]:
        """Return what a row was in relation to the others when rows were last compared: this never compares them."""
        if key >= len(self.done) or not self.done[key]:
            return ()
        return tuple(code for bit, code in enumerate(RELATIONS) if self._related[key] >> bit & 1)

    def comparison(self, keys: Ints) -> Callable[[], Callable[[], None]] | None:
        """Return what compares the rows, to be called without a lock, and gives what takes its result in, with one.

        None when nothing has changed since rows were last compared.
        """
        if not self._stale_relations:
            return None
        self._stale_relations = False
        keys = keys[self.done[keys]]
        keys = keys[self._digests[keys, 0] != 0]
        digests = self._digests[keys].T

        def compare() -> Callable[[], None]:
            bits = _relations(digests)

            def take() -> None:
                self._related[:] = 0
                self._related[keys] = bits

            return take

        return compare

    def _relate(self, keys: Ints) -> None:
        """Find rows that repeat or contradict others."""
        compare = self.comparison(keys)
        if compare is not None:
            compare()()

    def _has(self, keys: Ints, code: str) -> Bools:
        if code in RELATIONS:
            related: Bools = (self._related[keys] >> RELATIONS.index(code) & 1).astype(np.bool_)
            return related
        if code not in self._bits:
            return np.zeros(len(keys), np.bool_)
        found: Bools = (self._codes[keys] >> np.uint64(self._bits[code]) & np.uint64(1)).astype(np.bool_)
        return found

    def with_codes(self, keys: Ints, codes: Iterable[str]) -> Bools:
        """Return which rows have one of the codes."""
        self._relate(keys)
        found: Bools = np.zeros(len(keys), np.bool_)
        for code in codes:
            found |= self._has(keys, code)
        return found

    def in_state(self, keys: Ints, state: str) -> Bools:
        """Return which rows are in a state."""
        broken = self.with_codes(keys, ("schema", "encoding"))
        skipped = self.with_codes(keys, ("blank", "identical", "weight_zero")) & ~broken
        codes = [code for code in (*self._bits, *RELATIONS) if _warns(code)]
        warned = self.with_codes(keys, codes) & ~broken & ~skipped
        by_state = {"broken": broken, "skipped": skipped, "warned": warned, "ok": ~(broken | skipped | warned)}
        return by_state[state]

    def with_tag(self, keys: Ints, tag: str) -> Bools:
        """Return which rows have a tag."""
        numbers = [number for tags, number in self._tags.items() if tag in tags]
        found: Bools = np.isin(self._tag[keys], numbers)
        return found

    def with_text(self, keys: Ints, terms: Sequence[bytes], cancelled: Callable[[], bool]) -> Bools:
        """Return which rows contain every term. What is found so far when `cancelled` is of no use."""
        found: Bools = np.ones(len(keys), np.bool_)
        if self._file is None or not len(keys):
            return found if not terms else ~found
        order = np.argsort(self._start[keys], kind="stable")
        starts = self._start[keys][order]
        stops = starts + self._length[keys][order]
        for term in terms:
            hits: Bools = np.zeros(len(keys), np.bool_)
            hits[order] = self._hits(term, starts, stops, cancelled)
            found &= hits
        return found

    def _hits(self, term: bytes, starts: Ints, stops: Ints, cancelled: Callable[[], bool]) -> Bools:
        """Return which of the rows at `starts` (ascending) to `stops` contain a term."""
        hits: Bools = np.zeros(len(starts), np.bool_)
        first = 0
        fd = self._file.fileno() if self._file is not None else -1
        while first < len(starts) and not cancelled():
            begin = int(starts[first])
            last = max(first + 1, bisect_right(stops, begin + BLOCK, first))
            block = os.pread(fd, int(stops[last - 1]) - begin, begin)
            places = np.array(_first_in_each_line(block, term), np.int64) + begin
            rows = np.searchsorted(starts, places, "right") - 1
            # Between rows that are there may lie the texts of rows that changed since.
            real = rows[(rows >= 0) & (places < stops[rows])] if len(rows) else rows
            hits[real] = True
            first = last
        return hits

    def close(self) -> None:
        """Delete the temporary file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _first_in_each_line(block: bytes, term: bytes) -> list[int]:
    places = []
    place = block.find(term)
    while place >= 0:
        places.append(place)
        end = block.find(b"\n", place)
        place = block.find(term, end) if end >= 0 else -1
    return places


def _temporary(folder: Path) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(dir=folder)
    except OSError:
        return tempfile.TemporaryFile()


def _relations(digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    """Return the bits of `RELATIONS` for rows, by sorting their digests; some 50 ms for 50,000 of them."""
    prompt, chosen, rejected, identity = digests
    bits = np.zeros(len(prompt), np.uint8)
    if len(prompt):
        pair, reverse = _mixed(prompt, chosen, rejected), _mixed(prompt, rejected, chosen)
        found = (_repeated(pair), np.isin(pair, reverse), (identity != 0) & _repeated(identity))
        for bit, rows in enumerate(found):
            bits[rows] |= np.uint8(1 << bit)
    return bits


def _mixed(*columns: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    total = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        total = (total ^ column) * _ODD
        total ^= total >> np.uint64(31)
    return total


def _repeated(values: npt.NDArray[np.uint64]) -> Bools:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    found: Bools = counts[inverse] > 1
    return found
