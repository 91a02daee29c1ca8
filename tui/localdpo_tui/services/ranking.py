"""Ranking candidates: which two come next, and the pair that each verdict makes.

A verdict's pair is in the file before the verdict is in the journal, under an id that follows from the two answers:
a crash between them makes the user judge those two again, which replaces the pair. It knows no screens.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from localdpo.evaluate.blind import BlindTest, Choice, Shown
from localdpo_tui.services.candidates import CandidateStore, rank_comparisons, rank_id, ranked_pair
from localdpo_tui.services.pairfile import add_pairs, remove_pairs

__all__ = ["Ranking"]


class Ranking:
    """The candidates of a store, two by two; pairs go into `pairs`."""

    def __init__(self, test: BlindTest, pairs: Path, title: str) -> None:
        self.title = title
        self._test = test
        self._pairs = pairs

    @classmethod
    def open(cls, store: CandidateStore, journal: Path, pairs: Path, title: str) -> Ranking:
        """Go on with the ranking in `journal`, or begin one; candidates that are new join it. Touches the disk.

        Raises InputError when the journal is none, EnvironmentFault.
        """
        if journal.exists():
            test = BlindTest.resume(journal)
        else:
            test = BlindTest.start(journal, ("earlier", "later"), secrets.randbits(32), {"pairs": pairs.name})
        for prompt in store.prompts():
            for comparison in rank_comparisons(store.of(prompt)):
                test.add(comparison)
        return cls(test, pairs, title)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to rank and never was."""
        return not self._test.comparisons

    def current(self) -> Shown | None:
        """The answers to judge now."""
        return self._test.current()

    def judge(self, choice: Choice) -> None:
        """Take the verdict on `current`, and add its pair. Raises EnvironmentFault."""
        judgement = self._test.verdict(choice)
        if judgement is None:
            return
        draft = ranked_pair(self._test.comparisons[judgement.id], judgement)
        if draft is not None:
            add_pairs(self._pairs, [draft])
        elif self._pairs.exists():
            remove_pairs(self._pairs, [rank_id(judgement.id)])  # left by a crash before its verdict was written
        self._test.judge(choice)

    def undo(self) -> bool:
        """Take the latest verdict back, and its pair out of the file. Raises EnvironmentFault."""
        latest = self._test.latest
        if latest is None:
            return False
        if latest.outcome in ("a", "b") and self._pairs.exists():
            remove_pairs(self._pairs, [rank_id(latest.id)])
        return self._test.undo() is not None

    def position(self) -> str:
        """How far we are."""
        return f"{len(self._test.judgements)} of {len(self._test.comparisons)} judged"

    def result(self) -> str:
        """What the verdicts came to."""
        rate = self._test.win_rate()
        made = rate.wins + rate.losses
        pairs, ties = "pair" if made == 1 else "pairs", "tie" if rate.ties == 1 else "ties"
        return f"{made} {pairs} made, {rate.ties} {ties}, {rate.skipped} skipped. The pairs go to {self._pairs.name}."

    def waiting(self) -> str:
        """What to do now that there is nothing to judge."""
        if self.empty:
            return (
                "There are no two different answers to the same prompt yet.\n\n"
                "Generate two or more candidates for a prompt first, at a temperature above 0."
            )
        return (
            "All candidates are ranked.\n\n"
            "Esc goes back; more candidates make more to rank. U takes the latest verdict back."
        )
