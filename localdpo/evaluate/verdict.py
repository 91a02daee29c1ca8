"""The verdict: did a run learn its preference, and did it keep what it knew. Words, with the figures behind each.

Learned / partly / not is decided by

- held-out pairs: *learned* when at least 75 % of them are preferred more than the base prefers them and their odds
  grew by 1 nat (a factor e) or more, with an accuracy whose interval lies above 50 %; *not* below 60 % or below 0.3
  nats; *partly* in between. Accuracy alone would not do: it counts signs, and two steps already turn those.
- probes that ask for what was taught: *learned* when at least 70 % of the answers are right and the interval lies
  above the base's share; *not* when the base's share is within the interval; *partly* in between.

When both speak, what people see (the answers) is not outvoted by log-probs nor the other way round: the run has
learned when neither says otherwise, and partly when they differ. Held-out pairs that are only too few to tell do not
count against probes that can. Where there is neither, the training pairs say at best *partly*: nothing shows that
what was learned carries over.

Kept / drifted / broken is the worst word of the figures there are, each with two limits (`KEPT_LIMITS`): facts kept,
taught phrases in unrelated answers, repetition, KL to the base a token on unrelated prompts or, from training
alone, how much less likely the base's own answers to retain prompts became, and how much less likely the chosen
answers did. A share of fewer than five answers is left out. How the limits were found is in docs/eval.md.

A question without any figure is answered by None, and the line says that it could not be judged. This module knows
figures, neither files nor models, and never loads mlx.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

from localdpo.evaluate.intervals import Figure, figure_from_json

__all__ = ["KEPT_LIMITS", "Evidence", "Kept", "Learned", "Limits", "Reason", "Verdict", "judge", "verdict_from_json"]

Learned = Literal["learned", "partly", "not"]
Kept = Literal["kept", "drifted", "broken"]

ACCURACY, ACCURACY_NOT, CHANCE = 0.75, 0.6, 0.5
NATS, NATS_NOT = 1.0, 0.3
TAUGHT = 0.7
LEAST = 5
"""A share of fewer answers than this decides nothing."""


class Limits(NamedTuple):
    """A figure is *kept* up to ``kept`` and *broken* from ``broken`` on; the other way round where kept > broken."""

    kept: float
    broken: float

    def word(self, value: float) -> Kept:
        """The word for ``value``."""
        sign = 1 if self.kept < self.broken else -1
        if sign * value <= sign * self.kept:
            return "kept"
        return "broken" if sign * value >= sign * self.broken else "drifted"


KEPT_LIMITS = {
    "facts kept": Limits(0.85, 0.5),
    "leakage": Limits(0.1, 0.5),
    "repetition": Limits(0.1, 0.3),
    "KL a token": Limits(1.0, 3.0),
    "retain drift": Limits(0.3, 1.0),
    "chosen log-prob": Limits(1.25, 2.0),
}
"""By the name of the figure. Repetition is its rise over the base's; the last is NLL now over NLL before."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The figures there are; None for those there are not.

    ``accuracy`` and ``nats`` are of ``pairs`` held-out pairs: the share preferred more than before, and by how many
    nats the odds of chosen against rejected grew, a pair; ``trained_*`` are the same of training pairs. ``taught``
    and ``taught_base`` are shares of ``taught_count`` answers, ``facts`` of ``facts_count`` that the base had right,
    ``leakage`` of ``unrelated`` answers. ``repetition`` is the rise over the base's. ``kl`` and ``retain_drift`` are
    nats a token. ``chosen_nll`` is the chosen answers' NLL now over what it was.
    """

    accuracy: Figure | None = None
    nats: Figure | None = None
    pairs: int = 0
    trained_accuracy: float | None = None
    trained_nats: float | None = None
    taught: Figure | None = None
    taught_base: float = 0.0
    taught_count: int = 0
    facts: Figure | None = None
    facts_count: int = 0
    leakage: Figure | None = None
    unrelated: int = 0
    repetition: Figure | None = None
    kl: Figure | None = None
    retain_drift: float | None = None
    chosen_nll: float | None = None


@dataclass(frozen=True, slots=True)
class Reason:
    """What one figure says: ``word`` is the word it speaks for, ``threshold`` the limit it was held to."""

    word: Learned | Kept
    figure: str
    value: float
    low: float | None
    high: float | None
    threshold: float
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Both words (None: could not be judged), one line for people, and the reasons, those that decided first."""

    learned: Learned | None
    kept: Kept | None
    words: str
    reasons: tuple[Reason, ...] = ()

    @property
    def short(self) -> str:
        """Both words, "?" for one that could not be judged: ``learned, kept``."""
        return ", ".join(word or "?" for word in (self.learned, self.kept))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "reasons": [asdict(reason) for reason in self.reasons]}


