"""Packed batches: toy trees by hand, and for any pairs that each prediction reads exactly its own sequence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import pair

from localdpo.dpo import packing
from localdpo.dpo.packing import MIN_SHARED, PackedBatch, Segment
from localdpo.sequences import EncodedRow, sequences_of


def pack(rows: Sequence[EncodedRow], **options: Any) -> PackedBatch:
    return packing.pack(sequences_of(rows), **options)


def spans(batch: PackedBatch) -> list[tuple[int, int, tuple[tuple[int, int], ...]]]:
    return [(segment.start, segment.stop, segment.ancestors) for segment in batch.segments]


def predictions(batch: PackedBatch, completion: int) -> list[tuple[int, int]]:
    return [(int(batch.rows[n]), int(batch.targets[n])) for n in batch.members[completion]]


def path(batch: PackedBatch, token: int) -> list[int]:
    """Indices of everything the token may attend to, itself last: the walk through its segment's ancestors."""
    segment = next(s for s in batch.segments if s.start <= token < s.stop)
    before = [index for start, stop in segment.ancestors for index in range(start, stop)]
    return [*before, *range(segment.start, token + 1)]


def test_one_pair_by_hand() -> None:
    batch = pack([pair([1, 2], [3, 4, 9], [5, 9])], min_shared=1)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2]
    assert spans(batch) == [(0, 2, ()), (2, 4, ((0, 2),)), (4, 5, ((0, 2),))]
    assert predictions(batch, 0) == [(1, 3), (2, 4), (3, 9)]
    assert predictions(batch, 1) == [(1, 5), (4, 9)]
    assert batch.rows.tolist() == [1, 1, 2, 3, 4]
    assert [members.tolist() for members in batch.members] == [[0, 2, 3], [1, 4]]


def test_attention_of_one_pair_by_hand() -> None:
    batch = pack([pair([1, 2], [3, 4, 9], [5, 9])], min_shared=1)
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert batch.attention_mask().astype(int).tolist() == expected
    # Within a window of 2 positions a token sees itself and the one before it.
    near = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]
    assert batch.attention_mask(window=2).astype(int).tolist() == near


def test_a_common_opening_is_shared_by_different_prompts() -> None:
    # Sequences 1 2 | 3 | 5, 1 2 | 3 | 6, 1 2 | 4 | 7, 1 2 | 4: the tree has two levels.
    batch = pack([pair([1, 2, 3], [5, 9], [6, 9]), pair([1, 2, 4], [7, 9], [8])], min_shared=1)
    assert batch.tokens.tolist() == [1, 2, 3, 5, 6, 4, 7]
    assert spans(batch) == [
        (0, 2, ()),
        (2, 3, ((0, 2),)),
        (3, 4, ((0, 3),)),
        (4, 5, ((0, 3),)),
        (5, 6, ((0, 2),)),
        (6, 7, ((0, 2), (5, 6))),
    ]
    assert predictions(batch, 2) == [(5, 7), (6, 9)]
    assert predictions(batch, 3) == [(5, 8)]


def test_a_prediction_both_answers_make_is_made_once() -> None:
    # Both answers begin with 5: one row predicts it, and both sums hold it.
    batch = pack([pair([1], [5, 6, 9], [5, 7, 9])], min_shared=1)
    assert batch.tokens.tolist() == [1, 5, 6, 7]
    assert len(batch.rows) == 5
    assert set(batch.members[0]) & set(batch.members[1]) == {0}
    assert [len(set(members.tolist())) for members in batch.members] == [3, 3]


def test_short_prefixes_are_run_again() -> None:
    prompt = list(range(10, 10 + MIN_SHARED - 1))
    rows = [pair(prompt, [1, 2], [3, 4])]
    assert len(pack(rows).tokens) == 2 * (MIN_SHARED - 1) + 2
    assert len(pack(rows, min_shared=1).tokens) == MIN_SHARED - 1 + 2
    rows = [pair([*prompt, 40], [1, 2], [3, 4])]
    assert len(pack(rows).tokens) == MIN_SHARED + 2


