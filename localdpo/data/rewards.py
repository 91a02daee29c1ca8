"""Rewards: how good an answer is, as a number from 0 to 1 that anybody can check by hand.

A reward is named with its settings, as `length:max=40` or `regex:pattern=^Yes;weight=2`, on a command line or as a
list in YAML. Several make a weighted mean. A function of the user's own is called only when that is allowed in so
many words, since it is code. This module knows texts, no tokens and no models.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localdpo.data.language import LANGUAGES, guess_language
from localdpo.data.pairs import PromptRow
from localdpo.errors import InputError, Problem, first_problems
from localdpo.yamlfile import read_yaml

__all__ = ["REWARDS", "Reward", "RewardSum", "Score", "parse_rewards", "read_rewards"]

Score = Callable[[str, PromptRow], float]
"""An answer and the prompt's row -> a number from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Reward:
    """A named reward with its weight. A negative weight turns it round."""

    name: str
    weight: float
    settings: Mapping[str, Any]
    score: Score

    def to_json(self) -> dict[str, Any]:
        """What a pair's provenance keeps."""
        return {"reward": self.name, "weight": self.weight, **self.settings}


@dataclass(frozen=True, slots=True)
class RewardSum:
    """The weighted mean of some rewards."""

    rewards: tuple[Reward, ...]

    def scores(self, answer: str, row: PromptRow) -> dict[str, float]:
        """Each reward's own number by name, numbered where a name comes twice. Raises InputError."""
        found: dict[str, float] = {}
        for number, reward in enumerate(self.rewards, 1):
            name = reward.name if reward.name not in found else f"{reward.name}#{number}"
            found[name] = _finite(reward.score(answer, row), reward)
        return found

    def total(self, scores: Mapping[str, float]) -> float:
        """The mean of `scores`, as `scores()` gave them, weighted; over the absolute weights."""
        weights = [reward.weight for reward in self.rewards]
        return sum(w * s for w, s in zip(weights, scores.values(), strict=True)) / sum(map(abs, weights))


def _finite(value: Any, reward: Reward) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(Problem(f"reward {reward.name}", f"gave {value!r:.60}, which is not a number"))
    return float(value)


@dataclass(frozen=True, slots=True)
class _Setting:
    kind: str
    """int, number, flag, text or texts (separated by | on a command line)."""
    required: bool = False


@dataclass(frozen=True, slots=True)
class _Kind:
    summary: str
    settings: Mapping[str, _Setting]
    make: Callable[[Mapping[str, Any]], Score]
    needs: tuple[str, ...] = field(default=())
    """At least one of these must be given."""


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def _length(settings: Mapping[str, Any]) -> Score:
    low, high = settings.get("min", 0), settings.get("max", math.inf)
    if low > high:
        raise ValueError(f"min is {low} and max is {high}")
    measure: Callable[[str], int] = {"words": lambda text: len(text.split()), "characters": len}[
        _one_of(settings.get("unit", "words"), "unit", ("words", "characters"))
    ]

    def score(answer: str, _row: PromptRow) -> float:
        size = measure(answer)
        beyond = max(low - size, size - high, 0)
        # Never flat outside the window, so that of two answers beyond it the nearer is the better.
        scale = max(low if size < low else high, 1) if beyond else 1
        return float(scale / (scale + beyond))

    return score


def _one_of(value: Any, name: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"{name} {value!r} is none of {', '.join(known)}")
    return str(value)


def _regex(settings: Mapping[str, Any]) -> Score:
    try:
        pattern = re.compile(settings["pattern"], re.IGNORECASE if settings.get("ignore_case") else 0)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"pattern {settings['pattern']!r} is no regular expression ({error})") from None
    return lambda answer, _row: float(pattern.search(answer) is not None)


_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL | re.IGNORECASE)


