"""Pairs that repeat or contradict each other, found by digests of their texts.

Texts are compared with white space at their ends aside, prompts turn by turn. A pair costs 40 bytes. What only means
the same is not found here; `near.py` finds what is nearly the same.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from localdpo.data.pairs import PreferencePair, prompt_key

__all__ = ["Digest", "PairDigests", "Repeats", "digest_pair", "text_digest"]

_U64 = npt.NDArray[np.uint64]
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Digest(NamedTuple):
    """64-bit digests of a pair's three texts: among a million rows two different ones meet once in 10^7 files."""

    prompt: int
    chosen: int
    rejected: int


def text_digest(text: str) -> int:
    """Return a text's 64-bit digest, white space at its ends aside."""
    raw = hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(raw, "little")


def digest_pair(pair: PreferencePair) -> Digest:
    """Return the digests by which a pair's texts are compared."""
    prompt = int.from_bytes(prompt_key(pair.prompt)[:8], "little")
    return Digest(prompt, text_digest(pair.chosen), text_digest(pair.rejected))


@dataclass(frozen=True, slots=True)
class Repeats:
    """What `PairDigests.find` found, as lists of groups of lines, each group in file order.

    `duplicates`: the same pair. `contradictory`: a pair and its reverse. `cycles`: three or more answers to a prompt,
    each preferred to the next and the last to the first.
    """

    duplicates: list[tuple[int, ...]]
    contradictory: list[tuple[int, ...]]
    cycles: list[tuple[int, ...]]


class PairDigests:
    """The digests of a file's pairs, in file order."""

    def __init__(self) -> None:
        self._columns = {name: array("Q") for name in Digest._fields}
        self._lines = array("q")

    def add(self, line: int, digest: Digest) -> None:
        """Take one pair."""
        self._lines.append(line)
        for column, value in zip(self._columns.values(), digest, strict=True):
            column.append(value)

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def lines(self) -> npt.NDArray[np.int64]:
        """The line of every pair, int64 [pairs]."""
        return np.array(self._lines, np.int64)

    def column(self, name: str) -> _U64:
        """The digests of "prompt", "chosen" or "rejected", uint64 [pairs]."""
        return np.array(self._columns[name], np.uint64)

    def groups(self) -> npt.NDArray[np.int64]:
        """For every pair the number of its prompt among the distinct ones, int64 [pairs]."""
        return np.unique(self.column("prompt"), return_inverse=True)[1].astype(np.int64)

    def find(self) -> Repeats:
        """Compare every pair with every other, by sorting."""
        prompt, chosen, rejected = (self.column(name) for name in Digest._fields)
        keys, reverse = _mixed(prompt, chosen, rejected), _mixed(prompt, rejected, chosen)
        lines = self.lines
        return Repeats(
            _groups_of(keys, lines), _swapped(keys, reverse, lines), _cycles(prompt, chosen, rejected, lines)
        )


def _mixed(*columns: _U64) -> _U64:
    total = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        total = (total ^ column) * _MIX
        total ^= total >> np.uint64(29)
    return total


def _groups_of(keys: _U64, lines: npt.NDArray[np.int64]) -> list[tuple[int, ...]]:
    """Return the lines of keys that come more than once, grouped, ordered by their first line."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order])) + 1
    groups = [group for group in np.split(order, starts) if len(group) > 1]
    return sorted(tuple(int(line) for line in lines[group]) for group in groups)


def _swapped(keys: _U64, reverse: _U64, lines: npt.NDArray[np.int64]) -> list[tuple[int, ...]]:
    index = np.flatnonzero(np.isin(keys, reverse))
    # A pair and its reverse share the smaller of both keys.
    return _groups_of(np.minimum(keys, reverse)[index], lines[index])


def _cycles(prompt: _U64, chosen: _U64, rejected: _U64, lines: npt.NDArray[np.int64]) -> list[tuple[int, ...]]:
    """Return groups of rows whose preferences run in circles of three answers or more."""
    found = []
    order = np.argsort(prompt, kind="stable")
    starts = np.flatnonzero(np.diff(prompt[order])) + 1
    for group in np.split(order, starts):
        if len(group) < 3:
            continue
        edges = {(int(chosen[i]), int(rejected[i])): int(lines[i]) for i in group}
        one_way = {edge: line for edge, line in edges.items() if edge[::-1] not in edges}
        left = _in_circles(one_way)
        if left:
            found.append(tuple(sorted(left.values())))
    return sorted(found)


def _in_circles(edges: Mapping[tuple[int, int], int]) -> dict[tuple[int, int], int]:
    """Return the preferences that are on a circle, or on a path between two: what is left when ends are cut away."""
    left = dict(edges)
    while True:
        better, worse = {a for a, _ in left}, {b for _, b in left}
        kept = {(a, b): line for (a, b), line in left.items() if a in worse and b in better}
        if len(kept) == len(left):
            return kept
        left = kept
