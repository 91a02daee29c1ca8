"""The reference cache: equal to the live reference, computed once, and never trusted blindly."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from oracles import adapted_model, pair, random_pairs

from localdpo.core.reference import ReferenceCache
from localdpo.dpo.scorer import FastScorer
from localdpo.sequences import EncodedRow, TokenSequence, sequences_of


class CountingScorer:
    """A live reference that notes what it was asked for; its figures tell the sequence."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def reference_logps(self, sequences: Sequence[TokenSequence]) -> np.ndarray:
        keys = [sequence.key for sequence in sequences]
        self.asked += keys
        return np.array([-int(key[:4], 16) / 7 for key in keys], np.float32)


def wanted(pairs: Sequence[EncodedRow]) -> np.ndarray:
    return CountingScorer().reference_logps(sequences_of(pairs))


def keys(pairs: Sequence[EncodedRow]) -> list[str]:
    return sorted({sequence.key for sequence in sequences_of(pairs)})


def cache(folder: Path, fingerprint: str = "f" * 64, device: str = "cpu") -> ReferenceCache:
    return ReferenceCache(folder, fingerprint, device)


def rows(count: int = 5, seed: int = 0) -> list[EncodedRow]:
    return random_pairs(seed, [(4 + i, 2 + i, 3) for i in range(count)])


def test_cached_and_live_references_are_equal_to_the_last_bit(tmp_path: Path) -> None:
    pairs = rows()
    scorer = FastScorer(adapted_model("llama"), max_tokens=1)  # one at a time: no sums in another order
    live = scorer.reference_logps(sequences_of(pairs))
    np.testing.assert_array_equal(cache(tmp_path).get(scorer, pairs), live)
    shuffled = [3, 1, 4, 0, 2, 1]
    again = cache(tmp_path).get(scorer, [pairs[i] for i in shuffled])
    np.testing.assert_array_equal(again.reshape(-1, 2), live.reshape(-1, 2)[shuffled])


def test_a_sequence_is_computed_once_in_whatever_rows_it_stands(tmp_path: Path) -> None:
    pairs, scorer = rows(), CountingScorer()
    first = cache(tmp_path)
    first.get(scorer, [pairs[0], pairs[1], pairs[0]])
    assert sorted(scorer.asked) == keys(pairs[:2])
    scorer.asked.clear()
    np.testing.assert_array_equal(cache(tmp_path).get(scorer, pairs), wanted(pairs))
    assert sorted(scorer.asked) == keys(pairs[2:])
    scorer.asked.clear()
    alone = [EncodedRow((sequence,)) for sequence in sequences_of(pairs)]
    np.testing.assert_array_equal(first.get(scorer, alone), wanted(pairs))
    assert scorer.asked == []


def test_changed_ids_bases_and_devices_are_other_entries(tmp_path: Path) -> None:
    pairs, scorer = rows(1), CountingScorer()
    cache(tmp_path).get(scorer, pairs)
    edited = pair(pairs[0].prompt_ids, pairs[0].chosen_ids, [*pairs[0].rejected_ids[:-1], 88])
    for other, what, computed in (
        (cache(tmp_path), [edited], 1),  # its chosen answer is known
        (cache(tmp_path, fingerprint="e" * 64), pairs, 2),
        (cache(tmp_path, device="gpu"), pairs, 2),
    ):
        scorer.asked.clear()
        other.get(scorer, what)
        assert len(scorer.asked) == computed


def test_progress_counts_what_is_computed(tmp_path: Path) -> None:
    pairs = rows(70)
    assert list(cache(tmp_path).fill(CountingScorer(), pairs[:3])) == [(0, 6), (6, 6)]
    assert list(cache(tmp_path).fill(CountingScorer(), pairs)) == [(0, 134), (64, 134), (128, 134), (134, 134)]
    assert list(cache(tmp_path).fill(CountingScorer(), pairs)) == [(0, 0)]


