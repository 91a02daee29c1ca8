"""Seeded epochs: every row exactly once, the same for the same seed, kinds spread evenly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localdpo.data.order import Position, RowOrder, epoch_order


def _epoch(order: RowOrder, epoch: int) -> list[int]:
    return [int(r) for w in range(order.steps_per_epoch) for r in order.rows(Position(epoch, w))]


@given(rows=st.integers(1, 90), window=st.integers(1, 100), seed=st.integers(0, 2**32), mixed=st.booleans())
def test_each_row_comes_exactly_once_an_epoch(rows, window, seed, mixed):
    strata = ["retain" if row % 3 == 0 else "preference" for row in range(rows)] if mixed else None
    order = RowOrder(rows, window, seed=seed, strata=strata)
    for epoch in range(3):
        assert sorted(_epoch(order, epoch)) == list(range(rows))


def test_order_depends_on_seed_and_epoch_alone():
    first = epoch_order(50, seed=1, epoch=0)
    assert np.array_equal(first, epoch_order(50, seed=1, epoch=0))
    assert not np.array_equal(first, epoch_order(50, seed=2, epoch=0))
    assert not np.array_equal(first, epoch_order(50, seed=1, epoch=1))


def test_order_is_a_known_one():
    # Pinned, so that an interrupted run goes on in the same order after an upgrade.
    assert epoch_order(8, seed=0, epoch=0).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]


def test_last_window_is_partial_and_fewer_rows_than_a_window_shrink():
    assert [len(RowOrder(10, 4, seed=0).rows(Position(0, w))) for w in range(3)] == [4, 4, 2]
    small = RowOrder(3, 8, seed=0)
    assert small.steps_per_epoch == 1
    assert sorted(small.rows(Position(5, 0))) == [0, 1, 2]


def test_positions_walk_through_epochs():
    order = RowOrder(10, 4, seed=0)
    position, seen = Position(), []
    for _ in range(5):
        seen.append((position.epoch, position.window))
        position = order.after(position)
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert [order.epochs_done(Position(*at)) for at in [(0, 0), (0, 1), (1, 0), (1, 2)]] == [0, 0.4, 1, 1.8]


def test_rows_read_out_of_turn_are_the_same():
    order = RowOrder(10, 4, seed=3)
    late = order.rows(Position(2, 1)).copy()
    order.rows(Position(0, 0))
    assert np.array_equal(order.rows(Position(2, 1)), late)


@given(seed=st.integers(0, 1000))
def test_strata_are_spread_evenly(seed):
    strata = ["preference"] * 48 + ["retain"] * 40
    order = RowOrder(88, 8, seed=seed, strata=strata)
    for window in range(order.steps_per_epoch):
        retained = sum(strata[row] == "retain" for row in order.rows(Position(0, window)))
        assert 2 <= retained <= 5  # 8 * 40/88 = 3.6


def test_strata_must_match_rows():
    with pytest.raises(ValueError, match="2 labels for 3 rows"):
        epoch_order(3, seed=0, epoch=0, strata=["a", "b"])


@pytest.mark.parametrize(("rows", "window"), [(0, 4), (4, 0)])
def test_empty_is_refused(rows, window):
    with pytest.raises(ValueError, match="at least one"):
        RowOrder(rows, window, seed=0)
