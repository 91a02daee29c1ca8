"""Blind comparison: two answers without their names, in an order nobody knows, judged one prompt at a time.

The test is a journal, one JSON object a line, appended and pushed to disk before a verdict counts: whatever
ends the program, the next one goes on at the same place with the same sides. An undo is a line as well, so
the file also says what was taken back. This module knows nothing about models or screens and never loads mlx.

The win rate counts a tie as half a win. Its interval is Wilson's score interval (E. B. Wilson, "Probable
inference, the law of succession, and statistical inference", JASA 22, 1927, pp. 209-212), which R. G. Newcombe
("Two-sided confidence intervals for the single proportion", Statistics in Medicine 17, 1998, method 3) found
to keep its level in samples as small as these. With ties it is wider than it need be, never narrower: halves
vary less than wins and losses do.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from localdpo.data.fields import Message
from localdpo.data.jsonl import ProblemLog, read_rows
from localdpo.data.provenance import AnswerOrigin, now
from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.journal import append_line, repair_tail

__all__ = [
    "BlindTest",
    "Choice",
    "Comparison",
    "Judgement",
    "Shown",
    "WinRate",
    "blind_tests",
    "swapped",
    "wilson_interval",
]

Z_95 = 1.959963984540054
"""The 97.5 % point of the normal distribution: two-sided intervals of 95 %."""

Choice = Literal["first", "second", "tie", "skip"]
"""What a judge says of the answers as shown."""

Outcome = Literal["a", "b", "tie", "skip"]
"""What that means for the two sides."""

_FORMAT = 1


def wilson_interval(successes: float, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval for ``successes`` (halves allowed) of ``trials``; (0, 1) without a trial.

    Raises ValueError unless 0 <= successes <= trials.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials")
    if trials == 0:
        return 0.0, 1.0
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # At 0 and at all of them one end is exact; the subtraction alone would leave a rounding error.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == trials else (centre + spread) / scale
    return low, high


@dataclass(frozen=True, slots=True)
class WinRate:
    """How often side b was preferred to side a. Skipped prompts say nothing and are left out."""

    wins: int = 0
    losses: int = 0
    ties: int = 0
    skipped: int = 0

    @property
    def judged(self) -> int:
        """Prompts with a verdict."""
        return self.wins + self.losses + self.ties

    @property
    def rate(self) -> float | None:
        """Wins and half the ties over all verdicts; None before the first."""
        return (self.wins + self.ties / 2) / self.judged if self.judged else None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of `rate`."""
        return wilson_interval(self.wins + self.ties / 2, self.judged)

    def sentence(self, side: str, other: str) -> str:
        """The result in words: the rate, its interval, and what may be concluded from it."""
        if self.rate is None:
            return "no verdict yet"
        low, high = self.interval
        if low > 0.5:
            meaning = f"{side} is preferred"
        elif high < 0.5:
            meaning = f"{other} is preferred"
        else:
            meaning = "too few verdicts to tell them apart"
        return (
            f"{side} won {self.wins}, {other} won {self.losses}, {self.ties} {'tie' if self.ties == 1 else 'ties'}: "
            f"win rate {self.rate:.0%} (95 % interval {low:.0%} to {high:.0%}): {meaning}"
        )

    def to_json(self) -> dict[str, Any]:
        """The counts, the rate and its interval."""
        low, high = self.interval
        counts = {"wins": self.wins, "losses": self.losses, "ties": self.ties, "skipped": self.skipped}
        return {**counts, "rate": self.rate, "low": low, "high": high}


def swapped(seed: int, key: str) -> bool:
    """Whether side b is shown first for ``key``: a fair coin that falls the same way for the same seed and key.

    A function of the two alone, so that prompts added later or judged in another order move nothing.
    """
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()[0] % 2 == 1


@dataclass(frozen=True, slots=True)
class Comparison:
    """A prompt and the answers of side a and side b. ``id`` is unique in its test."""

    id: str
    prompt: tuple[Message, ...]
    answers: tuple[str, str]
    origins: tuple[AnswerOrigin | None, AnswerOrigin | None] = (None, None)


