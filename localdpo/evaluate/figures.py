"""The closing figures: what a run changed and what it did not, counted over the probes' answers.

A probe's first tag is its group. Probes of the group "identity" ask for what was taught: their
accepted answers are the taught terms. All other groups must stay as they were: their answers should
still be right where the base's were, and should not mention a taught term. This module counts; it
runs no model and never loads mlx.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from localdpo.train.events import SampleEvent

TAUGHT = "identity"
UNTAGGED = "probes"


def says(text: str, terms: Iterable[str]) -> bool:
    """Whether one of ``terms`` is in ``text`` as whole words, whatever its case or typography."""
    plain = _plain(text)
    return any(re.search(rf"(?<!\w){re.escape(_plain(term))}(?!\w)", plain) for term in terms if term.strip())


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    return " ".join(folded.split())


def group_of(sample: SampleEvent) -> str:
    """The group of a probe: its first tag."""
    return sample.tags[0] if sample.tags else UNTAGGED


@dataclass(frozen=True, slots=True)
class GroupFigures:
    """Counts over one group of probes.

    ``judged`` probes list accepted answers; ``kept`` are those right before and after.
    ``mentions`` counts tuned answers that say a taught term, ``forbidden`` those that say what the
    probe rejects.
    """

    probes: int
    judged: int
    base_right: int
    tuned_right: int
    kept: int
    mentions: int
    forbidden: int


@dataclass(frozen=True, slots=True)
class ProbeFigures:
    """The figures of a run: per group, the terms that were taught, and those that must not be said."""

    groups: dict[str, GroupFigures]
    terms: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    max_tokens: int = 0

    @classmethod
    def of(
        cls, samples: Sequence[SampleEvent], forbidden: Sequence[Sequence[str]] = (), max_tokens: int = 0
    ) -> ProbeFigures:
        """Count; ``forbidden`` holds each sample's rejected terms, in the order of ``samples``."""
        terms = tuple(dict.fromkeys(term for s in samples if group_of(s) == TAUGHT for term in s.accept))
        rejects = list(forbidden) or [()] * len(samples)
        names = dict.fromkeys(map(group_of, samples))
        groups = {
            name: _count([(s, bad) for s, bad in zip(samples, rejects, strict=True) if group_of(s) == name], terms)
            for name in names
        }
        rejected = tuple(dict.fromkeys(term for bad in rejects for term in bad))
        return cls(groups, terms, rejected, max_tokens)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, for the end event; ``lines`` says the same in words."""
        groups = {name: asdict(group) for name, group in self.groups.items()}
        return {
            "groups": groups,
            "terms": list(self.terms),
            "rejected": list(self.rejected),
            "max_tokens": self.max_tokens,
            "lines": self.lines(),
        }

    def lines(self) -> list[str]:
        """One sentence a figure."""
        said = " or ".join(self.terms[:3])
        found = []
        for name, group in self.groups.items():
            if name == TAUGHT:
                found.append(f"{name}: {_share(group.tuned_right, group.judged)} answers say {said or 'it'}")
                if self.rejected:
                    old = " or ".join(self.rejected[:3])
                    found.append(f"{name}: {_share(group.forbidden, group.probes)} answers say {old}")
                continue
            if said:
                found.append(f"{name}: {_share(group.mentions, group.probes)} answers mention {said}")
            if group.judged:
                found.append(
                    f"{name}: {_share(group.kept, group.base_right)} answers that the base had right still are"
                    f" ({group.tuned_right} of {group.judged} are right now)"
                )
        return found


def _count(rows: Sequence[tuple[SampleEvent, Sequence[str]]], terms: Sequence[str]) -> GroupFigures:
    samples = [sample for sample, _ in rows]
    return GroupFigures(
        probes=len(samples),
        judged=sum(bool(sample.accept) for sample in samples),
        base_right=sum(sample.base_right is True for sample in samples),
        tuned_right=sum(sample.tuned_right is True for sample in samples),
        kept=sum(sample.base_right is True and sample.tuned_right is True for sample in samples),
        mentions=sum(says(sample.tuned, terms) for sample in samples),
        forbidden=sum(says(sample.tuned, bad) for sample, bad in rows),
    )


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.0%})" if whole else "none of 0"
