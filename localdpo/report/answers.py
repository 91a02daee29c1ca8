"""Answers side by side, with the words that differ marked: before and after training, or of two runs.

Words are compared by `localdpo.data.worddiff`; white space alone makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from localdpo.data.worddiff import different_words
from localdpo.evaluate.figures import group_of
from localdpo.report.markup import Child, Markup, tag
from localdpo.report.parts import chip, cut, fold, missing, note, section
from localdpo.report.record import Record
from localdpo.report.values import flag, items, number, object_at, text
from localdpo.series import number_text

__all__ = ["MAX_ANSWERS", "Answer", "answers_of", "answers_section", "compared_answers_section", "marked"]

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
        return self.base.split() == self.tuned.split()


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


def marked(words: str, spans: Iterable[Span], element: str) -> list[Child]:
    """`words` with the stretches in `spans` inside `element` ("ins" or "del")."""
    parts: list[Child] = []
    done = 0
    for start, end in spans:
        parts += [words[done:start], tag(element, words[start:end])]
        done = end
    return [*parts, words[done:]]


def _groups(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.group, []).append(answer)
    return groups


def _order(answer: Answer) -> tuple[int, bool]:
    """What went wrong first, then what became right, then what changed, then what stayed."""
    became = (answer.base_right, answer.tuned_right)
    return _RANKS.get(became, 2), answer.same


def answers_section(record: Record) -> Markup:
    """Base and tuned answers to the same prompts."""
    answers = answers_of(record)
    if not answers:
        what = "There are no answers to compare."
        command = f"localdpo eval {record.argument}" if record.has_adapter else ""
        return section("answers", "Answers before and after", missing(what, command))
    return section(
        "answers",
        "Answers before and after",
        note("Words only the base says are ", tag("del", "dotted"), "; words only the tuned model says are ",
             tag("ins", "underlined"), ". What went wrong comes first."),
        [_group(name, sorted(group, key=_order), _card) for name, group in _groups(answers).items()],
    )  # fmt: skip


def _group(name: str, answers: list[Answer], card: Callable[[Answer], Markup]) -> Markup:
    same = sum(answer.same for answer in answers)
    heading = tag("h3", name, " ", tag("small", f"{len(answers):,} prompts, {same:,} answered the same"))
    first, rest = answers[:FIRST_ANSWERS], answers[FIRST_ANSWERS:MAX_ANSWERS]
    left = len(answers) - len(first) - len(rest)
    return tag(
        "div",
        heading,
        [card(answer) for answer in first],
        fold(f"{len(rest):,} more", [card(answer) for answer in rest], class_="more") if rest else None,
        note(f"{left:,} more are not shown.") if left > 0 else None,
    )


def _card(answer: Answer) -> Markup:
    prompt = tag("p", cut(answer.prompt), class_="prompt")
    chips = [_verdict(answer), tag("span", f"KL {number_text(answer.kl)}", class_="quiet") if answer.kl else None]
    if answer.same:
        sides: list[Child] = [_side("Base and tuned", cut(answer.base), answer.tuned_right)]
    else:
        base, tuned = cut(answer.base), cut(answer.tuned)
        gone, new = different_words(base, tuned)
        sides = [
            _side("Base", marked(base, gone, "del"), answer.base_right),
            _side("Tuned", marked(tuned, new, "ins"), answer.tuned_right),
        ]
    return tag("article", tag("header", prompt, chips), tag("div", sides, class_=f"sides n{len(sides)}"))


def _verdict(answer: Answer) -> Markup | None:
    match answer.base_right, answer.tuned_right:
        case True, False:
            return chip("no longer right", "bad")
        case False, True:
            return chip("now right", "good")
    return chip("same answer") if answer.same else None


def _side(name: str, words: Child, right: bool | None = None) -> Markup:
    said = {True: " ✓ right", False: " ✗ not right", None: ""}[right]
    shown = words if words else tag("em", "(empty)")
    return tag("div", tag("h4", name, tag("small", said)), tag("p", shown, class_="said"), class_="side")


def compared_answers_section(first: Record, second: Record, names: Sequence[str]) -> Markup:
    """What two runs answer to the prompts that both were asked, with their differences from each other."""
    left = {answer.prompt: answer for answer in answers_of(first)}
    both = [(left[answer.prompt], answer) for answer in answers_of(second) if answer.prompt in left]
    title = "Answers of both"
    if not both:
        return section("answers", title, missing("The two runs have no prompt in common among their answers."))
    both.sort(key=lambda pair: pair[0].tuned.split() == pair[1].tuned.split())
    differ = sum(a.tuned.split() != b.tuned.split() for a, b in both)
    cards = [_compared_card(a, b, names) for a, b in both[:MAX_ANSWERS]]
    return section(
        "answers",
        title,
        note(f"{len(both):,} prompts were put to both; {differ:,} answers differ. Words that only ", names[0],
             " says are ", tag("del", "dotted"), ", words that only ", names[1], " says are ",
             tag("ins", "underlined"), "."),
        cards[:FIRST_ANSWERS],
        fold(f"{len(cards) - FIRST_ANSWERS:,} more", cards[FIRST_ANSWERS:], class_="more")
        if len(cards) > FIRST_ANSWERS else None,
        note(f"{len(both) - MAX_ANSWERS:,} more are not shown.") if len(both) > MAX_ANSWERS else None,
    )  # fmt: skip


def _compared_card(first: Answer, second: Answer, names: Sequence[str]) -> Markup:
    a, b = cut(first.tuned), cut(second.tuned)
    gone, new = different_words(a, b)
    sides = [
        _side("Base", cut(first.base), first.base_right),
        _side(names[0], marked(a, gone, "del"), first.tuned_right),
        _side(names[1], marked(b, new, "ins"), second.tuned_right),
    ]
    return tag("article", tag("header", tag("p", cut(first.prompt), class_="prompt")),
               tag("div", sides, class_="sides n3"))  # fmt: skip
