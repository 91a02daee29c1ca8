"""Which words differ between two texts. Pure functions over text; knows nothing about how marks are shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

__all__ = ["MAX_WORDS", "Piece", "different_words", "merged"]

Span = tuple[int, int]

# A word, or one sign; scripts written without spaces are compared character by character.
_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]")
MAX_WORDS = 2000
"""Longer differences are compared by their common start and end only: matching is quadratic at worst."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of the merged text: in `both`, only in the `first`, or only in the `second`."""

    side: Literal["both", "first", "second"]
    text: str


def _tokens(text: str) -> list[tuple[str, int, int]]:
    return [(match.group(), match.start(), match.end()) for match in _TOKEN.finditer(text)]


def _blocks(first: list[str], second: list[str]) -> Iterator[tuple[int, int, int, int]]:
    """Yield the stretches of words that differ, as `first[a:b]` and `second[c:d]`."""
    head = 0
    while head < min(len(first), len(second)) and first[head] == second[head]:
        head += 1
    tail = 0
    while tail < min(len(first), len(second)) - head and first[-1 - tail] == second[-1 - tail]:
        tail += 1
    a, b = first[head : len(first) - tail], second[head : len(second) - tail]
    if max(len(a), len(b)) > MAX_WORDS:
        yield head, head + len(a), head, head + len(b)
        return
    for kind, a_start, a_end, b_start, b_end in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind != "equal":
            yield head + a_start, head + a_end, head + b_start, head + b_end


def different_words(first: str, second: str) -> tuple[list[Span], list[Span]]:
    """Return the stretches `[start, end)` of characters in each text whose words the other one lacks there.

    White space alone makes no difference.
    """
    one, two = _tokens(first), _tokens(second)
    spans: tuple[list[Span], list[Span]] = [], []
    for a, b, c, d in _blocks([token[0] for token in one], [token[0] for token in two]):
        if a < b:
            spans[0].append((one[a][1], one[b - 1][2]))
        if c < d:
            spans[1].append((two[c][1], two[d - 1][2]))
    return spans


def merged(first: str, second: str) -> list[Piece]:
    """Return both texts as one: what they share once (white space as in `second`), the rest marked by side."""
    one, two = _tokens(first), _tokens(second)
    pieces: list[Piece] = []
    done = 0
    for a, b, c, d in _blocks([token[0] for token in one], [token[0] for token in two]):
        start = two[c][1] if c < d else (two[c - 1][2] if c else 0)
        pieces.append(Piece("both", second[done:start]))
        if a < b:
            pieces.append(Piece("first", first[one[a][1] : one[b - 1][2]]))
        done = start
        if c < d:
            done = two[d - 1][2]
            pieces.append(Piece("second", second[two[c][1] : done]))
    pieces.append(Piece("both", second[done:]))
    return [piece for piece in pieces if piece.text]
