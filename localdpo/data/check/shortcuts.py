"""What alone tells chosen from rejected answers: single words and formats, and all of them together.

DPO learns whatever separates the answers most easily. Three questions are asked of a sample of pairs:

- Does one feature stand in the chosen answers only, or in the rejected ones only? A sign test over prompts, corrected
  for the number of features tried, so that among few pairs nothing is found by luck.
- How well do all features together, without the answers' lengths, tell which answer was chosen? A ridge classifier on
  the differences between a pair's answers, cross-validated with all pairs of a prompt in one fold.
- Could that be luck? The classifier's accuracy against the same with the answers of random prompts swapped; the kernel
  form makes such a permutation one matrix product.

Nothing here knows whether a separation is meant. What `expected` names, is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from localdpo.data.check.chance import MIN_PROMPTS, Share, sign_test, wilson
from localdpo.data.check.features import Answers, FeatureTable, describe, feature_table, words_of
from localdpo.data.check.findings import Finding, Severity, found
from localdpo.data.language import is_common_word

__all__ = ["Feature", "Separation", "separation", "shortcut_findings", "single_features"]

_FOLDS, _PERMUTATIONS = 5, 400
_WIDTH = 1 << 12
_RIDGE = 0.5
_NOTICED, _STRONG = 0.66, 0.75
_SEPARABLE, _CLEARLY_SEPARABLE = 0.60, 0.90
_ALPHA = 0.01
_EXPECTED = "It is what these pairs are to teach"
_NAME = "It looks like a name, woven into the sentences: fine if it is what you teach"
_SHOWN, _NAMED = 5, 20
_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class Feature:
    """A feature that separates by itself.

    `chosen_share` and `rejected_share` are of pairs; `accuracy` is that of a classifier which knows this feature alone,
    every prompt counted once, ties as a half. `rows` are pairs in which one answer alone has it, in its own direction.
    """

    name: str
    chosen_share: float
    rejected_share: float
    accuracy: Share
    p_value: float
    rows: tuple[int, ...]
    also: list[str] = field(default_factory=list)
    surface: str = ""

    @property
    def text(self) -> str:
        """How a reader is told of it, a word as it is mostly written."""
        return describe(f"w:{self.surface}" if self.surface else self.name)

    @property
    def in_chosen(self) -> bool:
        """Whether the chosen answers are those that have it."""
        return self.chosen_share > self.rejected_share

    def to_json(self) -> dict[str, Any]:
        """Return its figures by name."""
        return {
            "feature": self.text,
            "also": [describe(name) for name in self.also],
            "chosen_share": round(self.chosen_share, 4),
            "rejected_share": round(self.rejected_share, 4),
            "accuracy": round(self.accuracy.value, 4),
            "accuracy_interval": [round(self.accuracy.low, 4), round(self.accuracy.high, 4)],
            "p_value": self.p_value,
        }


@dataclass(frozen=True, slots=True)
class Separation:
    """How well all features together tell answers apart on prompts not learned from, and the features that do most."""

    accuracy: Share
    p_value: float
    top: tuple[tuple[str, float], ...]


def single_features(sample: Sequence[Answers], table: FeatureTable | None = None) -> list[Feature]:
    """Return the features that separate the sample by themselves, the best first, related ones under the best of them.

    A feature that the longer answers have merely because they are longer is left out.
    """
    table = table or feature_table(sample)
    view = _View(sample, table)
    weighted = np.bincount(view.feature, view.sign * view.weights[view.pair], minlength=len(table.names))
    leaning = weighted / view.weights.sum()
    promising = np.flatnonzero(0.5 + np.abs(leaning) / 2 >= _NOTICED)
    features = [view.feature_at(int(number), float(leaning[number])) for number in promising]
    certain = [feature for feature in features if feature is not None]
    return _related(sorted(certain, key=lambda f: (-f.accuracy.value, not f.name.startswith("w"), f.name)))


class _View:
    """The features of a sample that one answer of a pair has alone, sorted by feature."""

    def __init__(self, sample: Sequence[Answers], table: FeatureTable) -> None:
        pair, feature, sign = table.alone()
        order = np.argsort(feature, kind="stable")
        self.sample, self.table = sample, table
        self.pair, self.feature, self.sign = pair[order], feature[order], sign[order]
        self.groups = np.unique([answers.group for answers in sample], return_inverse=True)[1]
        self.weights = 1 / np.bincount(self.groups)[self.groups]
        self.longer = np.array([np.sign(len(a.chosen) - len(a.rejected)) for a in sample])

    def feature_at(self, number: int, leaning: float) -> Feature | None:
        """Return the feature of that number if it separates for certain and not by length."""
        span = slice(*np.searchsorted(self.feature, (number, number + 1)))
        index, sign = self.pair[span], self.sign[span]
        votes = np.bincount(self.groups[index], sign, minlength=1)
        p_value = min(1.0, self.table.tried * sign_test(int((votes > 0).sum()), int((votes < 0).sum())))
        if p_value > _ALPHA or self._comes_with_length(index, sign, leaning):
            return None
        entries = self.table.sign[self.table.feature == number]
        shares = [float((entries == which).sum()) / len(self.sample) for which in (1, -1)]
        rows = tuple(self.sample[i].line for i in index[sign == np.sign(leaning)])
        accuracy = wilson(0.5 + abs(leaning) / 2, float(self.weights.sum()))
        return Feature(self.table.names[number], shares[0], shares[1], accuracy, p_value, rows)

    def _comes_with_length(self, index: _Ints, sign: _Ints, leaning: float) -> bool:
        """Whether the answer that has it is nearly always the longer one, and length separates as well."""
        by_length = abs(float((self.longer * self.weights).sum()) / float(self.weights.sum()))
        together = float((self.longer[index] == sign).mean())
        return together > 0.9 and by_length >= 0.9 * abs(leaning)


def _related(features: Sequence[Feature]) -> list[Feature]:
    """Put features that stand in mostly the same rows under the first of them."""
    heads: list[Feature] = []
    for feature in features:
        rows = set(feature.rows)
        for head in heads:
            shared = len(rows.intersection(head.rows))
            if head.in_chosen == feature.in_chosen and shared >= 0.9 * len(rows):
                head.also.append(feature.name)
                break
        else:
            heads.append(feature)
    return heads


def separation(sample: Sequence[Answers], table: FeatureTable | None = None, seed: int = 0) -> Separation | None:
    """Cross-validate a classifier on all features; None with too few prompts to say anything."""
    table = table or feature_table(sample)
    groups = np.unique([answers.group for answers in sample], return_inverse=True)[1]
    prompts = int(groups.max()) + 1 if len(groups) else 0
    if prompts < MIN_PROMPTS:
        return None
    kernel = _kernel(table, len(sample))
    rng = np.random.default_rng(seed)
    folds = rng.permutation(prompts)[groups] % _FOLDS
    by_prompt = np.bincount(groups)
    # Row 0 is the file as it is; in every other row the answers of random prompts are swapped.
    swaps = np.where(rng.random((_PERMUTATIONS, prompts)) < 0.5, -1.0, 1.0)
    signs = np.concatenate((np.ones((1, len(groups))), swaps[:, groups]))
    scores = np.zeros_like(signs)
    ridge = _RIDGE * float(np.trace(kernel)) / len(groups)
    for fold in range(_FOLDS):
        test, train = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        solved = np.linalg.solve(kernel[np.ix_(train, train)] + ridge * np.eye(len(train)), signs[:, train].T)
        scores[:, test] = signs[:, test] * (kernel[np.ix_(test, train)] @ solved).T
    right = 0.5 + np.where(np.abs(scores) < 1e-9, 0.0, np.sign(scores)) / 2
    accuracies = (right / by_prompt[groups]).sum(axis=1) / prompts
    p_value = float((1 + (accuracies[1:] >= accuracies[0]).sum()) / (1 + _PERMUTATIONS))
    alpha: _Floats = np.linalg.solve(kernel + ridge * np.eye(len(groups)), np.ones(len(groups))).astype(np.float64)
    return Separation(wilson(float(accuracies[0]), prompts), p_value, _top_features(table, alpha))


def _kernel(table: FeatureTable, pairs: int) -> _Floats:
    """Inner products of the pairs' differences in features, hashed to a fixed width; [pairs, pairs]."""
    places = table.feature * 0x9E3779B1 >> 7
    column, flip = places % _WIDTH, 1 - 2 * (places // _WIDTH % 2)
    cells = np.bincount(table.pair * _WIDTH + column, table.sign * flip * table.value, minlength=pairs * _WIDTH).astype(
        np.float32
    )
    rows = cells.reshape(pairs, _WIDTH)
    return (rows @ rows.T).astype(np.float64)


def _top_features(table: FeatureTable, alpha: _Floats) -> tuple[tuple[str, float], ...]:
    weights = np.bincount(table.feature, table.sign * table.value * alpha[table.pair], minlength=len(table.names))
    best = np.argsort(-np.abs(weights), kind="stable")[:_SHOWN]
    return tuple((table.names[i], float(weights[i])) for i in best)


def shortcut_findings(
    sample: Sequence[Answers], total: int, expected: Collection[str] = ()
) -> tuple[list[Finding], Feature | None]:
    """Return findings, and the best feature that is expected, if one of them is.

    `total` is how many pairs the sample stands for; `expected` lists words or phrases that the pairs are to teach.
    """
    if len({answers.group for answers in sample}) < MIN_PROMPTS:
        return [], None
    meant = {word for text in expected for word in _telling_words(text)}
    table = feature_table(sample)
    features = single_features(sample, table)
    for feature in features:
        feature.surface = surface_of(feature, sample)
    purpose = [_purpose(feature, meant, sample) for feature in features]
    taught = next((f for f, why in zip(features, purpose, strict=True) if why), None)
    findings = [
        _feature_finding(f, why, taught, len(sample), total)
        for f, why in list(zip(features, purpose, strict=True))[:_SHOWN]
    ]
    whole = separation(sample, table)
    if whole is not None:
        findings += _separation_findings(whole, taught, features, len(sample), total)
    return findings, taught


def _telling_words(text: str) -> list[str]:
    """Return the words of an expected text; of several those that are not in every other sentence."""
    words = words_of(text)
    return words if len(words) == 1 else [word for word in words if not is_common_word(word)]


def _purpose(feature: Feature, meant: AbstractSet[str], sample: Sequence[Answers]) -> str:
    """Return why a feature may be what the pairs are to teach, nothing when there is no sign of it."""
    if _is_expected(feature, meant):
        return _EXPECTED
    return _NAME if feature.in_chosen and looks_like_name(feature, sample) else ""


def _is_expected(feature: Feature, meant: AbstractSet[str]) -> bool:
    names = [feature.name, *feature.also]
    return any(not name.startswith("f:") and not meant.isdisjoint(words_of(name[2:])) for name in names)


def _of(size: int, total: int) -> str:
    return f"{size:,} pairs" if size == total else f"a sample of {size:,} of {total:,} pairs"


def _feature_finding(feature: Feature, purpose: str, taught: Feature | None, size: int, total: int) -> Finding:
    where = "chosen" if feature.in_chosen else "rejected"
    also = f" (and with it {', '.join(map(describe, feature.also[:3]))})" if feature.also else ""
    message = (
        f"{feature.text}{also} is in {feature.chosen_share:.0%} of the chosen and "
        f"{feature.rejected_share:.0%} of the rejected answers of {_of(size, total)}. By itself it tells the {where} "
        f"answer for {feature.accuracy} of the prompts"
    )
    weaker = taught is not None and taught.accuracy.value >= feature.accuracy.value
    if purpose:
        message += f". {purpose}"
    elif weaker and taught is not None:
        message += f". What you teach ({taught.text}) tells more, so this may just come with it"
    else:
        message += ": DPO may learn this instead of what you prefer"
    strong = feature.accuracy.low >= _NOTICED and feature.accuracy.value >= _STRONG
    severity = Severity.WARNING if strong and not purpose and not weaker else Severity.INFO
    fix = "" if purpose == _EXPECTED else None
    return found("shortcut", message, feature.rows[:_NAMED], severity=severity, fix=fix, **feature.to_json())


def surface_of(feature: Feature, sample: Sequence[Answers]) -> str:
    """Return how the word of a feature is mostly written, nothing for features that are no single word."""
    kind, _, word = feature.name.partition(":")
    forms = (
        Counter(form for text in _texts_with(feature, sample) for form in _forms(word, text)) if kind == "w" else None
    )
    return forms.most_common(1)[0][0] if forms else ""


def _texts_with(feature: Feature, sample: Sequence[Answers]) -> Iterator[str]:
    rows = set(feature.rows)
    return (a.chosen if feature.in_chosen else a.rejected for a in sample if a.line in rows)


def _forms(word: str, text: str) -> list[str]:
    return re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)


