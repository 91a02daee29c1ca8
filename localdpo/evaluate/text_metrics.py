"""Metrics of answers against what was expected: classification, question answering and generated text.

Pure functions of texts and labels: no model, no files, no download. BLEU and chrF are sacrebleu's (the extra `eval`),
whose tokenisers and smoothing are what published figures mean; the rest is computed here and agrees with
scikit-learn, the SQuAD script, rouge-score and NLTK on what those cover. Chinese and Japanese count by character, where
those libraries find no words at all. Every figure says how alike texts are, none whether an answer is good.
"""

from __future__ import annotations

import importlib
import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from localdpo.errors import EnvironmentFault, Problem
from localdpo.evaluate.stemming import stem

__all__ = [
    "ClassScores",
    "CorpusScore",
    "accuracy",
    "bleu",
    "chrf",
    "classification_scores",
    "exact_match",
    "has_sacrebleu",
    "meteor",
    "normalise_answer",
    "rouge",
    "token_f1",
    "words",
]

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_ANSWER_TOKEN = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_ASCII_PUNCTUATION = frozenset(string.punctuation)

_BY_CHARACTER = {"zh": "zh", "ja": "char", "th": "char", "ko": "char"}
BOOTSTRAPS = 1000
"""Resamples behind sacrebleu's interval."""


def words(text: str) -> list[str]:
    """The words of a text for ROUGE, METEOR and overlap: lower-cased letters and digits, CJK one character each."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def accuracy(expected: Sequence[Hashable], answered: Sequence[Hashable]) -> float:
    """The share of equal entries, 0 of none. Raises ValueError for unequal lengths."""
    pairs = list(zip(expected, answered, strict=True))
    return sum(right == said for right, said in pairs) / len(pairs) if pairs else 0.0


@dataclass(frozen=True, slots=True)
class ClassScores:
    """F1 by label, their plain mean, and that of all counts together, as scikit-learn's with these labels."""

    per_class: dict[str, float]
    macro_f1: float
    micro_f1: float


