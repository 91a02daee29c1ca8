"""Porter's stemmer for English: "cats" and "cat" match, as METEOR wants it.

M. F. Porter, "An algorithm for suffix stripping", Program 14 (3), 1980, pp. 130-137, with the departures that NLTK's
default mode makes (https://www.nltk.org/api/nltk.stem.porter.html), so that METEOR agrees with NLTK's. It knows
nothing of other languages: a word with no English suffix stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import pairwise

__all__ = ["stem"]

_IRREGULAR = {
    "skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news",
    "innings": "inning", "inning": "inning", "outings": "outing", "outing": "outing",
    "cannings": "canning", "canning": "canning", "howe": "howe",
    "proceed": "proceed", "exceed": "exceed", "succeed": "succeed",
}  # fmt: skip

_STEP_2 = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "bli": "ble", "entli": "ent",
    "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate", "ator": "ate", "alism": "al", "iveness": "ive",
    "fulness": "ful", "ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble", "fulli": "ful",
}  # fmt: skip
_STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
_SUFFIXES_4 = "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize"
_STEP_4 = dict.fromkeys(_SUFFIXES_4.split(), "")  # fmt: skip


@lru_cache(maxsize=4096)
def stem(word: str) -> str:
    """The stem of a word, lower-cased."""
    word = word.lower()
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    for step in (_plural, _past, _final_y, _double_suffix):
        word = step(word)
    word = _by_rules(word, _STEP_3, lambda base: _measure(base) > 0)
    word = _by_rules(word, _STEP_4, lambda base: _measure(base) > 1, ion_after=("s", "t"))
    return _tidy(word)


def _consonants(text: str) -> list[bool]:
    """Which letters count as consonants; y does after a vowel and at the start."""
    flags: list[bool] = []
    for letter in text:
        if letter == "y":
            flags.append(not flags or not flags[-1])
        else:
            flags.append(letter not in "aeiou")
    return flags


def _measure(text: str) -> int:
    """Porter's m: how often a vowel is followed by a consonant."""
    flags = _consonants(text)
    return sum(after and not before for before, after in pairwise(flags))


def _ends_double(text: str) -> bool:
    return len(text) > 1 and text[-1] == text[-2] and _consonants(text)[-1]


def _ends_short(text: str) -> bool:
    """Whether it ends consonant, vowel, consonant (the last not w, x or y), or is just vowel and consonant."""
    flags = _consonants(text)
    if len(flags) == 2:
        return flags == [False, True]
    return flags[-3:] == [True, False, True] and text[-1] not in "wxy"


def _by_rules(word: str, rules: Mapping[str, str], fits: Callable[[str], bool], ion_after: tuple[str, ...] = ()) -> str:
    """Replace the longest suffix that ``rules`` know, if what is before it fits; no other rule is tried then."""
    suffix = max((s for s in rules if word.endswith(s)), key=len, default=None)
    if suffix is None:
        return word
    base = word[: -len(suffix)]
    allowed = fits(base) and (suffix != "ion" or base.endswith(ion_after))
    return base + rules[suffix] if allowed else word


def _plural(word: str) -> str:
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _past(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    suffix = next((s for s in ("ed", "ing") if word.endswith(s) and not all(_consonants(word[: -len(s)]))), None)
    if suffix is None:
        return word
    base = word[: -len(suffix)]
    if base.endswith(("at", "bl", "iz")):
        return base + "e"
    if _ends_double(base):
        return base if base[-1] in "lsz" else base[:-1]
    return base + "e" if _measure(base) == 1 and _ends_short(base) else base


def _final_y(word: str) -> str:
    if word.endswith("y") and len(word) > 2 and _consonants(word[:-1])[-1]:
        return word[:-1] + "i"
    return word


def _double_suffix(word: str) -> str:
    if word.endswith("alli"):
        # "radically" has two suffixes in a row.
        return _double_suffix(word[:-2]) if _measure(word[:-4]) > 0 else word
    if word.endswith("logi"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    return _by_rules(word, _STEP_2, lambda base: _measure(base) > 0)


def _tidy(word: str) -> str:
    if word.endswith("e"):
        base = word[:-1]
        if _measure(base) > 1 or (_measure(base) == 1 and not _ends_short(base)):
            word = base
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
