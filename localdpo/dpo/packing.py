"""Sequences packed as a token tree, so that a shared prefix is run once.

Answers to one prompt continue it, and prompts of one batch often open with the same
system message. A :class:`PackedBatch` lists every distinct token once, in segments: a segment's
tokens attend to the segment's ancestors and, causally, to themselves. Nothing is padded.

This module is plain numpy: it knows neither models nor losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import numpy as np

from localdpo.dpo.budget import block_rows
from localdpo.sequences import Ids, TokenSequence, common_length

MIN_SHARED = 8
"""Shorter common prefixes are run again instead: a segment costs about as much as a few tokens."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens ``start:stop`` of the packed batch, whose context is the spans in ``ancestors``."""

    start: int
    stop: int
    ancestors: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Number of its own tokens."""
        return self.stop - self.start

    @property
    def context(self) -> int:
        """Number of ancestor tokens."""
        return sum(stop - start for start, stop in self.ancestors)

    def cut(self, places: Sequence[int]) -> Iterator[Segment]:
        """The segment in pieces, cut before those of the tokens ``places`` (ascending) that are inside it."""
        bounds = [self.start, *(place for place in places if self.start < place < self.stop), self.stop]
        for start, stop in pairwise(bounds):
            yield Segment(start, stop, _with_span(self.ancestors, (self.start, start)))


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """S sequences as one token tree of T tokens and their N distinct predictions.

    ``tokens`` and ``positions`` are int32 [T]. Prediction n reads the hidden state of token
    ``rows[n]`` and asks for ``targets[n]`` (both int32 [N]). ``members[s]`` holds the predictions (indices into N)
    of sequence s's completion, in order; ``paths[s]`` says where each token of its ``inputs`` stands.
    ``rows`` ascend. ``lanes`` are spans of tokens that run side by side; no segment lies in two of them, and a token
    needs none of a later lane.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: tuple[Segment, ...]
    rows: np.ndarray
    targets: np.ndarray
    members: tuple[np.ndarray, ...]
    paths: tuple[np.ndarray, ...]
    lanes: tuple[tuple[int, int], ...]

    def in_lanes(self, count: int, score_cost: float) -> PackedBatch:
        """The same batch in at most ``count`` lanes of about equal work.

        ``score_cost`` is what a token costs for each that it attends to, with 1 for what it costs beside attention.
        """
        size = len(self.tokens)
        done = np.cumsum(1 + score_cost * self.positions)
        starts = np.array([segment.start for segment in self.segments])
        places = []
        for number in range(1, count):
            place = int(np.searchsorted(done, done[-1] * number / count)) + 1
            # A cut inside a segment makes two of it, so one between segments is as good a little further off.
            nearest = int(starts[np.abs(starts - place).argmin()])
            places.append(nearest if abs(nearest - place) <= size // 64 else place)
        bounds = sorted({0, size, *(min(place, size) for place in places)})
        segments = tuple(piece for segment in self.segments for piece in segment.cut(bounds))
        return replace(self, segments=segments, lanes=tuple(pairwise(bounds)))

    def blocks(self, call_cost: int, lane: tuple[int, int] | None = None) -> list[Segment]:
        """A lane's segments for attention, as few calls or as few scores as costs least: together they cover it.

        Costs are counted in scores, queries times keys; ``call_cost`` is what a call costs beside its scores. Short
        segments side by side become one block, which has the form of a segment, but needs :meth:`block_mask`. Half of
        a long one's scores would be of later tokens, which it must not see: it becomes several.
        """
        first, last = lane or (0, len(self.tokens))
        segments = [segment for segment in self.segments if first <= segment.start < last]

        def merge(index: int) -> tuple[int, list[Segment], int]:
            """Cost and blocks of the subtree at ``index``, and the index after it."""
            root = segments[index]
            depth = root.context + root.size
            cost, blocks = _in_chunks(root, call_cost)
            after = index + 1
            while after < len(segments) and segments[after].context >= depth:
                more, below, after = merge(after)
                cost, blocks = cost + more, blocks + below
            return (*_joined(segments[index:after], cost, blocks, call_cost), after)

        cost, index = 0, 0
        blocks: list[Segment] = []
        while index < len(segments):
            more, below, index = merge(index)
            cost, blocks = cost + more, blocks + below
        return _joined(segments, cost, blocks, call_cost)[1]

    def block_mask(self, block: Segment, window: int | None = None) -> np.ndarray:
        """[n, context + n] bool for a block's n tokens: its ancestors first, then the block."""
        spans = [*block.ancestors, (block.start, block.stop)]
        columns = np.concatenate([np.arange(*span) for span in spans])
        mask = np.zeros((block.size, len(columns)), np.bool_)
        place = np.full(len(self.tokens), -1)
        place[columns] = np.arange(len(columns))
        for segment in self.segments:
            start, stop = max(segment.start, block.start), min(segment.stop, block.stop)
            if start < stop:
                rows = slice(start - block.start, stop - block.start)
                for before in _with_span(segment.ancestors, (segment.start, start)):
                    mask[rows, place[slice(*before)]] = True
                mask[rows, place[start:stop]] = np.tri(stop - start, dtype=np.bool_)
        if window is not None:
            positions = self.positions
            mask &= positions[block.start : block.stop, None] - positions[columns][None] < window
        return mask

    def attention_mask(self, window: int | None = None) -> np.ndarray:
        """[T, T] bool: True where the row's token may attend to the column's."""
        return self.block_mask(Segment(0, len(self.tokens), ()), window)


def _with_span(spans: tuple[tuple[int, int], ...], span: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """``spans`` and one that follows them; adjacent ones read as one, and an empty one is none."""
    start, stop = span
    if start == stop:
        return spans
    if spans and spans[-1][1] == start:
        return (*spans[:-1], (spans[-1][0], stop))
    return (*spans, span)


def _in_chunks(segment: Segment, call_cost: int) -> tuple[int, list[Segment]]:
    """What attention over a segment costs, and the pieces in which it costs least."""
    size = segment.size
    count = max(1, min(size, round(size / block_rows(call_cost))))
    pieces = list(segment.cut([segment.start + size * number // count for number in range(1, count)]))
    return sum(call_cost + piece.size * (piece.context + piece.size) for piece in pieces), pieces


def _joined(segments: Sequence[Segment], cost: int, blocks: list[Segment], call_cost: int) -> tuple[int, list[Segment]]:
    """The cost of segments side by side and their blocks: ``blocks``, or one of all where that costs less."""
    if len(segments) < 2:
        return cost, blocks
    start, stop = segments[0].start, segments[-1].stop
    context: tuple[tuple[int, int], ...] = ()
    for low, high in sorted({span for segment in segments for span in segment.ancestors}):
        low = max(low, context[-1][1] if context else 0)
        context = _with_span(context, (low, max(low, min(high, start))))
    whole = Segment(start, stop, context)
    joint = call_cost + whole.size * (whole.context + whole.size)
    return (joint, [whole]) if joint < cost else (cost, blocks)


class _Tree:
    """Collects segments while sequences are laid out depth first."""

    def __init__(self, sequences: Sequence[Ids], min_shared: int) -> None:
        self.sequences = sequences
        self.min_shared = min_shared
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[Segment] = []
        self.size = 0
        # where[s][i] is the packed index of token i of sequence s
        self.where = [np.empty(len(sequence), np.int32) for sequence in sequences]

    def grow(self, members: list[int], start: int, ancestors: tuple[tuple[int, int], ...]) -> None:
        """Lay out ``members`` (sorted, equal up to ``start``) from position ``start`` on."""
        shared = common_length(self.sequences[members[0]], self.sequences[members[-1]])
        if len(members) > 1 and shared - start < self.min_shared and not self._all_equal(members, shared):
            # Too short to pay: each branch carries its own copy of the shared tokens.
            for branch in self._branches(members, shared):
                self.grow(branch, start, ancestors)
            return
        if shared > start:
            ancestors = self._emit(members, start, shared, ancestors)
        rest = [member for member in members if len(self.sequences[member]) > shared]
        for branch in self._branches(rest, shared):
            self.grow(branch, shared, ancestors)

    def _all_equal(self, members: list[int], shared: int) -> bool:
        return all(len(self.sequences[member]) == shared for member in members)

    def _branches(self, members: list[int], at: int) -> list[list[int]]:
        """Groups by the token at position ``at``; a sequence that ends there is a group of its own."""

        def branch(member: int) -> int:
            sequence = self.sequences[member]
            return int(sequence[at]) if len(sequence) > at else -1

        return [list(group) for _, group in groupby(members, branch)]

    def _emit(
        self, members: list[int], start: int, stop: int, ancestors: tuple[tuple[int, int], ...]
    ) -> tuple[tuple[int, int], ...]:
        begin, self.size = self.size, self.size + stop - start
        self.tokens.append(self.sequences[members[0]][start:stop])
        self.positions.append(np.arange(start, stop, dtype=np.int32))
        self.segments.append(Segment(begin, self.size, ancestors))
        for member in members:
            self.where[member][start:stop] = np.arange(begin, self.size)
        return _with_span(ancestors, (begin, self.size))


def pack(sequences: Sequence[TokenSequence], *, share: bool = True, min_shared: int = MIN_SHARED) -> PackedBatch:
    """Pack S sequences; ``share=False`` gives every completion its own copy of the prompt."""
    inputs = [sequence.inputs for sequence in sequences]
    tree = _Tree(inputs, min_shared)
    order = sorted(range(len(inputs)), key=lambda index: inputs[index].tolist())
    if share:
        for branch in tree._branches(order, 0):
            tree.grow(branch, 0, ())
    else:
        for member in order:
            tree.grow([member], 0, ())
    rows, targets, members = _predictions(sequences, tree.where)
    return PackedBatch(
        np.concatenate(tree.tokens),
        np.concatenate(tree.positions),
        tuple(tree.segments),
        rows,
        targets,
        members,
        tuple(tree.where),
        ((0, tree.size),),
    )


def _predictions(
    sequences: Sequence[TokenSequence], where: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Distinct (row, target) predictions, and for each completion the ones it consists of."""
    found: dict[tuple[int, int], int] = {}
    members = []
    for sequence, places in zip(sequences, where, strict=True):
        # The token before each completion token predicts it; shifted here and nowhere else.
        rows = places[len(sequence.prompt_ids) - 1 :]
        wanted = zip(rows.tolist(), sequence.completion_ids.tolist(), strict=True)
        members.append(np.array([found.setdefault(key, len(found)) for key in wanted], np.int32))
    table = np.array(list(found), np.int32).reshape(-1, 2)
    order = np.argsort(table[:, 0], kind="stable")
    place = np.argsort(order)
    return table[order, 0], table[order, 1], tuple(place[member].astype(np.int32) for member in members)