def _json(settings: Mapping[str, Any]) -> Score:
    keys = settings.get("keys", [])

    def score(answer: str, _row: PromptRow) -> float:
        fenced = _FENCE.fullmatch(answer) if settings.get("fenced") else None
        try:
            value = json.loads(fenced.group(1) if fenced else answer)
        except (ValueError, RecursionError):
            return 0.0
        if not keys:
            return 1.0
        return sum(key in value for key in keys) / len(keys) if isinstance(value, dict) else 0.0

    return score


def _language(settings: Mapping[str, Any]) -> Score:
    wanted = _one_of(settings["is"], "is", LANGUAGES)
    return lambda answer, _row: float(guess_language(answer) == wanted)


def _count(phrase: str, words: Sequence[str]) -> int:
    parts = _words(phrase)
    return sum(words[at : at + len(parts)] == parts for at in range(len(words) - len(parts) + 1)) if parts else 0


def _forbidden(settings: Mapping[str, Any]) -> Score:
    def score(answer: str, _row: PromptRow) -> float:
        said = _words(answer)
        return 1 / (1 + sum(_count(phrase, said) for phrase in settings["words"]))

    return score


def _required(settings: Mapping[str, Any]) -> Score:
    def score(answer: str, _row: PromptRow) -> float:
        said = _words(answer)
        return sum(_count(phrase, said) > 0 for phrase in settings["words"]) / len(settings["words"])

    return score


def _grams(text: str) -> Counter[str]:
    plain = f" {' '.join(_words(text))} "
    return Counter(plain[at : at + 3] for at in range(max(len(plain) - 2, 0)))


def _similarity(settings: Mapping[str, Any]) -> Score:
    """Dice's coefficient over character trigrams of the words."""
    fixed, key = settings.get("target"), settings.get("key")

    def score(answer: str, row: PromptRow) -> float:
        target = fixed if fixed is not None else row.extra.get(str(key))
        if not isinstance(target, str):
            raise InputError(
                Problem(f"{row.source}:{row.line}", f'has no text under "{key}" to compare an answer with')
            )
        ours, theirs = _grams(answer), _grams(target)
        total = ours.total() + theirs.total()
        return 2 * (ours & theirs).total() / total if total else 0.0

    return score


def _python(settings: Mapping[str, Any]) -> Score:
    module, colon, name = settings["path"].partition(":")
    if not colon:
        raise ValueError(f"path {settings['path']!r} is not of the form module:function")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"path {settings['path']!r} cannot be imported ({error})") from None
    if not callable(function):
        raise ValueError(f"path {settings['path']!r} is not a function")

    def score(answer: str, row: PromptRow) -> float:
        return function([dict(turn) for turn in row.prompt], answer, dict(row.extra))  # type: ignore[no-any-return]

    return score


_WEIGHT = {"weight": _Setting("number")}
REWARDS: dict[str, _Kind] = {
    "length": _Kind(
        "1 within min to max words (or unit=characters), less the further from it",
        {"min": _Setting("int"), "max": _Setting("int"), "unit": _Setting("text")},
        _length,
        ("min", "max"),
    ),
    "regex": _Kind(
        "1 where pattern is found",
        {"pattern": _Setting("text", True), "ignore_case": _Setting("flag")},
        _regex,
    ),
    "json": _Kind(
        "1 for valid JSON; with keys, the share of them it has; fenced allows a code block",
        {"keys": _Setting("texts"), "fenced": _Setting("flag")},
        _json,
    ),
    "language": _Kind("1 where the answer is in this language", {"is": _Setting("text", True)}, _language),
    "forbidden": _Kind("1 without these words, less with each", {"words": _Setting("texts", True)}, _forbidden),
    "required": _Kind("the share of these words that are said", {"words": _Setting("texts", True)}, _required),
    "similarity": _Kind(
        "likeness to target, or to the text under key in the prompt's row, from 0 to 1",
        {"target": _Setting("text"), "key": _Setting("text")},
        _similarity,
        ("target", "key"),
    ),
    "python": _Kind("what your function gives", {"path": _Setting("text", True)}, _python),
}
"""Every reward by name."""


