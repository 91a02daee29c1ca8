"""The frozen trunk runs once: hidden states below the lowest adapted layer, kept on disk.

With adapters in the top layers only, what enters the lowest of them never changes, so the reference, the policy,
evaluation and every epoch can start there. One file holds the states of all sequences of one base and one cut, one
float32 row a token, and is memory-mapped; an index names each part's place and checksum. A sequence has two parts, its
prompt, kept once however many completions it has, and its completion.

The cache is bounded: files of other bases and cuts are deleted, oldest first, to stay under the limit, and parts
that still don't fit are simply computed again. It knows nothing about models.
"""

from __future__ import annotations

import shutil
import sqlite3
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
from filelock import FileLock

from localdpo.dpo.packing import PackedBatch
from localdpo.sequences import TokenSequence

DEFAULT_LIMIT = 8 << 30
_FREE_SHARE = 0.25
"""Of the disk's free space, the most that the whole cache may take."""
_SCHEMA = "CREATE TABLE IF NOT EXISTS states (key TEXT PRIMARY KEY, start INTEGER, rows INTEGER, crc INTEGER)"


def parts_of(sequence: TokenSequence) -> tuple[tuple[str, slice], tuple[str, slice]]:
    """Key and tokens of each part of a sequence's ``inputs``: the prompt, and the completion without its last token."""
    prompt = len(sequence.prompt_ids)
    return (sequence.prompt_key, slice(0, prompt)), (sequence.key, slice(prompt, None))


def gather(batch: PackedBatch, sequences: Sequence[TokenSequence], states: Mapping[str, np.ndarray]) -> np.ndarray:
    """States of a packed batch, float32 [T, D], from those of its sequences' parts, each [tokens, D], by key."""
    width = next(iter(states.values())).shape[1]
    out = np.empty((len(batch.tokens), width), np.float32)
    for sequence, path in zip(sequences, batch.paths, strict=True):
        for key, tokens in parts_of(sequence):
            out[path[tokens]] = states[key]
    return out


def scatter(batch: PackedBatch, sequences: Sequence[TokenSequence], states: np.ndarray) -> dict[str, np.ndarray]:
    """The inverse of :func:`gather`: each part's states out of the packed batch's."""
    return {
        key: states[path[tokens]]
        for sequence, path in zip(sequences, batch.paths, strict=True)
        for key, tokens in parts_of(sequence)
    }


class TrunkCache:
    """Hidden states at one cut of one base, by the keys of :func:`parts_of`."""

    def __init__(self, folder: Path, name: str, width: int, limit: int = DEFAULT_LIMIT) -> None:
        """``folder`` holds every trunk cache, ``name`` says base, cut and device; ``limit`` bounds all in bytes."""
        self.folder = folder / name
        self.width = width
        self._data = self.folder / "states.f32"
        self._index = self.folder / "index.sqlite"
        self._places: dict[str, tuple[int, int, int]] = {}
        self._map: np.ndarray | None = None
        self._one_thread = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            self.limit = min(limit, int(_FREE_SHARE * (free + _size(folder))))
            _make_room(folder, self.folder, self.limit)
            self._load_index()
        except (OSError, sqlite3.Error):
            self.limit = 0  # unusable: nothing is found and nothing is kept

    @property
    def nbytes(self) -> int:
        """Bytes that this cut's states take on disk."""
        return self._data.stat().st_size if self._data.exists() else 0

    def get(self, key: str) -> np.ndarray | None:
        """A part's states, float32 [tokens, D], or None when they are not there or damaged."""
        place = self._places.get(key)
        if place is None:
            return None
        start, rows, crc = place
        states = self._rows(start, rows)
        if states is None or zlib.crc32(states.tobytes()) != crc:
            self._places.pop(key, None)
            return None
        return states

    def put(self, states: Mapping[str, np.ndarray]) -> None:
        """Keep parts' states [tokens, D] float32. Without room, or on a fault of the disk, nothing is kept."""
        added = sum(state.nbytes for state in states.values())
        try:
            if self.nbytes + added > self.limit:
                return
            with self._one_thread, FileLock(self.folder / "lock"):
                places = self._append(states)
            self._places |= places
        except (OSError, sqlite3.Error):
            self.limit = 0

    def _append(self, states: Mapping[str, np.ndarray]) -> dict[str, tuple[int, int, int]]:
        places = {}
        with self._data.open("ab") as file:
            # A torn earlier write leaves part of a row: start on the next whole one.
            row = 4 * self.width
            file.write(b"\0" * (-file.tell() % row))
            for key, state in states.items():
                data = np.ascontiguousarray(state, np.float32).tobytes()
                places[key] = (file.tell() // row, len(state), zlib.crc32(data))
                file.write(data)
        with self._open() as index:
            index.execute(_SCHEMA)
            index.executemany(
                "INSERT OR REPLACE INTO states VALUES (?, ?, ?, ?)", [(key, *place) for key, place in places.items()]
            )
        return places

    def _rows(self, start: int, rows: int) -> np.ndarray | None:
        if self._map is None or len(self._map) < start + rows:
            try:
                whole = self.nbytes // (4 * self.width)
                self._map = np.memmap(self._data, np.float32, "r", shape=(whole, self.width)) if whole else None
            except (OSError, ValueError):
                return None
        if self._map is None or len(self._map) < start + rows:
            return None
        return self._map[start : start + rows]

    def _load_index(self) -> None:
        if not self._index.exists():
            return
        try:
            with self._open() as index:
                found = index.execute("SELECT key, start, rows, crc FROM states").fetchall()
        except sqlite3.OperationalError:
            return
        except sqlite3.DatabaseError:  # damaged: start afresh
            with suppress(OSError):
                self._index.unlink()
                self._data.unlink()
            return
        self._places = {key: (start, rows, crc) for key, start, rows, crc in found}

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._index, timeout=10.0)) as index, index:
            yield index


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _make_room(folder: Path, keep: Path, limit: int) -> None:
    """Delete other caches, least recently written first, until all fit under ``limit``."""
    others = sorted(
        (path for path in folder.iterdir() if path.is_dir() and path != keep), key=lambda path: path.stat().st_mtime
    )
    total = _size(folder)
    for path in others:
        if total <= limit:
            return
        total -= _size(path)
        shutil.rmtree(path, ignore_errors=True)