_LEARNED_LABELS: dict[Learned | None, str] = {
    "learned": "learned",
    "partly": "partly learned",
    "not": "not learned",
    None: "whether it learned could not be judged",
}
_KEPT_LABELS: dict[Kept | None, str] = {
    "kept": "kept what it knew",
    "drifted": "drifted",
    "broken": "broken",
    None: "what it kept could not be judged",
}
_NO_LEARNED = "no pair was held out and no probe asks for what was taught"
_NO_KEPT = "no probe or retain prompt asks for anything else"


def judge(evidence: Evidence) -> Verdict:
    """The verdict on ``evidence``."""
    learned, learned_reasons = _learned(evidence)
    kept_reasons = sorted(_kept_reasons(evidence), key=lambda reason: -get_args(Kept).index(reason.word))
    kept: Kept | None = kept_reasons[0].word if kept_reasons else None  # type: ignore[assignment]
    said = [
        learned_reasons[0].text if learned_reasons else _NO_LEARNED,
        _because(kept_reasons) if kept_reasons else _NO_KEPT,
    ]
    words = f"{_LEARNED_LABELS[learned]}, {_KEPT_LABELS[kept]}: {'; '.join(said)}"
    return Verdict(learned, kept, words, (*learned_reasons, *kept_reasons))


def _because(reasons: Sequence[Reason]) -> str:
    """The reasons that decided, two at most: where all is kept, one says enough."""
    worst = [reason for reason in reasons if reason.word == reasons[0].word]
    return " and ".join(reason.text for reason in worst[: 1 if worst[0].word == "kept" else 2])


def _learned(evidence: Evidence) -> tuple[Learned | None, list[Reason]]:
    held_out, too_few = _held_out(evidence)
    probed = _probed(evidence)
    if probed is None and held_out is None:
        trained = _trained(evidence)
        return (trained.word, [trained]) if trained is not None else (None, [])  # type: ignore[return-value]
    reasons = [reason for reason in (probed, held_out) if reason is not None]
    words = {reason.word for reason in reasons}
    if probed is not None and too_few:
        words = {probed.word}
    # The reason that speaks for the word comes first.
    word: Learned = words.pop() if len(words) == 1 else "partly"  # type: ignore[assignment]
    return word, sorted(reasons, key=lambda reason: reason.word != word)


def _held_out(evidence: Evidence) -> tuple[Reason | None, bool]:
    """What the held-out pairs say, and whether they only are too few to say more."""
    accuracy, nats = evidence.accuracy, evidence.nats
    if accuracy is None:
        return None, False
    grown = nats.value if nats is not None else None
    strong = accuracy.value >= ACCURACY and (grown is None or grown >= NATS)
    sure = accuracy.low is None or accuracy.low > CHANCE
    if accuracy.value < ACCURACY_NOT or (grown is not None and grown < NATS_NOT):
        word: Learned = "not"
    else:
        word = "learned" if strong and sure else "partly"
    odds = "" if grown is None else f", their odds {_odds(grown)}"
    pairs = _count(evidence.pairs, "held-out pair") if evidence.pairs else "the held-out pairs"
    text = f"{accuracy.value:.0%} of {pairs} preferred more than before{odds}"
    too_few = strong and not sure
    if too_few:
        text += ", too few to be sure"
    if grown is not None and grown < NATS and accuracy.value >= ACCURACY_NOT:
        reason = _reason(word, "held-out odds in nats", nats, NATS_NOT if word == "not" else NATS, text)
    else:
        reason = _reason(word, "held-out accuracy", accuracy, ACCURACY_NOT if word == "not" else ACCURACY, text)
    return reason, too_few


def _odds(nats: float) -> str:
    """How odds grew by ``nats``, in words."""
    return f"grew by {nats:.1f} nats" if nats >= 0 else f"fell by {-nats:.1f} nats"


