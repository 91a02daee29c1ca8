"""An answer as a set of words, word pairs, openings and formats: what a shortcut could be made of.

Features are names that a reader understands, since they are shown. Presence counts, not number, and of a long answer
its first 1,500 characters. No length is among them: `length.py` has that question.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

__all__ = ["Answers", "FeatureTable", "answer_features", "describe", "feature_table", "words_of"]

MAX_CHARS = 1_500
_RARE = 3
# Scripts without spaces between words give a feature a character.
_WORD = re.compile(
    "[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]|[^\\W\\d_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]+(?:['’][^\\W\\d_]+)?"
)


def _has(pattern: str) -> Callable[[str], bool]:
    search = re.compile(pattern, re.MULTILINE).search
    return lambda text: search(text) is not None


def _contains(*parts: str) -> Callable[[str], bool]:
    return lambda text: any(part in text for part in parts)


_FORMATS: dict[str, Callable[[str], bool]] = {
    "a bulleted list": _has(r"^[ \t]*[-*•] "),
    "a numbered list": _has(r"^[ \t]*\d{1,2}[.)] "),
    "a heading": _has(r"^#{1,6} \S"),
    "bold text": _has(r"\*\*\S[^*\n]*\*\*"),
    "a code block": _contains("```"),
    "inline code": _has(r"(?<!`)`[^`\n]+`(?!`)"),
    "a table": _has(r"^[ \t]*\|.*\|[ \t]*$"),
    "a link": _contains("http://", "https://"),
    "an emoji": _has("[\u2600-\u27bf\U0001f300-\U0001faff]"),
    "a question mark": _contains("?"),
    "an exclamation mark": _contains("!"),
    "quotation marks": _contains('"', "“", "”", "«", "»"),
    "brackets": _contains("(", "["),
    "a digit": _has("[0-9]"),
    "an ellipsis": _contains("...", "…"),
    "a dash (—)": _contains("—"),
    "a colon": _contains(":"),
    "several lines": lambda text: "\n" in text.strip(),
    "several paragraphs": lambda text: re.search(r"\n\s*\n", text.strip()) is not None,
    "white space at the start": lambda text: text[:1].isspace(),
    "a lower-case start": lambda text: text.lstrip()[:1].islower(),
    "capitals throughout": str.isupper,
}
_AT_END: dict[str, Callable[[str], bool]] = {
    "white space at the end": lambda text: text[-1:].isspace(),
    "no full stop at the end": lambda text: text.rstrip()[-1:].isalnum(),
}


@dataclass(frozen=True, slots=True)
class Answers:
    """One pair of a sample: its line, the number of its prompt, and both answers."""

    line: int
    group: int
    chosen: str
    rejected: str


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return _WORD.findall(text.lower())


def answer_features(answer: str) -> set[str]:
    """Return the features of an answer; their kind is their first letter.

    `w:` a word, `p:` two words in a row, `s:` how it starts (one to three words), `f:` a format.
    """
    return set(_features(answer))


def _features(answer: str) -> Iterator[str]:
    text = answer[:MAX_CHARS]
    words = words_of(text)
    yield from ("w:" + word for word in words)
    yield from (f"p:{a} {b}" for a, b in pairwise(words))
    for size in (1, 2, 3):
        if len(words) >= size:
            yield f"s:{' '.join(words[:size])}"
    yield from ("f:" + name for name, test in _FORMATS.items() if test(text))
    yield from ("f:" + name for name, test in _AT_END.items() if test(answer))


def describe(feature: str) -> str:
    """Return how a reader is told of a feature; it may quote the file."""
    kind, _, text = feature.partition(":")
    return {"w": f'the word "{text}"', "p": f'the words "{text}"', "s": f'the opening "{text} …"'}.get(kind, text)


@dataclass(frozen=True, slots=True)
class FeatureTable:
    """The features of a sample of P pairs, those in fewer than three answers left out.

    `names` [F]. The others have one entry for each feature of each answer: `pair` the pair's index, `feature` the
    name's, `sign` +1 for the chosen answer and -1 for the rejected one, `value` the entry of the answer's vector of
    length 1.
    """

    names: list[str]
    pair: npt.NDArray[np.int64]
    feature: npt.NDArray[np.int64]
    sign: npt.NDArray[np.int64]
    value: npt.NDArray[np.float64]
    tried: int

    def alone(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return (pair, feature, sign) of the features that one answer of a pair has and the other has not."""
        keys = self.pair * len(self.names) + self.feature
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        first = np.ones(len(keys), bool)
        first[1:] = ordered[1:] != ordered[:-1]
        last = np.ones(len(keys), bool)
        last[:-1] = first[1:]
        single = np.sort(order[first & last])
        return self.pair[single], self.feature[single], self.sign[single]


def feature_table(sample: Sequence[Answers]) -> FeatureTable:
    """Take the answers of a sample apart."""
    numbers: dict[str, int] = {}
    features: list[npt.NDArray[np.int64]] = []
    for answers in sample:
        for text in (answers.chosen, answers.rejected):
            names = sorted(answer_features(text))  # sets come in another order in every process
            features.append(np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64))
    sizes = np.array([len(part) for part in features], np.int64)
    flat = np.concatenate(features) if features else np.zeros(0, np.int64)
    answer = np.repeat(np.arange(len(features)), sizes)
    counts = np.bincount(flat, minlength=len(numbers))
    kept = counts >= _RARE
    renumbered = np.cumsum(kept) - 1
    use = kept[flat]
    return FeatureTable(
        [name for name, keep in zip(numbers, kept, strict=True) if keep],
        answer[use] // 2,
        renumbered[flat[use]],
        1 - 2 * (answer[use] % 2),
        np.repeat(1 / np.sqrt(np.maximum(sizes, 1)), sizes)[use],
        max(1, int(kept.sum())),
    )
