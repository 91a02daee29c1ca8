"""Find the lines of one version of a file in another, so that two people's edits can be put together by line.

Lines are given by hashes of their contents. This module knows nothing about pairs or files.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

__all__ = ["align"]

Ints = npt.NDArray[np.int64]
Pairing = Callable[[list[int], list[int]], list[tuple[int, int]]]
"""Given leftover lines of both versions between two matches: those that are versions of one line."""


def align(base: Ints, theirs: Ints, pairing: Pairing) -> tuple[Ints, Ints]:
    """Return, for each line of `base`, the line of `theirs` that is the same, and the one it may have become.

    Both are arrays of indices with -1 for none; a line has at most one of the two, and no line of `theirs` is given
    to two. Equal lines are found wherever they moved to, as long as their content is unique; what `pairing` makes
    of the lines left over between two matches is the second array.
    """
    same = np.full(len(base), -1, np.int64)
    became = same.copy()
    head = _common(base, theirs)
    tail = _common(base[head:][::-1], theirs[head:][::-1])
    same[:head] = np.arange(head)
    if tail:
        same[-tail:] = np.arange(len(theirs) - tail, len(theirs))
    anchors = _unique_matches(base, theirs, head, tail, same)
    anchors = [(head - 1, head - 1), *anchors, (len(base) - tail, len(theirs) - tail)]
    taken = set(map(int, same[same >= 0]))
    for (b0, t0), (b1, t1) in pairwise(anchors):
        ours = [b for b in range(b0 + 1, b1) if same[b] < 0]
        other = [t for t in range(t0 + 1, t1) if t not in taken]
        _match_repeats(base, theirs, ours, other, same)
        left = [b for b in ours if same[b] < 0]
        used = {int(same[b]) for b in ours}
        right = [t for t in other if t not in used]
        if left and right:
            for b, t in pairing(left, right):
                became[b] = t
    return same, became


def _common(first: Ints, second: Ints) -> int:
    length = min(len(first), len(second))
    differ = np.flatnonzero(first[:length] != second[:length])
    return int(differ[0]) if len(differ) else length


def _unique_matches(base: Ints, theirs: Ints, head: int, tail: int, same: Ints) -> list[tuple[int, int]]:
    """Match contents that are unique in both middles; return those that kept their order."""
    lines, at, counts = np.unique(base[head : len(base) - tail], return_index=True, return_counts=True)
    lines, at = lines[counts == 1], at[counts == 1]
    others, there, counts = np.unique(theirs[head : len(theirs) - tail], return_index=True, return_counts=True)
    others, there = others[counts == 1], there[counts == 1]
    _, first, second = np.intersect1d(lines, others, assume_unique=True, return_indices=True)
    pairs = sorted(zip((at[first] + head).tolist(), (there[second] + head).tolist(), strict=True))
    for b, t in pairs:
        same[b] = t
    return _longest_rising(pairs)


def _longest_rising(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the longest part of `pairs`, sorted by their first, whose seconds rise (patience sorting)."""
    tops: list[int] = []
    piles: list[int] = []
    back: list[int] = []
    for number, (_, value) in enumerate(pairs):
        pile = bisect_left(tops, value)
        back.append(piles[pile - 1] if pile else -1)
        if pile == len(tops):
            tops.append(value)
            piles.append(number)
        else:
            tops[pile], piles[pile] = value, number
    found = []
    number = piles[-1] if piles else -1
    while number >= 0:
        found.append(pairs[number])
        number = back[number]
    return found[::-1]


def _match_repeats(base: Ints, theirs: Ints, ours: list[int], other: list[int], same: Ints) -> None:
    """Match lines whose content stands several times in the file: the first with the first."""
    waiting: dict[int, deque[int]] = defaultdict(deque)
    for t in other:
        waiting[int(theirs[t])].append(t)
    for b in ours:
        queue = waiting.get(int(base[b]))
        if queue:
            same[b] = queue.popleft()
