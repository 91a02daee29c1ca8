"""Pairs that are nearly the same, found without comparing every one with every other.

Each pair's texts are cut into pieces of sixteen bytes that start at its words; one hash of each, split into bins of
which the least is kept (one permutation hashing, Li, Owen and Zhang 2012), gives a signature that agrees with another's
about as often as the pieces do. Pairs that share a band of it are candidates, and candidates are compared text by text.
A pair costs 128 bytes however long it is. Case and white space do not count.

What is found is near in letters, not in meaning. Of a crowd of equal candidates each is compared with the first only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["BANDS", "NearIndex", "are_near", "normal"]

_U64 = npt.NDArray[np.uint64]
_PIECE = 16
_BINS, BANDS = 64, 16
_ROWS = _BINS // BANDS
_BATCH_BYTES = 1 << 20
_MAX_CHARS = 20_000
NEAR = 0.8
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_NUMBER = re.compile(r"\d+")


def normal(text: str) -> str:
    """Return what of a text counts: lower case, single spaces, its first 20,000 characters."""
    return " ".join(text[:_MAX_CHARS].casefold().split())


class Candidate(NamedTuple):
    """Two rows, by their place in the index, that look alike; `first` is the smaller."""

    first: int
    second: int


class NearIndex:
    """Signatures of texts in the order they came, and the candidates among them."""

    def __init__(self) -> None:
        self._waiting: list[bytes] = []
        self._salts: list[tuple[int, ...]] = []
        self._bytes = 0
        self._keys: list[_U64] = []

    def add(self, texts: Sequence[str]) -> None:
        """Take one row: its texts in a fixed order, as `normal` gives them."""
        pieces = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._salts.append(tuple(map(len, pieces)))
        # Zeros let a window start on every byte and keep it inside its text.
        self._waiting.append(b"".join(piece + bytes(_PIECE) for piece in pieces))
        self._bytes += len(self._waiting[-1])
        if self._bytes >= _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._keys.append(_band_keys(self._waiting, self._salts))
        self._waiting, self._salts, self._bytes = [], [], 0

    def keys(self) -> _U64:
        """Return the band keys so far, uint64 [rows, BANDS]."""
        self._flush()
        self._keys = [np.concatenate(self._keys)] if self._keys else [np.zeros((0, BANDS), np.uint64)]
        return self._keys[0]

    def put_before(self, keys: _U64) -> None:
        """Put the rows of another index, as its `keys`, before these."""
        self._keys = [keys, self.keys()]

    def candidates(self, limit: int) -> tuple[list[Candidate], bool]:
        """Return candidates in order of their rows, at most `limit`, and whether these are all."""
        found = _pairs_in_bands(self.keys())
        return [Candidate(int(a), int(b)) for a, b in found[:limit]], len(found) <= limit


def _band_keys(rows: Sequence[bytes], lengths: Sequence[tuple[int, ...]]) -> _U64:
    """Return uint64 [rows, BANDS]: equal keys mean equal quarters of a signature."""
    buffer = b"".join(rows) + bytes(_PIECE)
    hashes, bins = _window_hashes(buffer, rows, lengths)
    # The bin in the high bits, so that one sort finds the least of each.
    order = np.sort((bins << np.uint64(40)) | (hashes >> np.uint64(24)))
    slots = order >> np.uint64(40)
    first = np.concatenate(([True], slots[1:] != slots[:-1])) if len(slots) else np.zeros(0, bool)
    signature = np.zeros(len(rows) * _BINS, np.uint64)
    signature[slots[first].astype(np.int64)] = (order[first] & np.uint64((1 << 40) - 1)) + np.uint64(1)
    return _banded(_densified(signature.reshape(len(rows), _BINS)))


def _window_hashes(buffer: bytes, rows: Sequence[bytes], lengths: Sequence[tuple[int, ...]]) -> tuple[_U64, _U64]:
    """Return the hash of every piece, salted by which text it is in, and the slot (row, bin) that it falls into."""
    total = len(buffer) - _PIECE
    padded = np.array(lengths, np.int64) + _PIECE
    starts = _starts(np.frombuffer(buffer, np.uint8, total), np.cumsum(padded.ravel()))
    # Two overlapping views of the buffer: the eight bytes from every place on.
    eight = np.ndarray((total + 8,), "<u8", buffer, strides=(1,))
    text = np.searchsorted(np.cumsum(padded.ravel()), starts, side="right")
    row, which = np.divmod(text, padded.shape[1])
    hashes = _scrambled(eight[starts].astype(np.uint64) + (which.astype(np.uint64) + np.uint64(1)) * _MIX2)
    hashes = _scrambled(hashes ^ eight[starts + 8].astype(np.uint64))
    return hashes, row.astype(np.uint64) * np.uint64(_BINS) + (hashes & np.uint64(_BINS - 1))


def _scrambled(values: _U64) -> _U64:
    """Mix the bits of 64-bit values (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX1
    values = (values ^ (values >> np.uint64(27))) * _MIX2
    return values ^ (values >> np.uint64(31))


def _starts(data: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where pieces start: at words, and at every character beyond Latin, as not all scripts have spaces."""
    start = data >= 0xE0
    start[1:] |= (data[:-1] == 0x20) & (data[1:] != 0)
    start[0] = True
    start[ends[:-1]] = True
    return np.flatnonzero(start)


def _densified(signature: _U64) -> _U64:
    """Fill empty bins (0) from full ones to their right, marked by how far (after Shrivastava and Li 2014).

    Steps of 1, 2, 4 … 32 reach every bin from every other.
    """
    for step in range(_BINS.bit_length() - 1):
        distance = 1 << step
        moved = np.roll(signature, -distance, axis=1)
        signature = np.where((signature == 0) & (moved != 0), moved * np.uint64(2 * distance + 1), signature)
    return signature


def _banded(signature: _U64) -> _U64:
    bands = signature.reshape(len(signature), BANDS, _ROWS)
    keys = np.zeros(bands.shape[:2], np.uint64)
    for column in range(_ROWS):
        keys = (keys ^ bands[:, :, column]) * _MIX1
        keys ^= keys >> np.uint64(29)
    return keys


def _pairs_in_bands(keys: _U64) -> npt.NDArray[np.int64]:
    """Return distinct (first, second) rows that share a band, int64 [candidates, 2], sorted."""
    packed: list[npt.NDArray[np.int64]] = []
    size = len(keys)
    for band in range(keys.shape[1]):
        order = np.argsort(keys[:, band], kind="stable")
        ordered = keys[order, band]
        same = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        if not len(same):
            continue
        # Each member of a group goes with the group's first: a crowd of n gives n - 1 candidates.
        begins = np.concatenate(([True], ordered[1:] != ordered[:-1]))
        first = np.maximum.accumulate(np.where(begins, np.arange(size), 0))
        packed.append(np.unique(order[first[same]] * size + order[same]))
    if not packed:
        return np.zeros((0, 2), np.int64)
    return np.stack(np.divmod(np.unique(np.concatenate(packed)), size), axis=1)


def are_near(first: Sequence[str], second: Sequence[str]) -> bool:
    """Return whether each text of one row is nearly that of the other, all of them as `normal` gives them.

    Texts with other numbers in them are not: they come from one mould and say different things.
    """
    return all(_text_near(a, b) for a, b in zip(first, second, strict=True))


def are_reversed(first: Sequence[str], second: Sequence[str]) -> bool:
    """Return whether (prompt, chosen, rejected) of one row is nearly the other with its answers swapped."""
    return are_near(first, (second[0], second[2], second[1]))


def _text_near(first: str, second: str) -> bool:
    if first == second:
        return True
    if min(len(first), len(second)) < NEAR * max(len(first), len(second)) - 2:
        return False
    if sorted(_NUMBER.findall(first)) != sorted(_NUMBER.findall(second)):
        return False
    if _letters(first) == _letters(second):
        return True
    return _overlap(set(_cut(first, 4)), set(_cut(second, 4))) >= NEAR


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text))


def _cut(text: str, size: int) -> Iterator[str]:
    return (text[i : i + size] for i in range(max(1, len(text) - size + 1)))


def _overlap(first: set[str], second: set[str]) -> float:
    union = len(first | second)
    return len(first & second) / union if union else 1.0


def grouped(edges: Iterable[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Return the rows that edges connect, each group sorted, ordered by first row."""
    parent: dict[int, int] = {}

    def root(row: int) -> int:
        parent.setdefault(row, row)
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for first, second in edges:
        a, b = root(first), root(second)
        parent[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for row in parent:
        groups.setdefault(root(row), []).append(row)
    return sorted(tuple(sorted(group)) for group in groups.values())
