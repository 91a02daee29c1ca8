"""Pairs packed as a token tree, so that a shared prefix is run once.

Both answers of a pair continue the same prompt, and prompts of one batch often open with the same
system message. A :class:`PackedBatch` lists every distinct token once, in segments: a segment's
tokens attend to the segment's ancestors and, causally, to themselves. Nothing is padded.

This module is plain numpy: it knows neither models nor losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from localdpo.data.encode import EncodedPair

MIN_SHARED = 8
"""Shorter common prefixes are run again instead: a segment costs about as much as a few tokens."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens ``start:stop`` of the packed batch, whose context is the spans in ``ancestors``."""

    start: int
    stop: int
    ancestors: tuple[tuple[int, int], ...]

    @property
    def context(self) -> int:
        """Number of ancestor tokens."""
        return sum(stop - start for start, stop in self.ancestors)


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """B pairs as one token tree of T tokens and their N distinct predictions.

    ``tokens`` and ``positions`` are int32 [T]. Prediction n reads the hidden state of token
    ``rows[n]`` and asks for ``targets[n]`` (both int32 [N]). ``members[2b]`` and ``members[2b+1]``
    hold the predictions (indices into N) of pair b's chosen and rejected completion.
    ``paths[2b]`` and ``paths[2b+1]`` say where each token of pair b's two sequences (:func:`sequence_of`) stands.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: tuple[Segment, ...]
    rows: np.ndarray
    targets: np.ndarray
    members: tuple[np.ndarray, ...]
    paths: tuple[np.ndarray, ...]

    @property
    def num_pairs(self) -> int:
        """B."""
        return len(self.members) // 2

    def membership(self) -> np.ndarray:
        """[2B, N] float32: 1 where a prediction belongs to a completion."""
        matrix = np.zeros((len(self.members), len(self.rows)), np.float32)
        for completion, predictions in enumerate(self.members):
            # A completion never holds one prediction twice: its tokens stand at distinct positions.
            matrix[completion, predictions] = 1.0
        return matrix

    def blocks(self, call_cost: int) -> list[Segment]:
        """Segments for attention: whole subtrees as one where that costs less than a call for each segment.

        Costs are counted in scores, queries times keys; ``call_cost`` is what a call costs beside its scores. A
        subtree's tokens stand side by side, so a block has the form of a segment, but needs :meth:`block_mask`.
        """

        def merge(index: int) -> tuple[int, list[Segment], int]:
            """Cost and blocks of the subtree at ``index``, and the index after it."""
            root = self.segments[index]
            depth = root.context + root.stop - root.start
            cost = call_cost + (root.stop - root.start) * depth
            blocks, after = [root], index + 1
            while after < len(self.segments) and self.segments[after].context >= depth:
                more, below, after = merge(after)
                cost, blocks = cost + more, blocks + below
            size = self.segments[after - 1].stop - root.start
            whole = call_cost + size * (root.context + size)
            if len(blocks) > 1 and whole < cost:
                return whole, [Segment(root.start, root.start + size, root.ancestors)], after
            return cost, blocks, after

        cost, index = 0, 0
        blocks: list[Segment] = []
        while index < len(self.segments):
            more, below, index = merge(index)
            cost, blocks = cost + more, blocks + below
        size = len(self.tokens)
        return [Segment(0, size, ())] if len(blocks) > 1 and call_cost + size * size < cost else blocks

    def block_mask(self, block: Segment, window: int | None = None) -> np.ndarray:
        """[n, context + n] bool for a block's n tokens: their ancestors first, then the block."""
        spans = [*block.ancestors, (block.start, block.stop)]
        columns = np.concatenate([np.arange(*span) for span in spans])
        mask = np.zeros((block.stop - block.start, len(columns)), np.bool_)
        place = np.full(len(self.tokens), -1)
        place[columns] = np.arange(len(columns))
        for segment in self.segments:
            if block.start <= segment.start < block.stop:
                rows = slice(segment.start - block.start, segment.stop - block.start)
                for start, stop in segment.ancestors:
                    mask[rows, place[start:stop]] = True
                mask[rows, place[segment.start : segment.stop]] = np.tri(segment.stop - segment.start, dtype=np.bool_)
        if window is not None:
            positions = self.positions
            mask &= positions[block.start : block.stop, None] - positions[columns][None] < window
        return mask

    def attention_mask(self, window: int | None = None) -> np.ndarray:
        """[T, T] bool: True where the row's token may attend to the column's."""
        return self.block_mask(Segment(0, len(self.tokens), ()), window)


class _Tree:
    """Collects segments while sequences are laid out depth first."""

    def __init__(self, sequences: Sequence[np.ndarray], min_shared: int) -> None:
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
        shared = _common_length(self.sequences[members[0]], self.sequences[members[-1]])
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
        if ancestors and ancestors[-1][1] == begin:  # adjacent spans read as one
            return (*ancestors[:-1], (ancestors[-1][0], self.size))
        return (*ancestors, (begin, self.size))


def _common_length(first: np.ndarray, second: np.ndarray) -> int:
    shorter = min(len(first), len(second))
    differs = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(differs[0]) if len(differs) else shorter


def sequence_of(pair: EncodedPair, chosen: bool) -> np.ndarray:
    """The tokens a model must read to predict one completion: all of it but its last token."""
    completion = pair.chosen_ids if chosen else pair.rejected_ids
    return np.concatenate([pair.prompt_ids, completion[:-1]]).astype(np.int32)


def pack(pairs: Sequence[EncodedPair], *, share: bool = True, min_shared: int = MIN_SHARED) -> PackedBatch:
    """Pack B pairs; ``share=False`` gives every completion its own copy of the prompt."""
    sequences = [sequence_of(pair, chosen) for pair in pairs for chosen in (True, False)]
    tree = _Tree(sequences, min_shared)
    order = sorted(range(len(sequences)), key=lambda index: sequences[index].tolist())
    if share:
        for branch in tree._branches(order, 0):
            tree.grow(branch, 0, ())
    else:
        for member in order:
            tree.grow([member], 0, ())
    rows, targets, members = _predictions(pairs, tree.where)
    return PackedBatch(
        np.concatenate(tree.tokens),
        np.concatenate(tree.positions),
        tuple(tree.segments),
        rows,
        targets,
        members,
        tuple(tree.where),
    )


def _predictions(
    pairs: Sequence[EncodedPair], where: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Distinct (row, target) predictions, and for each completion the ones it consists of."""
    found: dict[tuple[int, int], int] = {}
    members = []
    for index, pair in enumerate(pairs):
        for side, completion in enumerate((pair.chosen_ids, pair.rejected_ids)):
            # The token before each completion token predicts it; shifted here and nowhere else.
            rows = where[2 * index + side][len(pair.prompt_ids) - 1 :]
            wanted = zip(rows.tolist(), completion.tolist(), strict=True)
            members.append(np.array([found.setdefault(key, len(found)) for key in wanted], np.int32))
    table = np.array(list(found), np.int32).reshape(-1, 2)
    return table[:, 0].copy(), table[:, 1].copy(), tuple(members)
