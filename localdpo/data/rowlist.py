"""A file's rows as a list: read when asked, summed up in a line, searched and filtered.

Reading a row parses its line and keeps the last few thousand. Searching needs an index, which a worker thread builds a
batch at a time while edits go on. This module knows nothing about files or drafts: rows come from a `Sheet`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from localdpo.data.rowindex import RELATIONS, RowIndex, RowSummary, entry_of, first_line, own_codes, state_of, terms_of
from localdpo.data.rows import Row, read_row
from localdpo.data.segments import Ints
from localdpo.data.sheet import Sheet

__all__ = ["RowList"]

_CACHED_ROWS = 2048
_BATCH = 256  # rows parsed between two looks at whether anybody else wants the store


class RowList:
    """The rows of `sheet`, which changes only under `lock`; `folder` takes a temporary file.

    Rows of more than `max_tokens` tokens (see `note_tokens`) are "too_long"; None is no limit.
    """

    def __init__(self, sheet: Sheet, lock: threading.RLock, folder: Path) -> None:
        self._sheet = sheet
        self._lock = lock
        self._index = RowIndex(folder)
        self._indexing = threading.Lock()
        self._forgotten: set[int] = set()
        self._rows: dict[int, Row] = {}
        self._tokens: dict[int, int] = {}
        self.max_tokens: int | None = None

    def forget(self, keys: Iterable[int]) -> None:
        """Rows have other contents than before, or there are others than before."""
        changed = set(keys)
        self._forgotten |= changed
        self._index.forget(changed)
        for key in changed:
            self._rows.pop(key, None)
            self._tokens.pop(key, None)

    def saved(self) -> None:
        """No row is what it was: not dirty any more."""
        self._rows.clear()

    def close(self) -> None:
        """Delete the temporary file."""
        self._index.close()

    def raw(self, key: int) -> bytes:
        """Return the bytes of a row's line, without its end. Raises KeyError for a row that is not there."""
        with self._lock:
            if not self._sheet.has(key):
                raise KeyError(key)
            return self._sheet.content(key)

    def row(self, key: int) -> Row:
        """Return a row. Raises KeyError for one that is not there."""
        with self._lock:
            row = self._rows.get(key)
            if row is None:
                row = read_row(self.raw(key), key, self._is_dirty(key))
                if len(self._rows) >= _CACHED_ROWS:
                    del self._rows[next(iter(self._rows))]
                self._rows[key] = row
            return row

    def _is_dirty(self, key: int) -> bool:
        return key in self._sheet.texts or not bool((self._sheet.base_order == key).any())

    def summary(self, key: int) -> RowSummary:
        """Return what the list shows of a row. Raises KeyError for one that is not there.

        "duplicate" and its like are told as `build_index` last found them.
        """
        with self._lock:
            row = self.row(key)
            codes = own_codes(row) + self._index.related(key)
            tokens = self._tokens.get(key)
            if tokens is not None and self.max_tokens is not None and tokens > self.max_tokens:
                codes += ("too_long",)
            prompt = sum(len(turn["content"]) for turn in row.prompt)
            return RowSummary(
                key, state_of(row, codes), row.dirty, first_line(row), prompt, len(row.chosen), len(row.rejected),
                row.tags, codes, row.weight, tokens,
            )  # fmt: skip

    def note_tokens(self, counts: Mapping[int, int]) -> None:
        """Remember how many tokens rows have (prompt and the longer answer), as a model counts them."""
        with self._lock:
            self._tokens.update(counts)

    def build_index(
        self,
        cancelled: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] | None = None,
        *,
        checks: bool = True,
    ) -> bool:
        """Index the rows that are not indexed yet; return whether all are. On a worker thread.

        First comes what searching needs, then, with `checks`, what is wrong with each row. `progress` gets rows done
        and rows in all. A search does what it needs of this by itself; a list does it once it is shown.
        """
        with self._indexing:
            if not self._pass(cancelled, progress, self._take_in, "done"):
                return False
            self._compare()
            return not checks or self._pass(cancelled, progress, self._take_codes, "checked")

    def _compare(self) -> None:
        """Find rows that repeat or contradict others; the sorting is done while nobody waits for the lock."""
        with self._lock:
            compare = self._index.comparison(self._sheet.keys)
        if compare is not None:
            take = compare()
            with self._lock:
                take()

    def _pass(
        self,
        cancelled: Callable[[], bool],
        progress: Callable[[int, int], None] | None,
        work: Callable[[list[int], list[bytes]], Callable[[set[int]], None]],
        column: str,
    ) -> bool:
        """Hand every row whose `column` of the index is not set to `work`, a batch at a time."""
        while not cancelled():
            with self._lock:
                self._index.grow(self._sheet.next_key)
                keys = self._sheet.keys
                todo = keys[~getattr(self._index, column)[keys]]
                self._forgotten.clear()
            if progress is not None:
                progress(len(keys) - len(todo), len(keys))
            if not len(todo):
                return True
            for first in range(0, len(todo), _BATCH):
                if cancelled():
                    return False
                with self._lock:
                    batch = [key for key in todo[first : first + _BATCH].tolist() if key not in self._forgotten]
                    raws = self._sheet.contents(batch)
                store = work(batch, raws)
                with self._lock:
                    store(self._forgotten)
                if progress is not None:
                    progress(len(keys) - len(todo) + first + len(batch), len(keys))
        return False

    def _take_in(self, keys: list[int], raws: list[bytes]) -> Callable[[set[int]], None]:
        entries = {key: entry_of(read_row(raw, key), raw) for key, raw in zip(keys, raws, strict=True)}
        return lambda gone: self._index.add({key: entry for key, entry in entries.items() if key not in gone})

    def _take_codes(self, keys: list[int], raws: list[bytes]) -> Callable[[set[int]], None]:
        codes = {key: own_codes(read_row(raw, key)) for key, raw in zip(keys, raws, strict=True)}
        return lambda gone: self._index.check({key: found for key, found in codes.items() if key not in gone})

    def search(
        self,
        text: str = "",
        tag: str | None = None,
        state: str | None = None,
        problem: str | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Ints:
        """Return the keys, in order, of the rows that fit all that is given. On a worker thread.

        Every word of `text` must be in the prompt or an answer, whatever its case; "what is quoted" is one. `tag` is
        a tag, `state` one of `rowindex.State`, "dirty" or "clean", `problem` a code of `check.findings.KINDS` or
        "any". When `cancelled` becomes true, the answer is empty.
        """
        stopped = cancelled or (lambda: False)
        own = problem is not None and problem not in (*RELATIONS, "too_long")
        if not self.build_index(stopped, checks=own or state in ("ok", "warned")):
            return np.empty(0, np.int64)
        with self._lock:
            keys = self._sheet.keys
            keys = keys[self._index.done[keys]]
            found = self._filtered(keys, tag, state, problem)
            keys = keys[found]
        terms = terms_of(text)
        hits = self._index.with_text(keys, terms, stopped) if terms else np.ones(len(keys), np.bool_)
        return np.empty(0, np.int64) if stopped() else keys[hits]

    def _filtered(
        self, keys: Ints, tag: str | None, state: str | None, problem: str | None
    ) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        found = np.ones(len(keys), np.bool_)
        if tag is not None:
            found &= self._index.with_tag(keys, tag)
        if state in ("dirty", "clean"):
            edited = np.fromiter(self._sheet.texts, np.int64, len(self._sheet.texts))
            dirty = np.isin(keys, edited) | ~np.isin(keys, self._sheet.base_order)
            found &= dirty if state == "dirty" else ~dirty
        elif state is not None:
            found &= self._index.in_state(keys, state)
        if problem == "too_long":
            found &= np.isin(keys, self._too_long())
        elif problem == "any":
            found &= self._index.with_codes(keys, self._index.codes_in_use(keys)) | np.isin(keys, self._too_long())
        elif problem is not None:
            found &= self._index.with_codes(keys, (problem,))
        return found

    def _too_long(self) -> list[int]:
        limit = self.max_tokens
        return [] if limit is None else [key for key, count in self._tokens.items() if count > limit]

    def tags(self) -> dict[str, int]:
        """Return every tag with how many rows have it, as far as rows are indexed."""
        with self._lock:
            self._index.grow(self._sheet.next_key)
            return self._index.tags_in_use(self._sheet.keys)

    def problems(self) -> dict[str, int]:
        """Return every code with how many rows have it, as far as rows are indexed."""
        with self._lock:
            self._index.grow(self._sheet.next_key)
            keys = self._sheet.keys
            counts = self._index.codes_in_use(keys[self._index.done[keys]])
            too_long = int(np.isin(keys, self._too_long()).sum())
            return {**counts, "too_long": too_long} if too_long else counts
