"""Merge, row by row, what two sides made of one file: their version on disk and our unsaved edits.

Theirs is the ground that ours is put on: rows they added, changed, moved or deleted are taken as they are, and our
edits, additions and deletions follow. Only a row that both changed, differently, needs a decision. This module
writes nothing.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, Literal

import numpy as np

from localdpo.data.merge import align
from localdpo.data.pairs import prompt_key
from localdpo.data.rows import Row, read_row
from localdpo.data.segments import Layout, line_at, line_hashes
from localdpo.data.sheet import Ints, Sheet

__all__ = ["Alignment", "Choice", "Conflict", "Merge", "align_files", "merge"]

Choice = Literal["ours", "theirs", "both"]


@dataclass(frozen=True, slots=True)
class Conflict:
    """A row that both sides changed. `ours` and `theirs` are its lines, None where that side deleted it.

    Choosing "ours" or "theirs" takes that side's; "both" keeps both lines (the one there is, where a side deleted).
    """

    key: int
    base: bytes
    ours: bytes | None
    theirs: bytes | None

    @property
    def our_row(self) -> Row | None:
        """Our version as a row."""
        return None if self.ours is None else read_row(self.ours, self.key, dirty=True)

    @property
    def their_row(self) -> Row | None:
        """Their version as a row."""
        return None if self.theirs is None else read_row(self.theirs, self.key)


@dataclass(frozen=True, slots=True)
class Alignment:
    """Which line of their file each line of the base is (`same`) or has become (`became`); -1 for none."""

    base: Layout
    theirs: Layout
    file: BinaryIO
    same: Ints
    became: Ints


@dataclass(slots=True)
class Merge:
    """What both sides make together: keys of their lines, our order on top of them, texts by key.

    Nothing but `conflicts` counts while there are any. `taken` is how many rows of theirs were new, changed or gone,
    `changed` the known keys that may have another text than before.
    """

    conflicts: tuple[Conflict, ...] = ()
    keys: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    order: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    texts: dict[int, bytes] = field(default_factory=dict)
    taken: int = 0
    changed: set[int] = field(default_factory=set)


def align_files(base: Layout, base_file: BinaryIO, theirs: Layout, file: BinaryIO) -> Alignment:
    """Find the lines of the base in their file."""

    def pairing(left: list[int], right: list[int]) -> list[tuple[int, int]]:
        ours = {line: _identity(line_at(base, base_file, line)) for line in left if not base.blank[line]}
        others = {line: _identity(line_at(theirs, file, line)) for line in right if not theirs.blank[line]}
        return _pairs(ours, others)

    same, became = align(line_hashes(base, base_file), line_hashes(theirs, file), pairing)
    return Alignment(base, theirs, file, same, became)


def _identity(raw: bytes) -> tuple[object, ...]:
    """What makes a row the same one after an edit, the surest first."""
    row = read_row(raw)
    prompt = prompt_key(row.messages) if row.messages else None
    return row.id, prompt, (row.chosen, row.rejected) if row.chosen or row.rejected else None


def _pairs(ours: dict[int, tuple[object, ...]], others: dict[int, tuple[object, ...]]) -> list[tuple[int, int]]:
    """Pair lines by id, then by prompt, then by answers, then, where as many are left, by their order."""
    pairs = []
    for level in range(3):
        waiting: dict[object, deque[int]] = defaultdict(deque)
        for line, identity in others.items():
            if identity[level] is not None:
                waiting[identity[level]].append(line)
        for line in [line for line, identity in ours.items() if identity[level] is not None]:
            queue = waiting.get(ours[line][level])
            if queue:
                other = queue.popleft()
                pairs.append((line, other))
                del ours[line], others[other]
    if len(ours) == len(others):
        pairs += zip(ours, others, strict=True)
    return pairs


def merge(sheet: Sheet, found: Alignment, choices: Mapping[Conflict, Choice]) -> Merge:
    """Put what `sheet` differs from its base on top of their file. Changes nothing but the sheet's next key."""
    base = sheet.base_order
    kept = np.isin(base, sheet.order)
    keys = _their_keys(sheet, found)
    result = Merge(keys=keys, texts=dict(sheet.live_texts()))
    result.changed = {*map(int, base[found.became >= 0]), *result.texts}
    result.taken = int((found.same < 0).sum() + (keys >= sheet.next_key - _added(found)).sum())
    dropped: set[int] = set()
    doubled: dict[int, int] = {}
    conflicts = []
    for line in _touched(base, kept, result.texts):
        key = int(base[line])
        if found.same[line] >= 0:
            if not kept[line]:
                dropped.add(key)
            continue
        conflict = Conflict(key, sheet.base_content(key), result.texts.get(key) if kept[line] else None,
                            _their_line(found, line))  # fmt: skip
        if conflict.ours == conflict.theirs:
            result.texts.pop(key, None)
        elif (choice := choices.get(conflict)) is None:
            conflicts.append(conflict)
        else:
            _decide(conflict, choice, result, dropped, doubled, sheet)
    result.conflicts = tuple(conflicts)
    if not conflicts:
        ground = keys[~np.isin(keys, np.fromiter(dropped, np.int64, len(dropped)))]
        result.order = _with_ours(sheet, ground, result.texts, doubled)
    return result