def test_what_a_branch_adds_must_be_long_enough_too() -> None:
    # Ten tokens are common to all four; the two more that each prompt has are not worth a segment.
    opening = list(range(20, 30))
    batch = pack([pair([*opening, 1, 2], [3, 4], [5, 6]), pair([*opening, 7, 8], [3, 4], [5, 6])])
    assert len(batch.tokens) == 10 + 4 * (2 + 1)
    assert [s.ancestors for s in batch.segments] == [(), *[((0, 10),)] * 4]


def test_a_short_prefix_does_not_hide_a_longer_one_below_it() -> None:
    # All four share two tokens, which is too little; each pair shares a whole prompt, which is not.
    prompts = [[1, 2, *range(20, 30)], [1, 2, *range(40, 50)]]
    batch = pack([pair(prompt, [3, 4], [5, 6]) for prompt in prompts])
    assert len(batch.tokens) == 2 * 12 + 4
    assert [s.ancestors for s in batch.segments if s.context == 0] == [(), ()]


def test_every_copy_is_kept_without_sharing() -> None:
    rows = [pair([1, 2, 3], [4, 5], [6]), pair([1, 2, 3], [4, 5], [6])]
    batch = pack(rows, share=False)
    assert all(segment.ancestors == () for segment in batch.segments)
    assert sorted(s.stop - s.start for s in batch.segments) == [3, 3, 4, 4]
    assert len(batch.rows) == 6


def test_context_counts_ancestor_tokens() -> None:
    assert Segment(9, 12, ((0, 4), (6, 9))).context == 7


def test_a_sequence_lacks_its_last_token() -> None:
    row = pair([1, 2], [3, 4, 9], [9])
    assert [sequence.inputs.tolist() for sequence in row.sequences] == [[1, 2, 3, 4], [1, 2]]


ids = st.integers(0, 2)  # three ids collide all the time


@st.composite
def batches(draw: st.DrawFn) -> list[EncodedRow]:
    """Pairs with equal prompts, prompts that continue one another, equal and one-token answers, long openings."""
    opening = draw(st.lists(ids, max_size=12))
    prompts = draw(st.lists(st.lists(ids, min_size=1, max_size=6), min_size=1, max_size=3))
    prompts += [[*opening, *prompt] for prompt in prompts]
    answer = st.lists(ids, min_size=1, max_size=5)
    answers = draw(st.lists(answer, min_size=1, max_size=3))
    row = st.tuples(st.sampled_from(prompts), st.sampled_from(answers) | answer, st.sampled_from(answers) | answer)
    return [pair(*parts) for parts in draw(st.lists(row, min_size=1, max_size=5))]


@settings(max_examples=120, derandomize=True, deadline=None)
@given(rows=batches(), min_shared=st.sampled_from([1, 3, MIN_SHARED]), share=st.booleans())
def test_every_prediction_reads_its_own_sequence(rows: list[EncodedRow], min_shared: int, share: bool) -> None:
    batch = pack(rows, share=share, min_shared=min_shared)
    completions = [(row.prompt_ids, ids) for row in rows for ids in (row.chosen_ids, row.rejected_ids)]
    for completion, (prompt, answer) in enumerate(completions):
        whole = [*prompt.tolist(), *answer.tolist()]
        made = predictions(batch, completion)
        assert len(made) == len(answer)
        for k, (row, target) in enumerate(made):
            read = path(batch, row)
            assert batch.tokens[read].tolist() == whole[: len(prompt) + k]
            assert batch.positions[read].tolist() == list(range(len(prompt) + k))
            assert target == whole[len(prompt) + k]
    assert [len(set(members.tolist())) for members in batch.members] == [len(answer) for _, answer in completions]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(rows=batches(), min_shared=st.sampled_from([1, 3, MIN_SHARED]), window=st.sampled_from([None, 1, 3, 40]))
def test_mask_paths_and_segments_agree(rows: list[EncodedRow], min_shared: int, window: int | None) -> None:
    batch = pack(rows, min_shared=min_shared)
    size = len(batch.tokens)
    assert [index for s in batch.segments for index in range(s.start, s.stop)] == list(range(size))
    sequences = [sequence.inputs for sequence in sequences_of(rows)]
    mask = batch.attention_mask(window)
    for token in range(size):
        read = path(batch, token)
        seen = read if window is None else read[-window:]
        assert np.flatnonzero(mask[token]).tolist() == sorted(seen)
        owner = next(i for i, places in enumerate(batch.paths) if token in places)
        assert batch.tokens[read].tolist() == sequences[owner][: batch.positions[token] + 1].tolist()
    for places, sequence in zip(batch.paths, sequences, strict=True):
        assert batch.tokens[places].tolist() == sequence.tolist()
        assert path(batch, int(places[-1])) == places.tolist()
    # Nothing is run that no completion needs, and sharing never costs a token.
    needed = {index for row in batch.rows for index in path(batch, int(row))}
    assert needed == set(range(size))
    assert size <= sum(map(len, sequences))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(rows=batches())