def _probed(evidence: Evidence) -> Reason | None:
    taught = evidence.taught
    if taught is None or evidence.taught_count == 0:
        return None
    beyond_base = taught.low is not None and taught.low > evidence.taught_base
    word: Learned = "not"
    if beyond_base:
        word = "learned" if taught.value >= TAUGHT else "partly"
    right = round(taught.value * evidence.taught_count)
    before = round(evidence.taught_base * evidence.taught_count)
    text = f"{right} of {evidence.taught_count} answers are as taught, the base's {before}"
    return _reason(word, "taught answers", taught, TAUGHT if beyond_base else evidence.taught_base, text)


def _trained(evidence: Evidence) -> Reason | None:
    if evidence.trained_accuracy is None:
        return None
    grown = evidence.trained_nats
    weak = evidence.trained_accuracy < ACCURACY or (grown is not None and grown < NATS)
    text = f"{evidence.trained_accuracy:.0%} of the pairs trained on are preferred more than before"
    if grown is not None:
        text += f", their odds {_odds(grown)}"
    text += "" if weak else "; nothing was held out to show that it carries over"
    return Reason(
        "not" if weak else "partly", "training accuracy", evidence.trained_accuracy, None, None, ACCURACY, text
    )


def _kept_reasons(evidence: Evidence) -> Iterator[Reason]:
    facts, leakage, repetition = evidence.facts, evidence.leakage, evidence.repetition
    if facts is not None and evidence.facts_count >= LEAST:
        still = f"{round(facts.value * evidence.facts_count)} of {evidence.facts_count}"
        yield _graded("facts kept", facts, f"{still} answers that were right still are")
    if leakage is not None and evidence.unrelated >= LEAST:
        said = f"{round(leakage.value * evidence.unrelated)} of {evidence.unrelated}"
        yield _graded("leakage", leakage, f"{said} unrelated answers say what was taught")
    if repetition is not None:
        text = f"{repetition.value:+.0%} repetition in its answers"
        yield _graded("repetition", repetition, text)
    if evidence.kl is not None:
        text = f"{evidence.kl.value:.2f} nats a token away from the base on unrelated prompts"
        yield _graded("KL a token", evidence.kl, text)
    elif evidence.retain_drift is not None:
        drift, more = abs(evidence.retain_drift), "less" if evidence.retain_drift >= 0 else "more"
        text = f"the base's own answers are {drift:.2f} nats a token {more} likely"
        yield _graded("retain drift", Figure(evidence.retain_drift), text)
    if evidence.chosen_nll is not None:
        text = f"the chosen answers' negative log-likelihood is {evidence.chosen_nll:.1f} times what it was"
        yield _graded("chosen log-prob", Figure(evidence.chosen_nll), text)


def _graded(name: str, figure: Figure, text: str) -> Reason:
    limits = KEPT_LIMITS[name]
    word = limits.word(figure.value)
    return _reason(word, name, figure, limits.broken if word == "broken" else limits.kept, text)


def _reason(word: Learned | Kept, name: str, figure: Figure | None, threshold: float, text: str) -> Reason:
    assert figure is not None
    return Reason(word, name, figure.value, figure.low, figure.high, threshold, text)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def verdict_from_json(data: Any) -> Verdict | None:
    """The verdict that ``to_json`` described; None for anything else, as a file may come from anywhere."""
    if not isinstance(data, Mapping) or not isinstance(data.get("words"), str):
        return None
    learned, kept = data.get("learned"), data.get("kept")
    if learned not in (*get_args(Learned), None) or kept not in (*get_args(Kept), None):
        return None
    rows = data.get("reasons")
    reasons = [_reason_from_json(row) for row in rows] if isinstance(rows, list) else []
    return Verdict(learned, kept, data["words"], tuple(reason for reason in reasons if reason is not None))


def _reason_from_json(row: Any) -> Reason | None:
    words = (*get_args(Learned), *get_args(Kept))
    try:
        figure = figure_from_json(row)
        if row["word"] not in words or figure is None:
            return None
        return _reason(row["word"], str(row["figure"]), figure, float(row["threshold"]), str(row["text"]))
    except (KeyError, TypeError, ValueError):
        return None