def _added(found: Alignment) -> int:
    return len(found.theirs) - int((found.same >= 0).sum() + (found.became >= 0).sum())


def _their_keys(sheet: Sheet, found: Alignment) -> Ints:
    """Return a key for each of their lines: the base's where it is one of its lines, a new one otherwise."""
    keys = np.full(len(found.theirs), -1, np.int64)
    for lines in (found.same, found.became):
        keys[lines[lines >= 0]] = sheet.base_order[lines >= 0]
    for line in np.flatnonzero(keys < 0):
        keys[line] = sheet.new_key()
    return keys


def _touched(base: Ints, kept: np.ndarray[tuple[int], np.dtype[np.bool_]], texts: Mapping[int, bytes]) -> Iterator[int]:
    edited = np.isin(base, np.fromiter(texts, np.int64, len(texts)))
    yield from map(int, np.flatnonzero(edited | ~kept))


def _their_line(found: Alignment, line: int) -> bytes | None:
    became = int(found.became[line])
    return None if became < 0 else line_at(found.theirs, found.file, became)


def _decide(
    conflict: Conflict, choice: Choice, result: Merge, dropped: set[int], doubled: dict[int, int], sheet: Sheet
) -> None:
    key = conflict.key
    if choice == "theirs":
        result.texts.pop(key, None)
    elif conflict.ours is None:
        if choice == "ours":
            dropped.add(key)
    elif choice == "both" and conflict.theirs is not None:
        del result.texts[key]
        added = sheet.new_key()
        result.texts[added] = conflict.ours
        doubled[added] = key


def _with_ours(sheet: Sheet, ground: Ints, texts: dict[int, bytes], doubled: Mapping[int, int]) -> Ints:
    """Put the rows that only we have after the rows that they follow in our order."""
    ours = sheet.order
    there = np.isin(ours, ground)
    # Rows that were in the base and are not on the ground went away with them, unless our edit of them is kept.
    added = ~there & (~np.isin(ours, sheet.base_order) | np.isin(ours, np.fromiter(texts, np.int64, len(texts))))
    anchors = np.maximum.accumulate(np.where(there, np.arange(len(ours)), -1)) if len(ours) else ours
    place = {int(key): number for number, key in enumerate(ground)} if added.any() or doubled else {}
    positions, keys = [], []
    for number in np.flatnonzero(added):
        anchor = int(anchors[number])
        positions.append(place[int(ours[anchor])] + 1 if anchor >= 0 else 0)
        key = int(ours[number])
        keys.append(key)
        if key not in texts:  # an undo brought it back after a save: no base of theirs holds it
            texts[key] = sheet.content(key)
    for key, beside in doubled.items():
        positions.append(place[beside] + 1)
        keys.append(key)
    return np.insert(ground, positions, keys) if keys else ground
