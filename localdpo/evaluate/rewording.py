"""Small rewordings of a prompt that leave its meaning: a model that knows an answer gives it all the same.

Case, punctuation, a word of courtesy, two letters swapped. The last turn alone is changed. What is drawn depends on
the seed and the prompt, so the same prompt is always reworded alike. This module knows no models.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence

from localdpo.data.fields import Message

__all__ = ["KINDS", "reworded"]

_POLITE = ("Please: {}", "{} Please answer.", "Could you help me? {}", "Hi! {}")
_END = ".?!。？！"


def _lower(text: str, _random: random.Random) -> str:
    return text.lower()


def _no_punctuation(text: str, _random: random.Random) -> str:
    return text.rstrip(_END + " ") or text


def _doubled(text: str, _random: random.Random) -> str:
    """The mark at the end twice, or a full stop where there is none."""
    return text + text[-1] if text[-1:] and text[-1] in _END else text + "."


def _polite(text: str, random: random.Random) -> str:
    return random.choice(_POLITE).format(text)


def _typo(text: str, random: random.Random) -> str:
    """Two letters swapped inside one longer word, its first and last in place: readers hardly notice."""
    words = [found for found in re.finditer(r"[a-z]{5,}", text) if len(set(found.group()[1:-1])) > 1]
    if not words:
        return text
    word = random.choice(words)
    spots = [at for at in range(word.start() + 1, word.end() - 2) if text[at] != text[at + 1]]
    at = random.choice(spots)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


KINDS: dict[str, Callable[[str, random.Random], str]] = {
    "lower case": _lower,
    "no punctuation": _no_punctuation,
    "doubled punctuation": _doubled,
    "polite": _polite,
    "typo": _typo,
}


def reworded(prompt: Sequence[Message], count: int, seed: int = 0) -> list[tuple[Message, ...]]:
    """Up to ``count`` different rewordings of ``prompt``, none equal to it; fewer where its text allows no more."""
    text = str(prompt[-1]["content"])
    digest = hashlib.sha256(f"{seed}:{text}".encode()).digest()
    generator = random.Random(int.from_bytes(digest[:8], "big"))
    found: dict[str, None] = {}
    for kind in generator.sample(list(KINDS), len(KINDS)):
        changed = KINDS[kind](text, generator)
        if changed.strip() and changed != text:
            found[changed] = None
    last = prompt[-1]
    return [(*prompt[:-1], {**last, "content": changed}) for changed in list(found)[:count]]