def parse_rewards(texts: Sequence[str], allow_code: bool = False) -> RewardSum:
    """Rewards from `name:key=value;key=value` texts. Raises InputError with every problem.

    A `;` within a value is written `\\;`. Lists of words are separated by `|`.
    """
    entries, problems = [], []
    for text in texts:
        where = f"--reward {text}"
        name, _, rest = text.partition(":")
        settings: dict[str, Any] = {}
        for part in filter(None, re.split(r"(?<!\\);", rest)):
            key, equals, value = part.replace("\\;", ";").partition("=")
            if not equals:
                problems.append(Problem(where, f"{part!r} is not of the form key=value", "Such as length:max=40"))
            settings[key.strip()] = value
        entries.append((where, name.strip(), settings))
    return _made(entries, problems, allow_code)


def read_rewards(path: str | Path, allow_code: bool = False) -> RewardSum:
    """Rewards from a YAML file: a list of mappings with `reward`, its settings and `weight`. Raises InputError."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(Problem(str(path), f"cannot be read ({error.strerror})")) from None
    value = read_yaml(data, str(path)).value
    if not isinstance(value, list) or not all(isinstance(item, dict) and "reward" in item for item in value):
        raise InputError(Problem(str(path), "must be a list of rewards", "Such as `- {reward: length, max: 40}`"))
    entries = [
        (f"{path} reward {number}", str(item["reward"]), {k: v for k, v in item.items() if k != "reward"})
        for number, item in enumerate(value, 1)
    ]
    return _made(entries, [], allow_code)


def _made(
    entries: Iterable[tuple[str, str, Mapping[str, Any]]], problems: list[Problem], allow_code: bool
) -> RewardSum:
    rewards = []
    for where, name, settings in entries:
        if name not in REWARDS:
            problems.append(Problem(where, f"{name!r} is no reward", f"One of {', '.join(REWARDS)}"))
            continue
        if name == "python" and not allow_code:
            problems.append(Problem(where, "runs code of yours", "Allow it with --allow-code if you trust it"))
            continue
        try:
            rewards.append(_reward(name, settings))
        except ValueError as error:
            problems.append(Problem(where, str(error), f"{name}: {REWARDS[name].summary}"))
    if not problems and not rewards:
        problems.append(Problem("--reward", "no reward is given", f"One of {', '.join(REWARDS)}"))
    if problems:
        raise InputError(*first_problems(problems))
    return RewardSum(tuple(rewards))


def _reward(name: str, given: Mapping[str, Any]) -> Reward:
    kind = REWARDS[name]
    known = {**kind.settings, **_WEIGHT}
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no setting; there are {', '.join(known)}")
    settings = {key: _value(key, value, known[key].kind) for key, value in given.items()}
    missing = [key for key, setting in kind.settings.items() if setting.required and key not in settings]
    if missing or (kind.needs and not set(kind.needs) & set(settings)):
        raise ValueError(f"{' or '.join(missing or kind.needs)} is missing")
    weight = settings.pop("weight", 1.0)
    if weight == 0:
        raise ValueError("weight is 0")
    return Reward(name, weight, settings, kind.make(settings))


def _value(key: str, value: Any, kind: str) -> Any:
    """A setting's value, from YAML or from a text."""
    if kind == "texts":
        parts = value.split("|") if isinstance(value, str) else value
        if isinstance(parts, list) and parts and all(isinstance(part, str) and part.strip() for part in parts):
            return [part.strip() for part in parts]
        raise ValueError(f"{key} must be words separated by |")
    if kind == "flag":
        flags = {"true": True, "yes": True, "1": True, "": True, "false": False, "no": False, "0": False}
        if str(value).lower() in flags:
            return flags[str(value).lower()]
        raise ValueError(f"{key} must be true or false")
    if kind == "text":
        if isinstance(value, str) and value:
            return value
        raise ValueError(f"{key} must be text")
    return _number(key, value, kind)


def _number(key: str, value: Any, kind: str) -> float | int:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or (kind == "int" and (number != int(number) or number < 0)):
        raise ValueError(f"{key} must be {'a whole number, 0 or more' if kind == 'int' else 'a number'}")
    return int(number) if kind == "int" else number