def test_pairs_are_looked_at_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localdpo.core.reference._BLOCK", 3)
    pairs, scorer = rows(7), CountingScorer()
    cache(tmp_path).get(scorer, pairs[1:2])
    asked = [pairs[i] for i in (0, 1, 2, 0, 3, 0, 4, 5, 4, 6)]
    steps = list(cache(tmp_path).fill(scorer, asked))
    assert steps[-1][0] == steps[-1][1]
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert sorted(scorer.asked) == keys(pairs), "each was computed once, in whatever block"
    np.testing.assert_array_equal(cache(tmp_path).get(scorer, asked), wanted(asked))


def test_an_interruption_keeps_what_was_done(tmp_path: Path) -> None:
    class Interrupted(CountingScorer):
        def reference_logps(self, sequences: Sequence[TokenSequence]) -> np.ndarray:
            if self.asked:
                raise KeyboardInterrupt
            return super().reference_logps(sequences)

    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path).get(Interrupted(), rows(70))
    scorer = CountingScorer()
    cache(tmp_path).get(scorer, rows(70))
    assert len(scorer.asked) == 140 - 64


def test_figures_that_are_not_finite_are_never_kept(tmp_path: Path) -> None:
    class Broken(CountingScorer):
        def reference_logps(self, sequences: Sequence[TokenSequence]) -> np.ndarray:
            logps = super().reference_logps(sequences)
            return np.where(np.arange(len(logps)) == 1, np.nan, logps)

    pairs, scorer = rows(3), CountingScorer()
    assert np.isnan(cache(tmp_path).get(Broken(), pairs)).sum() == 1
    cache(tmp_path).get(scorer, pairs)
    assert len(scorer.asked) == 1


def test_a_damaged_cache_costs_only_time(tmp_path: Path) -> None:
    pairs, scorer = rows(), CountingScorer()
    damaged = cache(tmp_path)
    damaged.get(scorer, pairs)
    damaged.path.write_bytes(b"this is no database" * 200)
    scorer.asked.clear()
    np.testing.assert_array_equal(damaged.get(scorer, pairs), wanted(pairs))
    assert len(scorer.asked) == 2 * len(pairs)
    scorer.asked.clear()
    cache(tmp_path).get(scorer, pairs)
    assert scorer.asked == []


def test_a_folder_that_cannot_be_made_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    pairs, scorer = rows(), CountingScorer()
    for _ in range(2):
        np.testing.assert_array_equal(cache(tmp_path / "file" / "logps").get(scorer, pairs), wanted(pairs))
    assert len(scorer.asked) == 4 * len(pairs)


def test_a_database_that_is_busy_or_has_another_table_costs_only_time(tmp_path: Path) -> None:
    other = cache(tmp_path)
    with sqlite3.connect(other.path) as database:
        database.execute("CREATE TABLE sequences (something INTEGER)")
    database.close()
    pairs = rows()
    np.testing.assert_array_equal(other.get(CountingScorer(), pairs), wanted(pairs))


def test_many_keys_are_looked_up_in_parts(tmp_path: Path) -> None:
    pairs = random_pairs(1, [(3, 1, 2)] * 1200)
    first = cache(tmp_path).get(CountingScorer(), pairs)
    scorer = CountingScorer()
    np.testing.assert_array_equal(cache(tmp_path).get(scorer, pairs), first)
    assert scorer.asked == []


def test_a_cache_of_an_earlier_version_costs_only_time(tmp_path: Path) -> None:
    pairs, scorer = rows(2), CountingScorer()
    with sqlite3.connect(cache(tmp_path).path) as database:
        database.execute("CREATE TABLE logps (key TEXT PRIMARY KEY, chosen REAL NOT NULL, rejected REAL NOT NULL)")
        database.executemany("INSERT INTO logps VALUES (?, 1.0, 2.0)", [(key,) for key in keys(pairs)])
    database.close()
    for _ in range(2):
        np.testing.assert_array_equal(cache(tmp_path).get(scorer, pairs), wanted(pairs))
    assert sorted(scorer.asked) == keys(pairs)


def test_no_rows(tmp_path: Path) -> None:
    assert cache(tmp_path).get(CountingScorer(), []).shape == (0,)