def test_with_no_minimum_every_prefix_is_run_once(rows: list[EncodedRow]) -> None:
    batch = pack(rows, min_shared=1)
    prefixes = {
        tuple(sequence[: end + 1].tolist())
        for sequence in (sequence.inputs for sequence in sequences_of(rows))
        for end in range(len(sequence))
    }
    assert len(batch.tokens) == len(prefixes)
    assert len(set(zip(batch.rows.tolist(), batch.targets.tolist(), strict=True))) == len(batch.rows)


@pytest.mark.parametrize("field", ["tokens", "positions", "rows", "targets"])
def test_arrays_are_int32(field: str) -> None:
    assert getattr(pack([pair([1, 2], [3], [4, 5])]), field).dtype == np.int32


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    rows=batches(),
    call_cost=st.sampled_from([0, 10, 100, 10**6]),
    window=st.sampled_from([None, 3]),
    lanes=st.sampled_from([1, 2, 3]),
)
def test_blocks_cover_every_token_once_and_see_what_segments_see(
    rows: list[EncodedRow], call_cost: int, window: int | None, lanes: int
) -> None:
    whole = pack(rows, min_shared=3).attention_mask(window)
    batch = pack(rows, min_shared=3).in_lanes(lanes, 0.5)
    np.testing.assert_array_equal(batch.attention_mask(window), whole)
    blocks = [block for lane in batch.lanes for block in batch.blocks(call_cost, lane)]
    assert [index for block in blocks for index in range(block.start, block.stop)] == list(range(len(batch.tokens)))
    for block in blocks:
        columns = np.concatenate([np.arange(*span) for span in [*block.ancestors, (block.start, block.stop)]])
        rows_of_block = whole[block.start : block.stop]
        np.testing.assert_array_equal(batch.block_mask(block, window), rows_of_block[:, columns])
        assert rows_of_block.sum() == rows_of_block[:, columns].sum(), "a block leaves out something it should see"
    if call_cost == 0:
        for block in blocks:
            assert any(segment.start <= block.start and block.stop <= segment.stop for segment in batch.segments)
    if call_cost == 10**6:
        assert len(blocks) == len(batch.lanes)


def test_a_long_segment_takes_as_many_calls_as_save_more_than_they_cost() -> None:
    # 100 tokens in k calls of cost 50 each: 50 k + 100^2 (1 + 1/k) / 2, least at k = 10.
    batch = pack([pair(range(100), [1], [2])])
    blocks = batch.blocks(50)
    assert [block.size for block in blocks] == [10] * 10
    assert [block.ancestors for block in blocks] == [(), *(((0, 10 * k),) for k in range(1, 10))]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(rows=batches(), lanes=st.sampled_from([1, 2, 3, 8]), cost=st.sampled_from([0.0, 0.3, 5.0]))
def test_lanes_are_of_about_equal_work_and_need_no_later_one(rows: list[EncodedRow], lanes: int, cost: float) -> None:
    batch = pack(rows).in_lanes(lanes, cost)
    assert batch.lanes[0][0] == 0
    assert batch.lanes[-1][1] == len(batch.tokens)
    assert all(before[1] == after[0] for before, after in pairwise(batch.lanes))
    work = 1 + cost * batch.positions
    for start, stop in batch.lanes:
        assert work[start:stop].sum() <= work.sum() / lanes + 2 * work.max()
        inside = [segment for segment in batch.segments if start <= segment.start < stop]
        assert sum(segment.size for segment in inside) == stop - start
        assert all(high <= stop for segment in inside for _, high in segment.ancestors)


def test_lanes_are_parted_between_segments_where_one_is_near() -> None:
    batch = pack([pair(range(200, 300), range(100), range(100, 201))])
    assert batch.in_lanes(3, 0.0).lanes == ((0, 100), (100, 199), (199, 299))
