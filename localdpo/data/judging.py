"""A judge that reads two answers and names the better: how it is asked, and what its words are worth.

Judges favour a place: many say "A" whatever A is. So each two answers are shown in both orders, and only a judge
that names the same answer both times has decided. Anything else is a tie, and ties are kept apart. This module
asks nobody: it writes the questions and counts the words that come back.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from localdpo.data.fields import Message

__all__ = ["CRITERION", "Ballot", "Standing", "Verdict", "ballots", "read_verdict", "standing", "verdict_of"]

CRITERION = "Which answer is better: more helpful, more correct and clearer?"

Verdict = Literal["first", "second", "tie", "unclear"]

_LETTER = re.compile(r"\b([ABT])\b")
_WORD = re.compile(r"\b(?:answer|option|response)\s+([AB])\b|\b(tie|both|neither)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Ballot:
    """Two answers by number, to be asked about as `first` before `second`."""

    first: int
    second: int

    def question(self, prompt: Sequence[Message], answers: Sequence[str], criterion: str = CRITERION) -> list[Message]:
        """What the judge is asked: one user turn."""
        said = "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in prompt)
        text = (
            f"Here is a conversation and two answers to its last turn.\n\n[Conversation]\n{said}\n\n"
            f"[Answer A]\n{answers[self.first]}\n\n[Answer B]\n{answers[self.second]}\n\n"
            f"{criterion}\nReply with one letter: A, B, or T for a tie."
        )
        return [{"role": "user", "content": text}]


def ballots(count: int) -> list[Ballot]:
    """Every two of `count` answers, in both orders, one order right after the other."""
    pairs = itertools.combinations(range(count), 2)
    return [Ballot(*order) for first, second in pairs for order in ((first, second), (second, first))]


def read_verdict(text: str) -> Verdict:
    """What a judge's reply says: the first letter that stands alone, else the first such word; "unclear" else."""
    letter = _LETTER.search(text)
    if letter is None:
        word = _WORD.search(text)
        if word is None:
            return "unclear"
        found = (word.group(1) or "T").upper()
    else:
        found = letter.group(1)
    return {"A": "first", "B": "second", "T": "tie"}[found]  # type: ignore[return-value]


def verdict_of(one: Verdict, other: Verdict) -> Verdict:
    """The verdict on two answers from those in both orders, in terms of the first order.

    A judge that names one place both times, whatever is there, has not decided: that is a tie. So is a tie in one
    order only. "unclear" is what it is.
    """
    if "unclear" in (one, other):
        return "unclear"
    turned: Verdict = {"first": "second", "second": "first", "tie": "tie"}[other]  # type: ignore[assignment]
    return one if one == turned else "tie"


@dataclass(frozen=True, slots=True)
class Standing:
    """What came of a prompt's ballots: the best and the worst answer by number, or why there are none.

    `same_place` counts the times that the judge named the same place in both orders, of `compared`.
    """

    best: int | None
    worst: int | None
    reason: str
    wins: tuple[int, ...]
    compared: int
    same_place: int


def standing(count: int, verdicts: Sequence[Verdict]) -> Standing:
    """Best and worst of `count` answers by wins less losses, from the verdicts on `ballots(count)` in their order.

    The best must be alone at the top, and the judge must have preferred it to the worst in both orders; of several
    at the bottom the first such is the worst.
    """
    points = [0] * count
    decided: dict[tuple[int, int], Verdict] = {}
    same = unclear = 0
    for ballot, one, other in zip(ballots(count)[::2], verdicts[::2], verdicts[1::2], strict=True):
        verdict = verdict_of(one, other)
        decided[ballot.first, ballot.second] = verdict
        same += one == other and one in ("first", "second")
        unclear += verdict == "unclear"
        if verdict in ("first", "second"):
            won, lost = (ballot.first, ballot.second) if verdict == "first" else (ballot.second, ballot.first)
            points[won] += 1
            points[lost] -= 1
    compared = len(decided)

    def tied(reason: str) -> Standing:
        return Standing(None, None, reason, tuple(points), compared, same)

    if unclear == compared:
        return tied("the judge's replies name no answer")
    best = points.index(max(points))
    if points.count(points[best]) > 1:
        return tied("the judge finds no answer best in both orders")
    lowest = [number for number in range(count) if points[number] == min(points)]
    beaten = [n for n in lowest if decided[min(best, n), max(best, n)] == ("first" if best < n else "second")]
    if not beaten:
        return tied("the judge does not prefer the best answer to the worst in both orders")
    worst = beaten[0]
    return Standing(best, worst, "", tuple(points), compared, same)