def classification_scores(
    expected: Sequence[str], answered: Sequence[str | None], labels: Sequence[str] = ()
) -> ClassScores:
    """F1 = 2 tp / (2 tp + fp + fn) over ``labels``, by default those expected or answered, in that order.

    None is an answer that names no label: wrong for the label that was expected, and nobody's false positive. A label
    that is neither expected nor answered has F1 0. Raises ValueError for unequal lengths.
    """
    pairs = list(zip(expected, answered, strict=True))
    names = list(labels) or list(dict.fromkeys([*expected, *(said for said in answered if said is not None)]))
    hits = Counter(right for right, said in pairs if right == said)
    wanted, given = Counter(expected), Counter(said for said in answered if said is not None)
    per_class = {name: _ratio(2 * hits[name], wanted[name] + given[name]) for name in names}
    tp = sum(hits[name] for name in names)
    counted = sum(wanted[name] + given[name] for name in names)
    return ClassScores(per_class, _ratio(sum(per_class.values()), len(names)), _ratio(2 * tp, counted))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def normalise_answer(text: str) -> str:
    """An answer without case, punctuation, the articles a, an and the, and spare white space.

    The steps of the SQuAD script (Rajpurkar et al. 2016, arXiv:1606.05250); punctuation outside ASCII goes too, and
    full-width letters become plain ones.
    """
    plain = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(c for c in plain if c not in _ASCII_PUNCTUATION and not unicodedata.category(c).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 when the normalised answer is one of ``accepted``, else 0."""
    return float(normalise_answer(answer) in {normalise_answer(text) for text in accepted})


def token_f1(answer: str, accepted: Sequence[str]) -> float:
    """The best F1 of the answer's tokens over ``accepted``, as SQuAD counts: words, or characters of CJK."""
    return max((_overlap_f1(_answer_tokens(answer), _answer_tokens(text)) for text in accepted), default=0.0)


def _answer_tokens(text: str) -> list[str]:
    return _ANSWER_TOKEN.findall(normalise_answer(text))


def _overlap_f1(one: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    """F1 of two bags; 1 of two empty ones, since they are equal."""
    if not one and not other:
        return 1.0
    return _ratio(2 * _common(one, other), len(one) + len(other))


def _common(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    return (Counter(one) & Counter(other)).total()


def rouge(answer: str, references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L as F1 (Lin 2004), each of the reference that gives the highest. No stemming.

    ``rouge1`` and ``rouge2`` count common n-grams, ``rougeL`` is the longest common subsequence of the whole texts.
    """
    said = words(answer)
    best = {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    for reference in references:
        right = words(reference)
        found = {
            "rouge1": _rouge_n(said, right, 1),
            "rouge2": _rouge_n(said, right, 2),
            "rougeL": _ratio(2 * _common_subsequence(said, right), len(said) + len(right)),
        }
        best = {name: max(best[name], value) for name, value in found.items()}
    return best


def _rouge_n(said: Sequence[str], right: Sequence[str], n: int) -> float:
    one, other = _ngrams(said, n), _ngrams(right, n)
    return _ratio(2 * _common(one, other), len(one) + len(other))


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence, one row of the table at a time."""
    row = [0] * (len(other) + 1)
    for left in one:
        before = row
        row = [0]
        for number, right in enumerate(other):
            row.append(before[number] + 1 if left == right else max(row[number], before[number + 1]))
    return row[-1]


def meteor(answer: str, references: Sequence[str]) -> float:
    """METEOR (Lavie and Agarwal 2007) by exact words, then by stems; the best over the references, 0 to 1.

    F mean = P R / (0.9 P + 0.1 R), less a penalty of 0.5 (chunks / matches)^3. The stage of synonyms is left out: it
    needs WordNet, a download. So it equals NLTK's with an empty WordNet, and is a little lower than with a full one.
    """
    said = words(answer)
    return max((_meteor(said, words(reference)) for reference in references), default=0.0)


def _meteor(said: Sequence[str], right: Sequence[str]) -> float:
    matches = sorted(_aligned(said, right))
    if not matches:
        return 0.0
    precision, recall = len(matches) / len(said), len(matches) / len(right)
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    steps = pairwise(matches)
    chunks = 1 + sum((after[0] - before[0], after[1] - before[1]) != (1, 1) for before, after in steps)
    return mean * (1 - 0.5 * (chunks / len(matches)) ** 3)


def _aligned(said: Sequence[str], right: Sequence[str]) -> list[tuple[int, int]]:
    """Positions matched in both texts, each once: from the last word of the answer to the first, latest place first."""
    matches: list[tuple[int, int]] = []
    left = list(range(len(said)))
    free = list(range(len(right)))
    for form in (str, stem):
        places: dict[str, list[int]] = {}
        for j in free:
            places.setdefault(form(right[j]), []).append(j)
        found = [(i, places[form(said[i])].pop()) for i in reversed(left) if places.get(form(said[i]))]
        matches += found
        used = {i for i, _ in found}, {j for _, j in found}
        left, free = [i for i in left if i not in used[0]], [j for j in free if j not in used[1]]
    return matches


@dataclass(frozen=True, slots=True)
class CorpusScore:
    """A score of a whole set of answers, 0 to 100 as sacrebleu gives it, with its 95 % interval and signature.

    The interval is sacrebleu's: the mean of its resamples, give or take half the distance between their 2.5 % and
    97.5 % points; None when every resample is 0.
    """

    value: float
    low: float | None
    high: float | None
    signature: str


def has_sacrebleu() -> bool:
    """Whether sacrebleu can be imported."""
    try:
        importlib.import_module("sacrebleu.metrics")
    except ImportError:
        return False
    return True


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]], language: str | None = None) -> CorpusScore:
    """Corpus BLEU by sacrebleu: tokeniser 13a, by character for Chinese (zh), Japanese, Korean and Thai.

    ``references`` has one or more texts an answer. Raises EnvironmentFault when sacrebleu is not installed.
    """
    tokenize = _BY_CHARACTER.get((language or "en").lower().partition("-")[0], "13a")
    return _corpus(_sacrebleu().BLEU(tokenize=tokenize), answers, references)


def chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> CorpusScore:
    """Corpus chrF2 by sacrebleu: F2 of character n-grams up to 6, the same for every language. Raises like `bleu`."""
    return _corpus(_sacrebleu().CHRF(), answers, references)


def _sacrebleu() -> Any:
    try:
        return importlib.import_module("sacrebleu.metrics")
    except ImportError:
        problem = Problem("BLEU and chrF", "need sacrebleu", "Install it with: pip install 'localdpo[eval]'")
        raise EnvironmentFault(problem) from None


def _corpus(metric: Any, answers: Sequence[str], references: Sequence[Sequence[str]]) -> CorpusScore:
    if len(answers) != len(references) or not all(references):
        raise ValueError(f"{len(answers)} answers and {len(references)} lists of references")
    if not answers:
        return CorpusScore(0.0, None, None, "")
    most = max(map(len, references))
    # sacrebleu wants one list for each first, second, … reference; None where an answer has fewer.
    streams = [[texts[n] if n < len(texts) else None for texts in references] for n in range(most)]
    _in_plain_floats(metric)
    score = metric.corpus_score(list(answers), streams, n_bootstrap=BOOTSTRAPS)
    signature = str(metric.get_signature().format())
    told = json.loads(score.format(width=6, signature=signature, is_json=True))
    mean, half = told.get("confidence_mean"), told.get("confidence_var", 0.0)
    value = min(100.0, float(score.score))
    if mean is None:
        return CorpusScore(value, None, None, signature)
    return CorpusScore(value, max(0.0, mean - half), min(100.0, mean + half), signature)


def _in_plain_floats(metric: Any) -> None:
    """Have resamples scored as float: sacrebleu 2.6 cannot average its mixture of float and NumPy's float32."""
    compute = metric._compute_score_from_stats

    def plain(stats: Any) -> Any:
        score = compute(stats)
        score.score = float(score.score)
        return score

    metric._compute_score_from_stats = plain
