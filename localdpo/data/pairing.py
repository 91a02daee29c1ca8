"""Make a pair of a prompt and its candidates: by rewards, by a standing, or by correcting an answer.

Every function gives a pair, or the reason why there is none. An answer that the token limit cut off is never
chosen unless that is asked for: it would teach to stop half way. This module runs no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from localdpo.data.candidates import Candidate
from localdpo.data.fields import Message
from localdpo.data.jsonl import ProblemLog, read_rows
from localdpo.data.judging import Standing
from localdpo.data.pairs import PreferencePair, PromptRow, prompt_key
from localdpo.data.provenance import AnswerOrigin, now, with_provenance
from localdpo.data.rewards import RewardSum
from localdpo.errors import InputError, Problem

__all__ = [
    "Edits", "Substitution", "Unfinished", "best_and_worst", "by_standing", "corrected", "distinct",
    "parse_substitutions", "rewrite_request", "without_thanks",
]  # fmt: skip

Unfinished = Literal["rejected", "keep", "leave-out"]
"""What an answer that was cut off may be: rejected only, either, or nothing."""

REWRITE = "Rewrite the answer so that it is more helpful, more correct and clearer."


@dataclass(frozen=True, slots=True)
class Substitution:
    """Text to replace and what by; both as they are, or `old` a regular expression."""

    old: str
    new: str
    regex: bool = False

    def apply(self, text: str) -> str:
        """The text with every occurrence replaced."""
        return re.sub(self.old, self.new, text) if self.regex else text.replace(self.old, self.new)


def parse_substitutions(texts: Sequence[str], regex: bool = False) -> tuple[Substitution, ...]:
    """`old=new` texts; a `=` within `old` is written `\\=`. Raises InputError with every problem."""
    found, problems = [], []
    for text in texts:
        parts = re.split(r"(?<!\\)=", text, maxsplit=1)
        if len(parts) != 2 or not parts[0]:
            problems.append(Problem(f"--replace {text}", "is not of the form OLD=NEW", r"Write a = within OLD as \="))
            continue
        old, new = parts[0].replace("\\=", "="), parts[1]
        try:
            if regex:
                re.compile(old).sub(new, "")
        except (re.error, IndexError, OverflowError) as error:
            problems.append(Problem(f"--replace {text}", f"is no regular expression ({error})"))
            continue
        found.append(Substitution(old, new, regex))
    if problems:
        raise InputError(*problems)
    return tuple(found)


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that say something, each text once."""
    texts: dict[str, Candidate] = {}
    for candidate in candidates:
        if candidate.text.strip():
            texts.setdefault(candidate.text.strip(), candidate)
    return list(texts.values())


def _eligible(candidates: Sequence[Candidate], unfinished: Unfinished) -> tuple[list[Candidate], list[Candidate]]:
    """Those that may be chosen, and those that may be rejected."""
    whole = [candidate for candidate in candidates if not candidate.unfinished]
    may_choose = list(candidates) if unfinished == "keep" else whole
    return may_choose, whole if unfinished == "leave-out" else list(candidates)


def _pair(
    row: PromptRow,
    chosen: Candidate,
    rejected: Candidate,
    how: str,
    notes: Mapping[str, Any],
) -> PreferencePair:
    extra = {key: value for key, value in row.extra.items() if key not in _ANSWER_KEYS}
    return PreferencePair(
        row.prompt,
        chosen.text,
        rejected.text,
        id=row.id,
        tags=row.tags,
        extra=with_provenance(extra, how, chosen=chosen.origin, rejected=rejected.origin, **notes),
        line=row.line,
        source=row.source,
    )


_ANSWER_KEYS = ("chosen", "rejected", "target", "weight", "kind", "tools", "accept")


def best_and_worst(
    row: PromptRow,
    candidates: Sequence[Candidate],
    rewards: RewardSum,
    *,
    unfinished: Unfinished = "rejected",
    min_gap: float = 0.0,
) -> PreferencePair | str:
    """The candidate with the highest reward against the one with the lowest; of equals the earlier.

    `min_gap` is the least difference of their rewards. Raises InputError when a reward cannot be told.
    """
    different = distinct(candidates)
    if len(different) < 2:
        return _too_few(different)
    may_choose, may_reject = _eligible(different, unfinished)
    if not may_choose:
        return "every answer was cut off at the token limit"
    scores = {id(candidate): rewards.scores(candidate.text, row) for candidate in different}
    totals = {key: rewards.total(found) for key, found in scores.items()}
    best = max(may_choose, key=lambda candidate: totals[id(candidate)])
    worst = min((c for c in may_reject if c is not best), key=lambda c: totals[id(c)], default=None)
    if worst is None:
        return "every other answer was cut off at the token limit"
    gap = totals[id(best)] - totals[id(worst)]
    if gap <= 0 or gap < min_gap:
        return (
            "the rewards of its answers do not differ" if gap <= 0 else "the rewards of its answers differ too little"
        )
    notes = {
        "rewards": [reward.to_json() for reward in rewards.rewards],
        "score_chosen": round(totals[id(best)], 6),
        "score_rejected": round(totals[id(worst)], 6),
        "scores_chosen": {name: round(value, 6) for name, value in scores[id(best)].items()},
        "scores_rejected": {name: round(value, 6) for name, value in scores[id(worst)].items()},
        "candidates": len(candidates),
    }
    return _pair(row, best, worst, "best-and-worst", notes)


