"""Guess the language of a text from its script and its commonest words.

Made for telling apart, not for naming every language: it knows those in `LANGUAGES`, and says None of a text too short
or too mixed to tell. No model, no data files.
"""

from __future__ import annotations

import re
from collections import Counter

__all__ = ["LANGUAGES", "asks_for_language", "guess_language", "is_common_word"]

_COMMON = {
    "da": "og i at det er en på til med for ikke jeg der den som de af et har om vi var kan sig fra men hvad du mig",
    "de": "der die das und ist nicht ein eine ich zu den mit auf für von dem sie es im sich auch wie des oder werden "
    "was sind bei wird aus kann du dass wenn haben",
    "en": "the of and to in is it that for you was on are as with be this have from or by not but what your can "
    "which an they will my how do if their at we",
    "es": "el la de que y en un los se del las por con para una su al lo como más es no pero sus le este qué son está "
    "muy puede cuando",
    "fi": "ja on ei että se hän oli mutta ovat kun niin myös joka tai kuin mitä ole voi sen olla minä ne",
    "fr": "le la les de des et est un une du que dans pour qui pas sur au avec ce il je vous nous sont plus par mais "
    "ne se en ou être cette quelle comme",
    "it": "il di che la è e un per una in non sono del con della si le da come anche al più gli dei nel questo ma "
    "cosa ha essere alla",
    "nl": "de het een en van ik is dat in niet op te zijn met voor er je hij die aan om ook maar wat bij kan naar deze "
    "wordt hebben uit door",
    "no": "og i det er på en til som av for at med ikke jeg de har den et om var vi kan fra men så hva seg eller skal",
    "pl": "i w nie na się z do to że jest o jak co ale po tak za od być może czy dla przez jego oraz są tym który",
    "pt": "o a de que e do da em um para é com não uma os no se na por mais as dos como mas ao ele das à seu sua ou "
    "são você",
    "sv": "och i att det är en på som för med av till inte jag den har de ett om var vi kan från men så vad sig eller",
    "tr": "ve bir bu için de da ile olarak çok daha ne var gibi kadar ama ben sen en mi değil olan her sonra nasıl",
}  # fmt: skip
_WORDS: dict[str, list[str]] = {}
for _language, _list in _COMMON.items():
    for _word in _list.split():
        _WORDS.setdefault(_word, []).append(_language)

# The script settles it where one language, or a family that a reader takes for one, uses it.
_SCRIPTS = (
    ("ja", re.compile("[\u3040-\u30ff]")),
    ("zh", re.compile("[\u3400-\u9fff]")),
    ("ko", re.compile("[\u1100-\u11ff\uac00-\ud7a3]")),
    ("ru", re.compile("[\u0400-\u04ff]")),
    ("el", re.compile("[\u0370-\u03ff]")),
    ("ar", re.compile("[\u0600-\u06ff]")),
    ("he", re.compile("[\u0590-\u05ff]")),
    ("hi", re.compile("[\u0900-\u097f]")),
    ("th", re.compile("[\u0e00-\u0e7f]")),
)
LANGUAGES: tuple[str, ...] = tuple(sorted([*_COMMON, *(name for name, _ in _SCRIPTS)]))
"""The ISO 639-1 codes that `guess_language` can answer; ru, ar and hi stand for all that share their script."""

_NAMES = (
    "arabic|bengali|bulgarian|cantonese|chinese|croatian|czech|danish|dutch|english|estonian|finnish|french|german|greek|"
    "gujarati|hebrew|hindi|hungarian|indonesian|irish|italian|japanese|korean|latin|lithuanian|malay|mandarin|marathi|"
    "norwegian|persian|polish|portuguese|punjabi|romanian|russian|sanskrit|serbian|slovak|spanish|swahili|swedish|"
    "tagalog|tamil|telugu|thai|turkish|ukrainian|urdu|vietnamese|welsh"
)
_ASKS = re.compile(
    rf"translat|übersetz|tradu|vertaal|översätt|перевод|перевед|翻译|翻訳|번역|\b(?:{_NAMES})\b", re.IGNORECASE
)

_TOKEN = re.compile(r"[^\W\d_]+")
_MIN_HITS, _MIN_LETTERS = 3, 12
_MIN_SHARE = 0.15


def guess_language(text: str) -> str | None:
    """Return the ISO 639-1 code of the language that most of `text` is in, None when that cannot be told."""
    words = _TOKEN.findall(text.casefold())
    letters = sum(map(len, words))
    if not text.isascii():
        script = _script(text, letters)
        if script is not None:
            return script
    if letters < _MIN_LETTERS:
        return None
    hits: Counter[str] = Counter()
    distinct: Counter[str] = Counter()
    counts = Counter(words)
    for word in _WORDS.keys() & counts.keys():
        for language in _WORDS[word]:
            hits[language] += counts[word]
            distinct[language] += len(word) > 1  # a letter may be a label, or spelled out
    ranked = hits.most_common(2)
    if not ranked or ranked[0][1] < max(_MIN_HITS, _MIN_SHARE * len(words)) or distinct[ranked[0][0]] < 2:
        return None
    clear = len(ranked) == 1 or ranked[0][1] >= 1.3 * ranked[1][1]
    return ranked[0][0] if clear else None


def is_common_word(word: str) -> bool:
    """Return whether a word, in lower case, is among the commonest of a language that is told by them."""
    return word in _WORDS


def asks_for_language(prompt: str) -> bool:
    """Return whether a prompt is about a language: it names one, or a translation."""
    return _ASKS.search(prompt) is not None


def _script(text: str, letters: int) -> str | None:
    counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS}
    if counts["ja"] and counts["zh"]:  # Japanese is written with both
        counts["ja"] += counts.pop("zh")
    name = max(counts, key=lambda key: counts[key])
    enough = 2 if name in ("ja", "zh", "ko") else 4
    return name if counts[name] >= enough and counts[name] > letters / 2 else None
