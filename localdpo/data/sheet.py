"""The lines of a file as an editable sequence: stable keys, contents read when asked, edits that can be undone.

Lines stay on disk in read-only sources (`Layout` says where); only what was edited is in memory. `Frozen.pieces`
gives the file that the sheet stands for, with every untouched line byte for byte as it was. This module knows
nothing about pairs, journals or locks; its caller keeps other threads away while it changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from localdpo.data.segments import BOM, ENDS, LF, OPEN, Ints, Layout, read_range

__all__ = ["Edit", "Frozen", "Ints", "Sheet", "runs_of"]

_ROOM = 1024
_END_LENGTHS = np.array([len(end) for end in ENDS], np.int64)


@dataclass(slots=True)
class Edit:
    """A change that knows its own reverse.

    `contents` is key -> (old, new); the same twice for a line that is added. `cut` and `put` are ascending positions
    and keys: of lines taken out, in the order before, and of lines put in, in the order after. `text` describes it to
    the user, `show` is the row to go to.
    """

    text: str = ""
    show: int = -1
    contents: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    cut: tuple[Ints, Ints] | None = None
    put: tuple[Ints, Ints] | None = None
    time: float = 0.0

    def reversed(self) -> Edit:
        """The edit that takes this one back."""
        contents = {key: (new, old) for key, (old, new) in self.contents.items()}
        return Edit(self.text, self.show, contents, cut=self.put, put=self.cut)

    def to_record(self) -> dict[str, Any]:
        """The edit as JSON for a journal."""
        record: dict[str, Any] = {}
        if self.cut is not None:
            record["cut"] = self.cut[0].tolist()
        if self.put is not None:
            record["put"] = [self.put[0].tolist(), self.put[1].tolist()]
        if self.contents:
            record["set"] = [[key, _text(new)] for key, (_, new) in self.contents.items()]
        return record


def _text(raw: bytes) -> str:
    # Bytes that are no UTF-8 (a broken row that an undo brings back) survive as surrogates.
    return raw.decode("utf-8", "surrogateescape")


@dataclass(frozen=True, slots=True)
class Frozen:
    """What a sheet stood for at one moment: its keys in order, and what it takes to write them."""

    order: Ints
    texts: Mapping[int, bytes]
    bom: bool
    _unfinished: bool
    _line_end: int
    _starts: Ints
    _stops: Ints
    _ends: npt.NDArray[np.uint8]
    _files: Mapping[int, BinaryIO]
    _source: npt.NDArray[np.int16]

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes of the file, in pieces of at most 1 MiB and a line."""
        if self.bom:
            yield BOM
        order = self.order
        if not len(order):
            return
        changed = np.isin(order, np.fromiter(self.texts, np.int64, len(self.texts)))
        starts, stops, ends = self._starts[order], self._stops[order], self._ends[order]
        source = self._source[order]
        # Lines that stand one after the other in a source are copied in one go, their ends included.
        breaks = changed[:-1] | changed[1:] | (source[:-1] != source[1:]) | (ends[:-1] == OPEN)
        breaks |= starts[1:] != stops[:-1] + _END_LENGTHS[ends[:-1]]
        lasts = np.append(np.flatnonzero(breaks), len(order) - 1)
        first = 0
        for last in map(int, lasts):
            if changed[first]:
                yield self.texts[int(order[first])]
                empty = not self.texts[int(order[first])]
            else:
                yield from read_range(self._files[int(source[first])].fileno(), int(starts[first]), int(stops[last]))
                empty = bool(starts[last] == stops[last])
            yield self._end(int(ends[last]), last == len(order) - 1, empty)
            first = last + 1

    def _end(self, end: int, last: bool, empty: bool) -> bytes:
        """A file keeps ending as it ended; lines in between get an end if they had none."""
        if last and self._unfinished and not empty:
            return b""
        return ENDS[end] if end != OPEN else ENDS[self._line_end]


