"""Counts over the words of answers: how varied, how repetitive, how long, and which phrases were taught.

Words are runs of letters and digits, whatever their case; in scripts written without spaces every character is
one. distinct-n is Li et al. 2016 (arXiv:1510.03055, sec. 4), the share of different n-grams among all of them;
repetition is the share of an answer's 3-grams that it has said before, as rep-n of Welleck et al. 2020
(arXiv:1908.04319). This module runs no model and never loads mlx.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from statistics import fmean

__all__ = ["distinct", "overlap_f1", "prompt_text", "repetition", "taught_phrases", "words_of"]

_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_]+(?:['’][^\W_]+)*")
_REPEATED = 3
_LONGEST_PHRASE = 3
_PHRASES = 10
_LEAST_PAIRS = 3
_LEAST_SHARE = 0.2  # of the chosen answers that say it
_REJECTED_RATIO = 4  # so many times as often in chosen answers as in rejected ones


def words_of(text: str) -> list[str]:
    """The words of ``text``, casefolded."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams over all n-grams of ``texts`` together; None where there is none.

    It falls as texts get more and longer: compare it between answers to the same prompts only.
    """
    found = list(chain.from_iterable(_ngrams(words_of(text), n) for text in texts))
    return len(set(found)) / len(found) if found else None


def repetition(text: str) -> float:
    """The share of the text's 3-grams that are repeats, 0 where it has fewer than two."""
    found = _ngrams(words_of(text), _REPEATED)
    return 1 - len(set(found)) / len(found) if found else 0.0


def overlap_f1(one: str, other: str) -> float:
    """Harmonic mean of precision and recall of the words that both texts have; 1 for two without a word."""
    a, b = Counter(words_of(one)), Counter(words_of(other))
    if not a and not b:
        return 1.0
    return 2 * sum((a & b).values()) / (sum(a.values()) + sum(b.values()))


def taught_phrases(
    chosen: Sequence[str], rejected: Sequence[str], unrelated: Sequence[str], excluded: Collection[str] = ()
) -> tuple[str, ...]:
    """Phrases of up to three words that the pairs teach: the likeliest to leak, most frequent first.

    In at least a fifth of the chosen answers (and three of them), at least four times as often there as in the
    rejected ones, and in none of ``unrelated``, the base's own answers, nor of ``excluded`` texts. Of phrases inside
    one another that are equally frequent the shortest is kept, as it finds the others too.
    """
    known = set(chain.from_iterable(_phrases_of(text) for text in (*unrelated, *excluded)))
    among_chosen = Counter(chain.from_iterable(_phrases_of(text) for text in chosen))
    among_rejected = Counter(chain.from_iterable(_phrases_of(text) for text in rejected))
    needed = max(_LEAST_PAIRS, _LEAST_SHARE * len(chosen))
    found = [
        phrase
        for phrase, count in among_chosen.items()
        if count >= needed and phrase not in known and count >= _REJECTED_RATIO * among_rejected[phrase]
    ]
    found.sort(key=lambda phrase: (-among_chosen[phrase], len(phrase), phrase))
    kept: list[tuple[str, ...]] = []
    for phrase in found:
        if not any(_inside(shorter, phrase) for shorter in kept):
            kept.append(phrase)
    return tuple(" ".join(phrase) for phrase in kept[:_PHRASES])


def _phrases_of(text: str) -> set[tuple[str, ...]]:
    words = words_of(text)
    return set(chain.from_iterable(_ngrams(words, n) for n in range(1, _LONGEST_PHRASE + 1)))


def _inside(inner: tuple[str, ...], outer: tuple[str, ...]) -> bool:
    return any(outer[at : at + len(inner)] == inner for at in range(len(outer) - len(inner) + 1))


def mentions(text: str, phrases: Sequence[str]) -> bool:
    """Whether one of ``phrases``, as `taught_phrases` gives them, is in ``text``."""
    found = _phrases_of(text)
    return any(tuple(words_of(phrase)) in found for phrase in phrases)


def prompt_text(messages: Sequence[Mapping[str, object]]) -> str:
    """A prompt for people: its only turn as it is, several with their roles before them."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


def mean_words(texts: Sequence[str]) -> float | None:
    """Mean number of words; None without a text."""
    return fmean(len(words_of(text)) for text in texts) if texts else None
