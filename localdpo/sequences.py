"""What a model scores: sequences of token ids, and the rows that methods make of them.

A preference pair is a row of two sequences with one prompt, a demonstration a row of one for each answer in it. This
module is plain numpy: it knows neither models nor losses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
"""Token ids, int32 [n]."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """A completion and the prompt that it answers. Log-probs are of the completion's tokens, given all before them."""

    prompt_ids: Ids
    completion_ids: Ids

    @property
    def inputs(self) -> Ids:
        """The tokens a model must read to predict the completion: all of it but its last token."""
        return np.concatenate([self.prompt_ids, self.completion_ids[:-1]]).astype(np.int32)

    @property
    def key(self) -> str:
        """sha256 of both arrays: sequences of equal ids have equal log-probs under one model."""
        return _digest(self.prompt_ids, self.completion_ids)

    @property
    def prompt_key(self) -> str:
        """sha256 of the prompt alone."""
        return _digest(self.prompt_ids)


@dataclass(frozen=True, slots=True, eq=False)
class EncodedRow:
    """A row of training data as ids: sequences that belong together, in the order its method gives them.

    A pair's are its chosen and its rejected answer. Each completion ends in exactly one end-of-turn token, unless
    truncation cut it off. ``row`` is the row's index in what was encoded; ``line`` and ``source`` name it in messages.
    """

    sequences: tuple[TokenSequence, ...]
    weight: float = 1.0
    kind: str = "preference"
    row: int = 0
    line: int = 0
    source: str = ""

    @classmethod
    def of(cls, prompt_ids: Ids, completions: Iterable[Ids], *rest: object, **named: object) -> EncodedRow:
        """A row of one prompt with several completions."""
        return cls(tuple(TokenSequence(prompt_ids, ids) for ids in completions), *rest, **named)  # type: ignore[arg-type]

    @property
    def prompt_ids(self) -> Ids:
        """The prompt of the first sequence: of a pair, the prompt of both."""
        return self.sequences[0].prompt_ids

    @property
    def chosen_ids(self) -> Ids:
        """Of a pair: the chosen answer."""
        return self.sequences[0].completion_ids

    @property
    def rejected_ids(self) -> Ids:
        """Of a pair: the rejected answer."""
        return self.sequences[1].completion_ids

    @property
    def num_tokens(self) -> int:
        """Tokens of all completions, and of each prompt once."""
        return num_tokens(self.sequences)


def num_tokens(sequences: Iterable[TokenSequence]) -> int:
    """Tokens of all completions, and of the prompt that neighbours share once."""
    total = 0
    before: TokenSequence | None = None
    for sequence in sequences:
        if before is None or not same_prompt(before, sequence):
            total += len(sequence.prompt_ids)
        total += len(sequence.completion_ids)
        before = sequence
    return total


def same_prompt(first: TokenSequence, second: TokenSequence) -> bool:
    """Whether two sequences have equal prompts."""
    return first.prompt_ids is second.prompt_ids or np.array_equal(first.prompt_ids, second.prompt_ids)


def sequences_of(rows: Iterable[EncodedRow]) -> list[TokenSequence]:
    """The sequences of rows, one row after the other."""
    return list(chain.from_iterable(row.sequences for row in rows))


class RowValues(NamedTuple):
    """A figure for each sequence of B rows, float32 [S], and where each row's begin, int64 [B + 1]."""

    values: npt.NDArray[np.float32]
    starts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, values: npt.NDArray[np.float32], rows: Sequence[EncodedRow]) -> RowValues:
        """``values`` of the sequences of ``rows``, one row after the other."""
        counts = np.fromiter((len(row.sequences) for row in rows), np.int64, len(rows))
        return cls(values, np.concatenate([[0], np.cumsum(counts)]))

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Those of the sequences of the rows at these places, one row after the other."""
        return np.concatenate([self.values[self.starts[row] : self.starts[row + 1]] for row in rows])


def completion_lengths(sequences: Sequence[TokenSequence]) -> npt.NDArray[np.int64]:
    """Tokens of each completion, int64 [S]."""
    return np.fromiter((len(sequence.completion_ids) for sequence in sequences), np.int64, len(sequences))


def common_length(first: Ids, second: Ids) -> int:
    """How many tokens two arrays of ids begin with in common."""
    shorter = min(len(first), len(second))
    differs = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(differs[0]) if len(differs) else shorter


def _digest(*arrays: Ids) -> str:
    digest = hashlib.sha256()
    for ids in arrays:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(ids, dtype="<i4").tobytes())
    return digest.hexdigest()
