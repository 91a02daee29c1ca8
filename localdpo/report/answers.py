"""Answers side by side, with the words that differ marked: before and after training, or of two runs.

Words are compared by `localdpo.data.worddiff`; white space alone makes no difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from localdpo.data.worddiff import different_words
from localdpo.evaluate.figures import group_of
from localdpo.report.formats import cut
from localdpo.report.markup import Child, Markup, joined, tag
from localdpo.report.record import Record
from localdpo.report.values import flag, items, number, object_at, text

__all__ = [
    "FIRST_ANSWERS",
    "MAX_ANSWERS",
    "Answer",
    "answer_groups",
    "answers_of",
    "common_answers",
    "different_answers",
    "marked_differences",
    "same_words",
]

MAX_ANSWERS, FIRST_ANSWERS = 120, 8
"""The most answers a group shows, and how many of them without asking."""

Span = tuple[int, int]
_RANKS: dict[tuple[bool | None, bool | None], int] = {(True, False): 0, (False, True): 1}


@dataclass(frozen=True, slots=True)
class Answer:
    """Both answers to a prompt. `base_right` and `tuned_right` are None where nobody knows; `kl` is nats a token."""

    prompt: str
    group: str
    base: str
    tuned: str
    base_right: bool | None = None
    tuned_right: bool | None = None
    kl: float | None = None

    @property
    def same(self) -> bool:
        """Whether the answers differ in nothing but white space."""
        return same_words(self.base, self.tuned)


def answers_of(record: Record) -> list[Answer]:
    """The answers of eval.json, else those that training left."""
    found = items(object_at(record.evaluation, "drift").get("answers"))
    if found:
        return [
            Answer(
                text(row.get("prompt")),
                text(row.get("group")) or "probes",
                text(row.get("base")),
                text(row.get("tuned")),
                flag(row.get("base_right")),
                flag(row.get("tuned_right")),
                number(row.get("kl")),
            )
            for row in found
        ]
    return [
        Answer(_conversation(s.prompt), group_of(s), s.base, s.tuned, s.base_right, s.tuned_right)
        for s in record.samples
    ]


def _conversation(messages: Sequence[dict[str, str]]) -> str:
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    return "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in messages)


def answer_groups(record: Record) -> list[tuple[str, list[Answer]]]:
    """Answers by their group: what went wrong first, then what became right, then what changed, then what stayed."""
    groups: dict[str, list[Answer]] = {}
    for answer in answers_of(record):
        groups.setdefault(answer.group, []).append(answer)

    def order(answer: Answer) -> tuple[int, bool]:
        return _RANKS.get((answer.base_right, answer.tuned_right), 2), answer.same

    return [(name, sorted(group, key=order)) for name, group in groups.items()]


def common_answers(first: Record, second: Record) -> list[tuple[Answer, Answer]]:
    """What two runs answer to the prompts that both were asked, different answers first."""
    left = {answer.prompt: answer for answer in answers_of(first)}
    both = [(left[answer.prompt], answer) for answer in answers_of(second) if answer.prompt in left]
    return sorted(both, key=lambda pair: same_words(pair[0].tuned, pair[1].tuned))


def different_answers(both: Sequence[tuple[Answer, Answer]]) -> int:
    """How many of two runs' answers are not the same."""
    return sum(not same_words(a.tuned, b.tuned) for a, b in both)


def same_words(first: str, second: str) -> bool:
    """Whether two texts differ in nothing but white space."""
    return first.split() == second.split()


def marked_differences(before: str, after: str) -> tuple[Markup, Markup]:
    """Both texts, cut to what a page shows, with the words that only one of them has inside `del` and `ins`."""
    before, after = cut(before), cut(after)
    gone, new = different_words(before, after)
    return _marked(before, gone, "del"), _marked(after, new, "ins")


def _marked(words: str, spans: Iterable[Span], element: str) -> Markup:
    parts: list[Child] = []
    done = 0
    for start, end in spans:
        parts += [words[done:start], tag(element, words[start:end])]
        done = end
    return joined([*parts, words[done:]])