class Sheet:
    """Keys in order, where each one's text is, and the edits made."""

    def __init__(self) -> None:
        self.order: Ints = np.empty(0, np.int64)
        self.base_order: Ints = self.order
        self.texts: dict[int, bytes] = {}
        self.next_key = 0
        self.layout: Layout | None = None
        self.base_file: BinaryIO | None = None
        self.bom = False
        self.line_end = LF
        self._unfinished = False
        self._starts: Ints = np.zeros(_ROOM, np.int64)
        self._stops: Ints = np.zeros(_ROOM, np.int64)
        self._ends = np.zeros(_ROOM, np.uint8)
        self._blank = np.zeros(_ROOM, np.bool_)
        self._source = np.full(_ROOM, -1, np.int16)
        self._files: dict[int, BinaryIO] = {}
        self._newest = -1
        self._visible: Ints | None = None

    # -- reading

    @property
    def keys(self) -> Ints:
        """The keys of all lines that are not blank, in order. Not to be changed."""
        if self._visible is None:
            self._visible = self.order[~self._blank[self.order]]
        return self._visible

    @property
    def changed(self) -> bool:
        """Whether the sheet stands for another file than its base."""
        return not np.array_equal(self.order, self.base_order) or bool(self.live_texts())

    def live_texts(self) -> dict[int, bytes]:
        """Return the texts, by key, of lines that were changed or added and are still there."""
        if not self.texts:
            return {}
        keys = np.fromiter(self.texts, np.int64, len(self.texts))
        return {int(key): self.texts[int(key)] for key in keys[np.isin(keys, self.order)]}

    def has(self, key: int) -> bool:
        """Whether a line is there."""
        return bool((self.order == key).any())

    def position(self, key: int) -> int:
        """Return where a line is among all lines. Raises KeyError."""
        found = np.flatnonzero(self.order == key)
        if not len(found):
            raise KeyError(key)
        return int(found[0])

    def content(self, key: int) -> bytes:
        """Return a line without its end, whether it is still in the order or not. Raises KeyError."""
        text = self.texts.get(key)
        return self.base_content(key) if text is None else text

    def base_content(self, key: int) -> bytes:
        """Return what the base holds for a key. Raises KeyError when it holds nothing."""
        if not 0 <= key < self.next_key or self._source[key] < 0:
            raise KeyError(key)
        file = self._files[int(self._source[key])]
        return b"".join(read_range(file.fileno(), int(self._starts[key]), int(self._stops[key])))

    def _known(self, key: int) -> bool:
        return key in self.texts or self.in_base(key)

    def in_base(self, key: int) -> bool:
        """Whether this base or an earlier one holds something for a key."""
        return 0 <= key < self.next_key and bool(self._source[key] >= 0)

    def lengths(self, keys: Ints) -> Ints:
        """Return the bytes of each line as its base holds it."""
        return self._stops[keys] - self._starts[keys]

    def contents(self, keys: Sequence[int]) -> list[bytes]:
        """Return many lines; those that stand one after the other in the file are read in one go."""
        found: list[bytes] = []
        number = 0
        while number < len(keys):
            key = int(keys[number])
            run = self._run(keys, number)
            if run == 1:
                found.append(self.content(key))
            else:
                start = int(self._starts[key])
                file = self._files[int(self._source[key])]
                data = b"".join(read_range(file.fileno(), start, int(self._stops[int(keys[number + run - 1])])))
                for each in map(int, keys[number : number + run]):
                    found.append(data[int(self._starts[each]) - start : int(self._stops[each]) - start])
            number += run
        return found

    def _run(self, keys: Sequence[int], number: int) -> int:
        first = int(keys[number])
        if first in self.texts or self._source[first] < 0:
            return 1
        length = 1
        while number + length < len(keys):
            key, before = int(keys[number + length]), int(keys[number + length - 1])
            near = 0 <= self._starts[key] - self._stops[before] <= 2
            if key in self.texts or self._source[key] != self._source[first] or not near:
                break
            length += 1
        return length

    def freeze(self) -> Frozen:
        """Return what the sheet stands for now; later edits do not change it."""
        return Frozen(
            self.order, self.live_texts(), self.bom, self._unfinished, self.line_end,
            self._starts, self._stops, self._ends, dict(self._files), self._source,
        )  # fmt: skip

    # -- editing

    def new_key(self, end: int | None = None) -> int:
        """Return a key for a line that is added."""
        key = self.next_key
        self.next_key += 1
        self._grow(self.next_key)
        self._ends[key] = self.line_end if end is None else end
        return key

    def apply(self, edit: Edit) -> None:
        """Do an edit."""
        if edit.cut is not None:
            self.order = np.delete(self.order, edit.cut[0])
        if edit.put is not None:
            positions, keys = edit.put
            order = np.empty(len(self.order) + len(keys), np.int64)
            added = np.zeros(len(order), np.bool_)
            added[positions] = True
            order[positions] = keys
            order[~added] = self.order
            self.order = order
        for key, (_, new) in edit.contents.items():
            self._set(key, new)
        if edit.cut is not None or edit.put is not None:
            self._visible = None

    def _set(self, key: int, text: bytes) -> None:
        # What the base holds is not a change: an undo leaves nothing to save.
        same = self.in_base(key) and len(text) == self._stops[key] - self._starts[key]
        if same and self.base_content(key) == text:
            self.texts.pop(key, None)
        else:
            self.texts[key] = text

    def replay(self, record: Mapping[str, Any]) -> Edit:
        """Do what a record of `Edit.to_record` says, and return it as an edit. Raises ValueError for other records."""
        edit = Edit()
        try:
            if "cut" in record:
                positions = np.asarray(record["cut"], np.int64)
                edit.cut = positions, self.order[positions]
            if "put" in record:
                edit.put = np.asarray(record["put"][0], np.int64), np.asarray(record["put"][1], np.int64)
                for key in map(int, edit.put[1]):
                    if key >= self.next_key:
                        self.next_key = key
                        self.new_key()
            for key, text in record.get("set", ()):
                new = text.encode("utf-8", "surrogateescape")
                edit.contents[int(key)] = (self.content(int(key)) if self._known(int(key)) else new), new
            self.apply(edit)
        except (IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"a record of a journal cannot be replayed: {error}") from None
        return edit

    # -- changing what it stands on

    def set_base(self, layout: Layout, keys: Ints, file: BinaryIO) -> None:
        """Take `file` as the base: its lines are those of `keys`, which may be known or new."""
        self._newest += 1
        self._files[self._newest] = file
        if len(keys):
            self.next_key = max(self.next_key, int(keys.max()) + 1)
        self._grow(self.next_key)
        if self._newest:  # what was frozen before keeps its own
            self._starts, self._stops, self._ends = self._starts.copy(), self._stops.copy(), self._ends.copy()
            self._source, self._blank = self._source.copy(), self._blank.copy()
        self._starts[keys], self._stops[keys] = layout.starts, layout.stops
        self._ends[keys], self._blank[keys] = layout.ends, layout.blank
        self._source[keys] = self._newest
        self.base_order = keys
        self.bom, self.line_end = layout.bom, layout.line_end
        self._unfinished = layout.unfinished
        self.layout, self.base_file = layout, file
        self._visible = None

    def net_edit(self) -> Edit:
        """Return the one edit that leads from the base to the sheet as it is."""
        kept = np.isin(self.base_order, self.order)
        gone = np.flatnonzero(~kept)
        added = np.flatnonzero(~np.isin(self.order, self.base_order))
        edit = Edit(contents={key: (text, text) for key, text in self.live_texts().items()})
        if len(gone):
            edit.cut = gone, self.base_order[gone]
        if len(added):
            edit.put = added, self.order[added]
            edit.contents |= self.foreign(edit.put[1])
        return edit

    def foreign(self, keys: Ints) -> dict[int, tuple[bytes, bytes]]:
        """Return the contents of those of `keys` that are no lines of the base, as `Edit.contents` has them."""
        found = {}
        for key in map(int, keys[~np.isin(keys, self.base_order)]):
            text = self.content(key)
            found[key] = text, text
        return found

    def rebase(self, layout: Layout, keys: Ints, file: BinaryIO, order: Ints, texts: Mapping[int, bytes]) -> None:
        """Stand on another file from now on, with `order` and `texts` as what was made of it."""
        self.set_base(layout, keys, file)
        self.order = order
        self.texts = dict(texts)

    def release_sources(self, needed: Iterable[int]) -> None:
        """Close the files that hold no line that is there or whose key is in `needed`."""
        keys = np.concatenate([self.order, self.base_order, np.fromiter(needed, np.int64)])
        used = {int(number) for number in np.unique(self._source[keys])} | {self._newest}
        for number in [number for number in self._files if number not in used]:
            self._files.pop(number).close()

    def close(self) -> None:
        """Close every source."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _grow(self, size: int) -> None:
        room = len(self._starts)
        if size <= room:
            return
        more = max(size, room * 3 // 2) - room
        self._starts = np.concatenate((self._starts, np.zeros(more, np.int64)))
        self._stops = np.concatenate((self._stops, np.zeros(more, np.int64)))
        self._ends = np.concatenate((self._ends, np.zeros(more, np.uint8)))
        self._blank = np.concatenate((self._blank, np.zeros(more, np.bool_)))
        self._source = np.concatenate((self._source, np.full(more, -1, np.int16)))


def runs_of(keys: Ints) -> list[list[int]]:
    """Return keys as runs of [first, count]: most files' keys are one run."""
    if not len(keys):
        return []
    breaks = np.flatnonzero(np.diff(keys) != 1) + 1
    firsts = np.concatenate(([0], breaks))
    counts = np.diff(np.concatenate((firsts, [len(keys)])))
    return [[int(keys[first]), int(count)] for first, count in zip(firsts, counts, strict=True)]
