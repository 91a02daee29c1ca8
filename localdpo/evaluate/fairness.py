"""Fairness: what changes in a model when nothing but the person in the prompt changes, before and after training.

Counterfactual prompts come from templates. Two gaps between groups are measured, each for the base (adapters off)
and for the model as it stands.

``gap_logp``: how differently the model finds *fixed* continuations likely, in nats a token. They are the same words
for every group and name none, so that nothing but the prompt can move them; free answers would be scored for their
own words. The mean over a group's people is taken first, then the highest less the lowest group, then the mean over
continuations and templates. People of one group differ too, so the gap is never 0: ``chance`` is the gap to expect
if the people were dealt out to the groups by lot. ``lean`` says which group the good continuations favour.

``gap_answers``: 1 less the words that greedy answers to two groups share (F1 of words, the groups' own words taken
out). Length, refusals and friendliness are given for each group. Intervals are over templates. A gap is a difference,
not a judgement: an answer about she and he may rightly differ. And no gap here is no proof of none elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localdpo.data.chat import ChatFormat
from localdpo.dpo.scorer import make_scorer
from localdpo.errors import InputError, Problem
from localdpo.evaluate.beside import (
    Question,
    Scored,
    both_answers,
    both_logps,
    encode_question,
    longest_of,
    one_by_one,
)
from localdpo.evaluate.intervals import Figure, mean
from localdpo.evaluate.suitefile import sample_rows
from localdpo.evaluate.templates import FairnessSet, Template, read_fairness, shipped_fairness
from localdpo.evaluate.tone import refuses, sentiment
from localdpo.evaluate.wording import overlap_f1, words_of
from localdpo.model.load import LoadedModel
from localdpo.train.events import ProgressEvent

__all__ = ["FairnessResult", "Sides", "run_fairness", "shipped_fairness"]

MAX_TOKENS = 48
STAGE = "fairness"
_DEALS = 200
"""Ways of dealing out the people by lot that ``chance`` is the mean of."""

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sides:
    """A figure of the base and of the tuned model; None where there is nothing to measure."""

    base: Figure | None
    tuned: Figure | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: side.to_json() if side is not None else None for name, side in
                (("base", self.base), ("tuned", self.tuned))}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FairnessResult:
    """What came of a set of templates.

    ``chance`` is (base, tuned), None with one person a group. ``lean``: a group's advantage over the mean of all, in
    nats a token; positive is favoured. ``by_group``: words, refused (share) and sentiment of the answers.
    """

    name: str
    language: str | None
    groups: tuple[str, ...]
    templates: int
    skipped: int
    gap_logp: Sides
    gap_answers: Sides
    chance: tuple[float, float] | None
    lean: dict[str, Sides]
    by_group: dict[str, dict[str, Sides]]
    examples: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as in eval.json."""
        chance = dict(zip(("base", "tuned"), self.chance, strict=True)) if self.chance is not None else None
        return {
            "name": self.name,
            "language": self.language,
            "groups": list(self.groups),
            "templates": self.templates,
            "skipped": self.skipped,
            "gap_logp": self.gap_logp.to_json(),
            "gap_logp_chance": chance,
            "gap_answers": self.gap_answers.to_json(),
            "lean": {group: sides.to_json() for group, sides in self.lean.items()},
            "by_group": {
                name: {group: sides.to_json() for group, sides in groups.items()}
                for name, groups in self.by_group.items()
            },
            "examples": self.examples,
        }


def run_fairness(
    loaded: LoadedModel,
    names_or_files: Sequence[str | Path],
    *,
    limit: int | None = None,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
) -> Generator[ProgressEvent, None, list[FairnessResult]]:
    """Measure the model as it stands, and its base, on every set; all files are read before the first is asked.

    ``limit`` draws so many templates of each, by ``seed``; ``max_tokens`` holds where a set has none. Raises
    InputError for a file that is not as it must be, with file, line and key, or that the model can be asked nothing of.
    """
    sets = [read_fairness(name) for name in names_or_files]
    sample_rows(0, limit, seed)

    def ask(one: FairnessSet) -> Generator[ProgressEvent, None, FairnessResult]:
        chosen = tuple(one.templates[i] for i in sample_rows(len(one.templates), limit, seed))
        return _Run(loaded, replace(one, templates=chosen), one.max_tokens or max_tokens, seed).result()

    return (yield from one_by_one(STAGE, sets, ask))


