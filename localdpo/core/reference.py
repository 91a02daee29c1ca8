"""Reference log-probs: computed once a sequence with the adapters off, and kept on disk.

A sequence's key is the hash of its token ids, so template, truncation and text are all in it; the database is named by
the base's fingerprint and by what computed it. A cache that is damaged or cannot be written only costs time.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import numpy as np

from localdpo.sequences import EncodedRow, TokenSequence, sequences_of
from localdpo.steps import result_of

_BLOCK = 4096  # rows looked at together: those with equal prompts are found among them, and memory holds no more
_CHUNK = 64  # sequences between two commits: what an interruption can cost
_LOOKUP = 500  # SQLite's oldest limit on parameters is 999
_BUSY_SECONDS = 10.0
_SCHEMA = "CREATE TABLE IF NOT EXISTS sequences (key TEXT PRIMARY KEY, logp REAL NOT NULL)"


class ScoresReference(Protocol):
    """Whoever computes reference log-probs: a scorer, its adapters off, or one with another reference."""

    def reference_logps(self, sequences: Sequence[TokenSequence]) -> np.ndarray:
        """Summed log-probs of S completions under the reference, float32 [S]."""
        ...


class ReferenceCache:
    """Summed reference log-probs by sequence key, for one base on one kind of device."""

    def __init__(self, folder: Path, fingerprint: str, device: str) -> None:
        """``device`` ("cpu", "gpu") keeps half-precision numbers apart from float32 ones."""
        self.path = folder / f"{fingerprint[:32]}-{device}.sqlite"

    def get(self, scorer: ScoresReference, rows: Sequence[EncodedRow]) -> np.ndarray:
        """Reference log-probs of the sequences of ``rows``, one row after the other, float32 [S].

        What is missing is computed and stored.
        """
        return result_of(self.fill(scorer, rows))

    def fill(self, scorer: ScoresReference, rows: Sequence[EncodedRow]) -> Generator[tuple[int, int], None, np.ndarray]:
        """Like :meth:`get`, yielding (done, total) distinct sequences computed now, at first and after each chunk.

        What was computed is stored before each yield: left there, it is not computed again.
        """
        blocks: list[np.ndarray] = []
        wanted: dict[int, set[str]] = {}
        for number, start in enumerate(range(0, len(rows), _BLOCK)):
            keys = [sequence.key for sequence in sequences_of(rows[start : start + _BLOCK])]
            known = self.lookup(set(keys))
            blocks.append(np.array([known.get(key, np.nan) for key in keys], np.float32))
            if missing := {key for key in keys if key not in known}:
                wanted[number] = missing
        total, done = sum(map(len, wanted.values())), 0
        yield 0, total
        for number, missing in wanted.items():
            block = sequences_of(rows[number * _BLOCK : (number + 1) * _BLOCK])
            keys = [sequence.key for sequence in block]
            known = self.lookup(missing) if done else {}  # an earlier block may have had them
            if known:
                done += len(known)
                yield done, total
            rest = {key: one for key, one in zip(keys, block, strict=True) if key in missing and key not in known}
            # Equal prompts side by side are run once.
            order = sorted(rest, key=lambda key: rest[key].prompt_ids.tolist())
            for first in range(0, len(order), _CHUNK):
                chunk = order[first : first + _CHUNK]
                logps = scorer.reference_logps([rest[key] for key in chunk])
                found = dict(zip(chunk, logps.tolist(), strict=True))
                self._store(found)
                known |= found
                done += len(found)
                yield done, total
            for place, key in enumerate(keys):
                if key in missing:
                    blocks[number][place] = known[key]
        return np.concatenate(blocks) if blocks else np.empty(0, np.float32)

    def lookup(self, keys: set[str]) -> dict[str, float]:
        """The stored sums among ``keys``."""
        found: dict[str, float] = {}
        if not self.path.exists():
            return found
        wanted = sorted(keys)
        try:
            with self._open() as database:
                for start in range(0, len(wanted), _LOOKUP):
                    some = wanted[start : start + _LOOKUP]
                    marks = ",".join("?" * len(some))
                    found |= dict(database.execute(f"SELECT key, logp FROM sequences WHERE key IN ({marks})", some))
        except sqlite3.OperationalError:
            return {}
        except sqlite3.DatabaseError:
            self._discard()
            return {}
        return {key: logp for key, logp in found.items() if np.isfinite(logp)}

    def _store(self, found: Mapping[str, float]) -> None:
        rows = [(key, logp) for key, logp in found.items() if np.isfinite(logp)]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as database:
                database.execute(_SCHEMA)
                database.executemany("INSERT OR REPLACE INTO sequences VALUES (?, ?)", rows)
        except sqlite3.OperationalError:
            pass  # busy, read-only or full: the next run computes these again
        except sqlite3.DatabaseError:
            self._discard()
        except OSError:
            pass

    def _discard(self) -> None:
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=_BUSY_SECONDS)) as database, database:
            yield database
