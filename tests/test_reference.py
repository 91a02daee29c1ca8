"""The reference cache: equal to the live reference, computed once, and never trusted blindly."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from oracles import adapted_model, pair, random_pairs

from localdpo.data.encode import EncodedPair
from localdpo.dpo.losses import PairLogps
from localdpo.dpo.reference import ReferenceCache
from localdpo.dpo.scorer import PairScorer


class CountingScorer:
    """A live reference that notes what it was asked for; its figures tell the pair."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def reference_logps(self, pairs: Sequence[EncodedPair]) -> PairLogps:
        self.asked += [row.key for row in pairs]
        figures = [int(row.key[:4], 16) / 7 for row in pairs]
        chosen = np.array([len(row.chosen_ids) for row in pairs])
        rejected = np.array([len(row.rejected_ids) for row in pairs])
        return PairLogps(np.array(figures, np.float32), -np.array(figures, np.float32), chosen, rejected)


def cache(folder: Path, fingerprint: str = "f" * 64, device: str = "cpu") -> ReferenceCache:
    return ReferenceCache(folder, fingerprint, device)


def assert_equal(ours: PairLogps, theirs: PairLogps) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)


def rows(count: int = 5, seed: int = 0) -> list[EncodedPair]:
    return random_pairs(seed, [(4 + i, 2 + i, 3) for i in range(count)])


def test_cached_and_live_references_are_equal_to_the_last_bit(tmp_path: Path) -> None:
    pairs = rows()
    scorer = PairScorer(adapted_model("llama"), max_tokens=1)  # one pair at a time: no sums in another order
    live = scorer.reference_logps(pairs)
    assert_equal(cache(tmp_path).get(scorer, pairs), live)
    shuffled = [3, 1, 4, 0, 2, 1]
    assert_equal(cache(tmp_path).get(scorer, [pairs[i] for i in shuffled]), live.rows(shuffled))


def test_a_pair_is_computed_once(tmp_path: Path) -> None:
    pairs, scorer = rows(), CountingScorer()
    first = cache(tmp_path)
    first.get(scorer, [pairs[0], pairs[1], pairs[0]])
    assert sorted(scorer.asked) == sorted({pairs[0].key, pairs[1].key})
    scorer.asked.clear()
    wanted = CountingScorer().reference_logps(pairs)
    assert_equal(cache(tmp_path).get(scorer, pairs), wanted)
    assert sorted(scorer.asked) == sorted(row.key for row in pairs[2:])
    scorer.asked.clear()
    assert_equal(first.get(scorer, pairs), wanted)
    assert scorer.asked == []


def test_counts_are_those_of_the_pairs_asked_for(tmp_path: Path) -> None:
    logps = cache(tmp_path).get(CountingScorer(), rows(3))
    assert logps.chosen_tokens.tolist() == [2, 3, 4]
    assert logps.rejected_tokens.tolist() == [3, 3, 3]


def test_changed_ids_bases_and_devices_are_other_entries(tmp_path: Path) -> None:
    pairs, scorer = rows(1), CountingScorer()
    cache(tmp_path).get(scorer, pairs)
    edited = pair(pairs[0].prompt_ids, pairs[0].chosen_ids, [*pairs[0].rejected_ids[:-1], 88])
    for other, what in (
        (cache(tmp_path), [edited]),
        (cache(tmp_path, fingerprint="e" * 64), pairs),
        (cache(tmp_path, device="gpu"), pairs),
    ):
        scorer.asked.clear()
        other.get(scorer, what)
        assert len(scorer.asked) == 1


def test_progress_counts_what_is_computed(tmp_path: Path) -> None:
    pairs = rows(70)
    assert list(cache(tmp_path).fill(CountingScorer(), pairs[:3])) == [(0, 3), (3, 3)]
    assert list(cache(tmp_path).fill(CountingScorer(), pairs)) == [(0, 67), (32, 67), (64, 67), (67, 67)]
    assert list(cache(tmp_path).fill(CountingScorer(), pairs)) == [(0, 0)]


def test_pairs_are_looked_at_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localdpo.dpo.reference._BLOCK", 3)
    pairs, scorer = rows(7), CountingScorer()
    cache(tmp_path).get(scorer, pairs[1:2])
    asked = [pairs[i] for i in (0, 1, 2, 0, 3, 0, 4, 5, 4, 6)]
    steps = list(cache(tmp_path).fill(scorer, asked))
    assert steps[-1][0] == steps[-1][1]
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert sorted(scorer.asked) == sorted(row.key for row in pairs), "each was computed once, in whatever block"
    assert_equal(cache(tmp_path).get(scorer, asked), CountingScorer().reference_logps(asked))


def test_an_interruption_keeps_what_was_done(tmp_path: Path) -> None:
    class Interrupted(CountingScorer):
        def reference_logps(self, pairs: Sequence[EncodedPair]) -> PairLogps:
            if self.asked:
                raise KeyboardInterrupt
            return super().reference_logps(pairs)

    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path).get(Interrupted(), rows(70))
    scorer = CountingScorer()
    cache(tmp_path).get(scorer, rows(70))
    assert len(scorer.asked) == 70 - 32


def test_figures_that_are_not_finite_are_never_kept(tmp_path: Path) -> None:
    class Broken(CountingScorer):
        def reference_logps(self, pairs: Sequence[EncodedPair]) -> PairLogps:
            logps = super().reference_logps(pairs)
            return logps._replace(rejected=np.where(np.arange(len(pairs)) == 0, np.nan, logps.rejected))

    pairs, scorer = rows(3), CountingScorer()
    assert np.isnan(cache(tmp_path).get(Broken(), pairs).rejected).sum() == 1
    cache(tmp_path).get(scorer, pairs)
    assert len(scorer.asked) == 1


def test_a_damaged_cache_costs_only_time(tmp_path: Path) -> None:
    pairs, scorer = rows(), CountingScorer()
    damaged = cache(tmp_path)
    damaged.get(scorer, pairs)
    damaged.path.write_bytes(b"this is no database" * 200)
    scorer.asked.clear()
    assert_equal(damaged.get(scorer, pairs), CountingScorer().reference_logps(pairs))
    assert len(scorer.asked) == len(pairs)
    scorer.asked.clear()
    cache(tmp_path).get(scorer, pairs)
    assert scorer.asked == []


def test_a_folder_that_cannot_be_made_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    pairs, scorer = rows(), CountingScorer()
    for _ in range(2):
        assert_equal(cache(tmp_path / "file" / "logps").get(scorer, pairs), CountingScorer().reference_logps(pairs))
    assert len(scorer.asked) == 2 * len(pairs)


def test_a_database_that_is_busy_or_has_another_table_costs_only_time(tmp_path: Path) -> None:
    other = cache(tmp_path)
    with sqlite3.connect(other.path) as database:
        database.execute("CREATE TABLE logps (something INTEGER)")
    database.close()
    pairs = rows()
    assert_equal(other.get(CountingScorer(), pairs), CountingScorer().reference_logps(pairs))


def test_many_keys_are_looked_up_in_parts(tmp_path: Path) -> None:
    pairs = random_pairs(1, [(3, 1, 2)] * 1200)
    first = cache(tmp_path).get(CountingScorer(), pairs)
    scorer = CountingScorer()
    assert_equal(cache(tmp_path).get(scorer, pairs), first)
    assert scorer.asked == []


def test_no_pairs(tmp_path: Path) -> None:
    logps = cache(tmp_path).get(CountingScorer(), [])
    assert [len(column) for column in logps] == [0, 0, 0, 0]