@dataclass(slots=True)
class _Run:
    """One set being asked. ``index[template][group, variant]`` is a number in ``questions``."""

    loaded: LoadedModel
    asked: FairnessSet
    max_tokens: int
    seed: int
    kept: list[Template] = field(default_factory=list)
    index: list[npt.NDArray[np.int64]] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

    def result(self) -> Generator[ProgressEvent, None, FairnessResult]:
        self._encode()
        asked, scorer = self.asked, make_scorer(self.loaded.model)
        scores = yield from both_logps(self.loaded, scorer, self.questions, STAGE, asked.name)
        firsts = [self.questions[number].prompt_ids for table in self.index for number in table[:, 0]]
        said = yield from both_answers(self.loaded, firsts, self.max_tokens, STAGE, asked.name)
        logps = [[_by_person(side, table) for table in self.index] for side in scores]
        width = len(asked.groups)
        answers = [[side[at : at + width] for at in range(0, len(side), width)] for side in said]
        gaps = [np.array([_gap(person.mean(axis=1)) for person in side]) for side in logps]
        apart = [np.array([self._apart(texts) for texts in side]) for side in answers]
        return FairnessResult(
            asked.name,
            asked.language,
            asked.groups,
            len(self.kept),
            len(asked.templates) - len(self.kept),
            self._sides(gaps),
            self._sides(apart),
            self._chance(logps),
            self._lean(logps),
            {name: self._by_group(answers, of) for name, of in _OF_ANSWERS.items()},
            self._examples(gaps, apart, answers),
        )

    def _encode(self) -> None:
        """Every template for every person; one that the model cannot be asked is left out. InputError if all are."""
        chat, longest = ChatFormat(self.loaded.tokenizer), longest_of(self.loaded)
        reason = Problem(self.asked.source, "has no template")
        for template in self.asked.templates:
            table = np.zeros((len(self.asked.groups), self.asked.variants), np.int64)
            known: dict[str, int] = {}
            fresh: list[Question] = []
            for place in np.ndindex(*table.shape):
                prompt = self.asked.prompt(template, self.asked.groups[place[0]], place[1])
                text = prompt[-1]["content"]
                if text not in known:
                    found = encode_question(chat, prompt, template.continuations, longest)
                    if isinstance(found, str):
                        reason = Problem(f"{self.asked.source}:{template.line}", found)
                        break
                    known[text] = len(self.questions) + len(fresh)
                    fresh.append(found)
                table[place] = known[text]
            else:
                self.kept.append(template)
                self.index.append(table)
                self.questions += fresh
        if not self.kept:
            raise InputError(Problem(self.asked.source, "this model can be asked none of its templates"), reason)

    def _sides(self, values: Sequence[_Floats]) -> Sides:
        return Sides(*(mean(side, seed=self.seed) for side in values))

    def _chance(self, logps: Sequence[Sequence[_Floats]]) -> tuple[float, float] | None:
        """The mean gap if the n-th people of the groups swapped places by lot; every way counts alike."""
        people, groups = self.asked.variants, len(self.asked.groups)
        if people < 2:
            return None
        random = np.random.default_rng(self.seed)
        order = np.argsort(random.random((_DEALS, groups, people)), axis=1)
        found = []
        for side in logps:
            gaps = [_gap(np.take_along_axis(person, deal[:, :, None], axis=0).mean(axis=1))
                    for person in side for deal in order]  # fmt: skip
            found.append(float(np.mean(gaps)))
        return found[0], found[1]

    def _lean(self, logps: Sequence[Sequence[_Floats]]) -> dict[str, Sides]:
        """Good less bad continuations, a group less the mean of all, over the templates that have both."""
        rows = []
        for side in logps:
            leans = []
            for template, person in zip(self.kept, side, strict=True):
                good, bad = len(template.favourable), len(template.unfavourable)
                if good:
                    of_group = person.mean(axis=1)
                    leans.append(of_group[:, :good].mean(axis=1) - of_group[:, good : good + bad].mean(axis=1))
            rows.append(np.array([lean - lean.mean() for lean in leans]).reshape(-1, len(self.asked.groups)))
        if not len(rows[0]):
            return {}
        return {group: self._sides([side[:, number] for side in rows])
                for number, group in enumerate(self.asked.groups)}  # fmt: skip

    def _apart(self, texts: Sequence[str]) -> float:
        """1 less the overlap of the answers to two groups, the mean over every two."""
        plain = [self._neutral(text) for text in texts]
        return float(np.mean([1 - overlap_f1(one, other) for one, other in combinations(plain, 2)]))

    def _neutral(self, text: str) -> str:
        for word in self.asked.all_words():
            pattern = rf"(?<!\w){re.escape(word)}(?!\w)" if word.isascii() else re.escape(word)
            text = re.sub(pattern, " ", text, flags=re.IGNORECASE)
        return text

    def _by_group(self, answers: Sequence[Sequence[Sequence[str]]], of: Callable[[str], float]) -> dict[str, Sides]:
        return {
            group: self._sides([np.array([of(texts[number]) for texts in side], np.float64) for side in answers])
            for number, group in enumerate(self.asked.groups)
        }

    def _examples(
        self, gaps: Sequence[_Floats], apart: Sequence[_Floats], answers: Sequence[Sequence[Sequence[str]]]
    ) -> list[dict[str, Any]]:
        """Every template with the prompts and answers of the first person of each group."""
        groups = self.asked.groups
        return [
            {
                "template": template.text,
                "prompts": {group: self.asked.prompt(template, group, 0)[-1]["content"] for group in groups},
                "base": dict(zip(groups, answers[0][number], strict=True)),
                "tuned": dict(zip(groups, answers[1][number], strict=True)),
                "gap_logp": {"base": float(gaps[0][number]), "tuned": float(gaps[1][number])},
                "gap_answers": {"base": float(apart[0][number]), "tuned": float(apart[1][number])},
            }
            for number, template in enumerate(self.kept)
        ]


def _by_person(scores: Sequence[Scored], table: npt.NDArray[np.int64]) -> _Floats:
    """Log-probs a token of a template's continuations: [groups, people, continuations]."""
    return np.array([[scores[number].per_token for number in row] for row in table], np.float64)


def _gap(by_group: _Floats) -> float:
    """[groups, continuations] -> the highest less the lowest group, the mean over continuations."""
    return float((by_group.max(axis=0) - by_group.min(axis=0)).mean())


def _word_count(answer: str) -> float:
    return float(len(words_of(answer)))


_OF_ANSWERS: dict[str, Callable[[str], float]] = {
    "words": _word_count,
    "refused": lambda answer: float(refuses(answer)),
    "sentiment": sentiment,
}
