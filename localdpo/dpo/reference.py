"""Reference log-probs: computed once a pair with the adapters off, and kept on disk.

A pair's key is the hash of its token ids, so template, truncation and text are all in it; the database is named by
the base's fingerprint and by what computed it. A cache that is damaged or cannot be written only costs time.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import numpy as np

from localdpo.data.encode import EncodedPair
from localdpo.dpo.losses import PairLogps
from localdpo.steps import result_of

_BLOCK = 4096  # pairs looked at together: those with equal prompts are found among them, and memory holds no more
_CHUNK = 32  # pairs between two commits: what an interruption can cost
_LOOKUP = 500  # SQLite's oldest limit on parameters is 999
_BUSY_SECONDS = 10.0
_SCHEMA = "CREATE TABLE IF NOT EXISTS logps (key TEXT PRIMARY KEY, chosen REAL NOT NULL, rejected REAL NOT NULL)"


class ScoresReference(Protocol):
    """Whoever computes reference log-probs: a scorer, its adapters off, or one with another reference."""

    def reference_logps(self, pairs: Sequence[EncodedPair]) -> PairLogps:
        """Summed log-probs of the pairs under the reference."""
        ...


class ReferenceCache:
    """Summed reference log-probs by pair key, for one base on one kind of device."""

    def __init__(self, folder: Path, fingerprint: str, device: str) -> None:
        """``device`` ("cpu", "gpu") keeps half-precision numbers apart from float32 ones."""
        self.path = folder / f"{fingerprint[:32]}-{device}.sqlite"

    def get(self, scorer: ScoresReference, pairs: Sequence[EncodedPair]) -> PairLogps:
        """Reference log-probs of ``pairs``, in their order; what is missing is computed and stored."""
        return result_of(self.fill(scorer, pairs))

    def fill(
        self, scorer: ScoresReference, pairs: Sequence[EncodedPair]
    ) -> Generator[tuple[int, int], None, PairLogps]:
        """Like :meth:`get`, yielding (done, total) distinct pairs computed now, before the first and after each chunk.

        What was computed is stored before each yield: left there, it is not computed again.
        """
        sums = np.empty((len(pairs), 2), np.float32)
        lengths = np.empty((len(pairs), 2), np.int64)
        wanted: dict[int, set[str]] = {}
        for start in range(0, len(pairs), _BLOCK):
            block = pairs[start : start + _BLOCK]
            known = self.lookup({pair.key for pair in block})
            for row, pair in enumerate(block, start):
                lengths[row] = len(pair.chosen_ids), len(pair.rejected_ids)
                if pair.key in known:
                    sums[row] = known[pair.key]
                else:
                    wanted.setdefault(start, set()).add(pair.key)
        total, done = sum(map(len, wanted.values())), 0
        yield 0, total
        for start, missing in wanted.items():
            block = pairs[start : start + _BLOCK]
            known = self.lookup(missing) if done else {}  # an earlier block may have had them
            if known:
                done += len(known)
                yield done, total
            rest = list({pair.key: pair for pair in block if pair.key in missing and pair.key not in known}.values())
            rest.sort(key=lambda pair: pair.prompt_ids.tolist())  # equal prompts side by side are run once
            for first in range(0, len(rest), _CHUNK):
                found = self._score(scorer, rest[first : first + _CHUNK])
                known |= found
                done += len(found)
                yield done, total
            for row, pair in enumerate(block, start):
                if pair.key in missing:
                    sums[row] = known[pair.key]
        return PairLogps(sums[:, 0], sums[:, 1], lengths[:, 0], lengths[:, 1])

    def _score(self, scorer: ScoresReference, pairs: Sequence[EncodedPair]) -> dict[str, tuple[float, float]]:
        """Compute the sums of distinct pairs, and keep them."""
        logps = scorer.reference_logps(pairs)
        found = {
            pair.key: (float(chosen), float(rejected))
            for pair, chosen, rejected in zip(pairs, logps.chosen, logps.rejected, strict=True)
        }
        self._store(found)
        return found

    def lookup(self, keys: set[str]) -> dict[str, tuple[float, float]]:
        """The stored (chosen, rejected) sums among ``keys``."""
        found: dict[str, tuple[float, float]] = {}
        if not self.path.exists():
            return found
        wanted = sorted(keys)
        try:
            with self._open() as database:
                for start in range(0, len(wanted), _LOOKUP):
                    some = wanted[start : start + _LOOKUP]
                    marks = ",".join("?" * len(some))
                    rows = database.execute(f"SELECT key, chosen, rejected FROM logps WHERE key IN ({marks})", some)
                    found |= {key: (chosen, rejected) for key, chosen, rejected in rows}
        except sqlite3.OperationalError:
            return {}
        except sqlite3.DatabaseError:
            self._discard()
            return {}
        return {key: sums for key, sums in found.items() if all(map(np.isfinite, sums))}

    def _store(self, found: dict[str, tuple[float, float]]) -> None:
        rows = [(key, *sums) for key, sums in found.items() if all(map(np.isfinite, sums))]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as database:
                database.execute(_SCHEMA)
                database.executemany("INSERT OR REPLACE INTO logps VALUES (?, ?, ?)", rows)
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