def _too_few(different: Sequence[Candidate]) -> str:
    return "all its answers are the same" if different else "its answers are blank"


def by_standing(
    row: PromptRow, candidates: Sequence[Candidate], found: Standing, judge: AnswerOrigin, criterion: str
) -> PreferencePair | str:
    """The pair that a judge's standing decides, over the candidates that it was asked about."""
    if found.best is None or found.worst is None:
        return found.reason
    notes = {
        "judge": judge.to_json(),
        "criterion": criterion,
        "wins": list(found.wins),
        "compared": found.compared,
        "same_place": found.same_place,
        "candidates": len(candidates),
    }
    return _pair(row, candidates[found.best], candidates[found.worst], "judged", notes)


def corrected(
    row: PromptRow, rejected: Candidate, chosen: Candidate | None, how: str, **notes: Any
) -> PreferencePair | str:
    """The model's own answer rejected, its correction chosen; None: nothing was to be corrected."""
    if not rejected.text.strip():
        return "its answer is blank"
    if chosen is None or chosen.text.strip() == rejected.text.strip():
        return "its answer needs no correction" if how != "edit" else "its answer was not edited"
    if not chosen.text.strip():
        return "the correction is blank"
    return _pair(row, chosen, rejected, how, notes)


def substituted(candidate: Candidate, substitutions: Sequence[Substitution]) -> Candidate:
    """The candidate with every substitution made, in order."""
    text = candidate.text
    for substitution in substitutions:
        text = substitution.apply(text)
    return Candidate(text, replace(candidate.origin, by="substitution", time=now()))


def rewrite_request(prompt: Sequence[Message], answer: str, instruction: str = REWRITE) -> list[Message]:
    """What a stronger model is asked to rewrite an answer: one user turn."""
    said = "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in prompt)
    text = (
        f"Here is a conversation and an answer to its last turn.\n\n[Conversation]\n{said}\n\n[Answer]\n{answer}\n\n"
        f"{instruction}\nReply with the rewritten answer alone."
    )
    return [{"role": "user", "content": text}]


_LABEL = re.compile(r"\s*(?:\[?(?:rewritten |revised )?answer\]?:?|here(?:'s| is)[^\n:]{0,60}:)\s*\n?", re.IGNORECASE)


def without_thanks(text: str) -> str:
    """A rewrite without the label or the line of introduction that models put before it."""
    match = _LABEL.match(text)
    rest = text[match.end() :] if match else text
    return rest.strip() or text.strip()


class Edits:
    """A file in which a person corrects answers: written once, read when it is there.

    A row has `key`, `prompt`, `answer` (the model's own) and `edited`, which begins as a copy of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def key(row: PromptRow, candidate: Candidate) -> str:
        """What a row is known by, whatever the order of the file."""
        return f"{prompt_key(row.prompt).hex()}-{candidate.origin.seed}-{candidate.origin.sample}"

    def line(self, row: PromptRow, candidate: Candidate) -> str:
        """The row to be edited."""
        prompt = [dict(turn) for turn in row.prompt]
        shown = prompt[0]["content"] if len(prompt) == 1 else prompt
        value = {"key": self.key(row, candidate), "prompt": shown, "answer": candidate.text, "edited": candidate.text}
        return json.dumps(value, ensure_ascii=False)

    def read(self) -> dict[str, str]:
        """Key -> edited text. Raises InputError for broken rows, the first ten named."""
        log = ProblemLog()
        found = {}
        for row in read_rows(self.path, log):
            key, edited = row.value.get("key"), row.value.get("edited")
            if isinstance(key, str) and isinstance(edited, str):
                found[key] = edited
            else:
                log.add(f"{self.path}:{row.line}", 'must have "key" and "edited", both text')
        log.raise_if_any()
        return found