@dataclass(frozen=True, slots=True)
class Shown:
    """What a judge may see of a comparison."""

    id: str
    prompt: tuple[Message, ...]
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict: ``choice`` is what was said of the answers as shown, ``outcome`` the side that won by it."""

    id: str
    choice: Choice
    outcome: Outcome


def _outcome(choice: Choice, flipped: bool) -> Outcome:
    if choice == "tie" or choice == "skip":
        return choice
    return "b" if (choice == "second") != flipped else "a"


@dataclass
class BlindTest:
    """A journal of comparisons and verdicts, opened by `start` or `resume`.

    ``sides`` names a and b for the result; ``about`` is whatever the maker wants to find again. Every method
    that changes something writes to disk before it returns: call those away from a thread that must not wait.
    """

    path: Path
    sides: tuple[str, str]
    seed: int
    about: dict[str, Any] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    judgements: dict[str, Judgement] = field(default_factory=dict)

    @classmethod
    def start(
        cls, path: str | Path, sides: tuple[str, str], seed: int, about: Mapping[str, Any] | None = None
    ) -> BlindTest:
        """Begin a new journal at ``path``. Raises InputError when there is one, EnvironmentFault from the disk."""
        test = cls(Path(path), sides, seed, dict(about or {}))
        if test.path.exists():
            fix = "Resume it, or choose another name"
            raise InputError(Problem(str(path), "this blind test exists already", fix))
        test._write(
            {"event": "start", "format": _FORMAT, "sides": list(sides), "seed": seed, "about": test.about},
        )
        return test

    @classmethod
    def resume(cls, path: str | Path, *, to_write: bool = True) -> BlindTest:
        """Read a journal and go on with it; half a line at its end, left by a crash, is cut off.

        With ``to_write`` off nothing is changed: the half line may be another program's that is being written.
        Raises InputError when it is no journal of a blind test.
        """
        if to_write:
            repair_tail(Path(path))
        log = ProblemLog()
        rows = [row.value for row in read_rows(path, log)]
        if to_write:
            log.raise_if_any()
        if not rows or rows[0].get("event") != "start" or rows[0].get("format") != _FORMAT:
            raise InputError(Problem(str(path), "is not the journal of a blind test", "Start a new one"))
        try:
            head = rows[0]
            a, b = head["sides"]
            test = cls(Path(path), (str(a), str(b)), int(head["seed"]), dict(head.get("about") or {}))
            for row in rows[1:]:
                test._replay(row)
        except (KeyError, TypeError, ValueError) as error:
            problem = Problem(str(path), f"has a line that no blind test wrote ({error})", "Start a new one")
            raise InputError(problem) from None
        return test

    def _replay(self, row: Mapping[str, Any]) -> None:
        event, key = row.get("event"), str(row["id"])
        if event == "answers":
            a, b = (AnswerOrigin.from_json(value) for value in row.get("origins") or (None, None))
            prompt: tuple[Message, ...] = tuple(dict(turn) for turn in row["prompt"])  # type: ignore[misc]
            self.comparisons[key] = Comparison(key, prompt, (str(row["a"]), str(row["b"])), (a, b))
        elif event == "verdict":
            choice = row["choice"]
            if choice not in get_args(Choice) or key not in self.comparisons:
                raise ValueError(f"verdict {choice!r} on {key!r}")
            self.judgements[key] = Judgement(key, choice, _outcome(choice, swapped(self.seed, key)))
        elif event == "undo":
            self.judgements.pop(key, None)

    def add(self, comparison: Comparison) -> None:
        """Keep two answers to be judged; one with the same id is kept as it was."""
        if comparison.id in self.comparisons:
            return
        origins = [origin.to_json() if origin else None for origin in comparison.origins]
        a, b = comparison.answers
        self._write(
            {
                "event": "answers",
                "id": comparison.id,
                "prompt": [dict(turn) for turn in comparison.prompt],
                "a": a,
                "b": b,
                "origins": origins,
            }
        )
        self.comparisons[comparison.id] = comparison

    @property
    def pending(self) -> Sequence[Comparison]:
        """Comparisons without a verdict, oldest first."""
        return [item for key, item in self.comparisons.items() if key not in self.judgements]

    def current(self) -> Shown | None:
        """The next answers to judge, sides hidden; None when there are none."""
        waiting = next((c for key, c in self.comparisons.items() if key not in self.judgements), None)
        if waiting is None:
            return None
        first, second = waiting.answers
        if swapped(self.seed, waiting.id):
            first, second = second, first
        return Shown(waiting.id, waiting.prompt, first, second)

    def verdict(self, choice: Choice) -> Judgement | None:
        """What `judge` would record, without recording it: for a caller with something to do first."""
        shown = self.current()
        return None if shown is None else Judgement(shown.id, choice, _outcome(choice, swapped(self.seed, shown.id)))

    def judge(self, choice: Choice) -> Judgement | None:
        """Give the verdict on `current`; None when there is nothing to judge."""
        judgement = self.verdict(choice)
        if judgement is None:
            return None
        first = "b" if swapped(self.seed, judgement.id) else "a"
        row = {"event": "verdict", "id": judgement.id, "choice": choice, "winner": judgement.outcome, "first": first}
        self._write(row)
        self.judgements[judgement.id] = judgement
        return judgement

    def undo(self) -> Judgement | None:
        """Take the latest verdict back, so that its answers are `current` again; None when there is none."""
        if not self.judgements:
            return None
        key, judgement = next(reversed(self.judgements.items()))
        self._write({"event": "undo", "id": key})
        del self.judgements[key]
        return judgement

    @property
    def latest(self) -> Judgement | None:
        """The verdict that `undo` would take back."""
        return next(reversed(self.judgements.values()), None)

    def win_rate(self) -> WinRate:
        """How side b did against side a so far."""
        outcomes = [judgement.outcome for judgement in self.judgements.values()]
        return WinRate(outcomes.count("b"), outcomes.count("a"), outcomes.count("tie"), outcomes.count("skip"))

    def decided(self) -> Iterator[tuple[Comparison, Judgement]]:
        """Every comparison with a verdict, in the order of the verdicts."""
        for key, judgement in self.judgements.items():
            yield self.comparisons[key], judgement

    def _write(self, row: Mapping[str, Any]) -> None:
        append_line(self.path, json.dumps({**row, "time": now()}, ensure_ascii=False))


def blind_tests(run: str | Path) -> list[BlindTest]:
    """The blind tests of a run, by name; those in its folder `blind`. Files that are none are passed over."""
    found = []
    for path in sorted((Path(run) / "blind").glob("*.jsonl")):
        try:
            found.append(BlindTest.resume(path, to_write=False))
        except (InputError, EnvironmentFault):
            continue
    return found