def looks_like_name(feature: Feature, sample: Sequence[Answers]) -> bool:
    """Return whether a word is written like a name: a capital and small letters within sentences, after various words.

    A filler put at the start or at one place of the answers is not, nor is a word that is written small anywhere.
    """
    form = feature.surface
    if not form[:1].isupper() or not form[1:].islower():
        return False
    if any(form.lower() in _forms(form, text) for a in sample for text in (a.chosen, a.rejected)):
        return False
    inside = re.compile(rf"([^\W_]+),? {re.escape(form)}(?!\w)")
    before = Counter(match.lower() for text in _texts_with(feature, sample) for match in inside.findall(text))
    return before.total() >= 0.5 * len(feature.rows) and len(before) >= 4


def _separation_findings(
    whole: Separation, taught: Feature | None, features: Sequence[Feature], size: int, total: int
) -> Iterator[Finding]:
    if whole.p_value > _ALPHA or whole.accuracy.low < _SEPARABLE:
        return
    clear = whole.accuracy.low >= _CLEARLY_SEPARABLE
    severity = Severity.WARNING if clear and taught is None else Severity.INFO
    top = ", ".join(f"{describe(name)} ({'chosen' if weight > 0 else 'rejected'})" for name, weight in whole.top)
    message = (
        f"words and formats alone, without length, tell the chosen answer for {whole.accuracy} of the prompts of "
        f"{_of(size, total)} that they were not learned from (chance is 50%, p = {whole.p_value:.2g} by permutation). "
        f"Most telling: {top}"
    )
    if taught is not None:
        message += f". What you teach ({taught.text}) is one of them, so this need not be bad"
    yield found(
        "separable",
        message,
        _rows_with([name for name, _ in whole.top], features),
        severity=severity,
        fix="" if taught is not None else None,
        accuracy=round(whole.accuracy.value, 4),
        accuracy_interval=[round(whole.accuracy.low, 4), round(whole.accuracy.high, 4)],
        p_value=whole.p_value,
        top=[{"feature": describe(name), "weight": round(weight, 4)} for name, weight in whole.top],
    )


def _rows_with(names: Collection[str], features: Sequence[Feature]) -> list[int]:
    rows = {line for feature in features if feature.name in names for line in feature.rows}
    return sorted(rows)[:_NAMED]
