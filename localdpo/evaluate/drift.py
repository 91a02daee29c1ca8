"""Drift: what a tuned model says to prompts that it was not to change, beside what its base says.

Both answer retain and probe prompts greedily; the base's answers come from the cache that training fills. On the
base's answers both models are then read for KL(base || tuned) a token, which moves long before an answer does. Small
rewordings of the probes show whether an answer is known or learned by heart. It judges nothing: `verdict` does.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

import numpy as np

from localdpo.core.score import Scorer
from localdpo.data.encode import end_of_turn_ids
from localdpo.data.pairs import PreferencePair, PromptRow
from localdpo.evaluate.beside import answers_now
from localdpo.evaluate.figures import TAUGHT, UNTAGGED, group_of, says
from localdpo.evaluate.intervals import Figure, bootstrap, mean, share
from localdpo.evaluate.probes import sample
from localdpo.evaluate.rewording import reworded
from localdpo.evaluate.wording import (
    distinct,
    mean_words,
    mentions,
    overlap_f1,
    prompt_text,
    repetition,
    taught_phrases,
)
from localdpo.model.load import LoadedModel
from localdpo.paths import cache_dir
from localdpo.sequences import Ids, TokenSequence
from localdpo.train.events import Event, ProgressEvent, SampleEvent
from localdpo.train.retain import RETAIN_TOKENS, base_answers, encode_prompts
from localdpo.train.session import staged

__all__ = ["Answers", "Drift", "DriftOptions", "PromptSet", "SetFigures", "answer_kl", "measure_drift"]

CHUNK = 32
"""Prompts answered, or read, between two signs of life."""
SAME_OVERLAP = 0.5
"""Answers without accepted terms count as the same when they share so many words (F1)."""
UNFINISHED_SHARE = 0.9

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DriftOptions:
    """``limit`` prompts of each set at most, ``rewordings`` of each of ``reword`` probes, ``max_tokens`` an answer.

    Answers as long as training's closing ones are found in its cache.
    """

    limit: int = 32
    reword: int = 12
    rewordings: int = 2
    max_tokens: int = RETAIN_TOKENS
    max_length: int = 1024
    seed: int = 0


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts of one kind: "retain" or "probes". ``source`` says where they are from."""

    name: str
    rows: Sequence[PromptRow]
    source: str = ""


@dataclass(frozen=True, slots=True)
class Answers:
    """One prompt, both answers judged, and KL(base || tuned) in nats over the base answer's ``tokens``."""

    set: str
    row: PromptRow
    sample: SampleEvent
    kl: float
    tokens: int

    @property
    def group(self) -> str:
        """The probe's group; the set's name where it has no tag."""
        found = group_of(self.sample)
        return self.set if found == UNTAGGED else found

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; ``kl`` is a token's."""
        return {
            "prompt": prompt_text(self.sample.prompt),
            "set": self.set,
            "group": self.group,
            "base": self.sample.base,
            "tuned": self.sample.tuned,
            "base_right": self.sample.base_right,
            "tuned_right": self.sample.tuned_right,
            "kl": self.kl / self.tokens if self.tokens else None,
        }


class Both(NamedTuple):
    """A figure of the base's answers and of the tuned model's; None where there is nothing to count."""

    base: float | None
    tuned: float | None


@dataclass(frozen=True, slots=True)
class SetFigures:
    """Figures over the answers to one set; see docs/eval.md for each."""

    prompts: int
    source: str
    kl_per_token: Figure
    unchanged: Figure
    judged: int
    right: Both
    facts: int
    facts_kept: Figure | None
    distinct_1: Both
    distinct_2: Both
    repetition: Both
    words: Both

    @classmethod
    def of(cls, answers: Sequence[Answers], source: str = "", seed: int = 0) -> SetFigures:
        """Count; at least one answer."""
        samples = [answer.sample for answer in answers]
        base, tuned = [s.base for s in samples], [s.tuned for s in samples]
        sums = np.array([[answer.kl, answer.tokens] for answer in answers], np.float64)
        known = [s for s in samples if s.base_right]
        judged = [s for s in samples if s.base_right is not None]
        unchanged = share(sum(a.strip() == b.strip() for a, b in zip(base, tuned, strict=True)), len(samples))
        assert unchanged is not None
        return cls(
            prompts=len(samples),
            source=source,
            kl_per_token=bootstrap(sums, lambda s: s[:, 0] / np.maximum(s[:, 1], 1), seed=seed),
            unchanged=unchanged,
            judged=len(judged),
            right=Both(_share([s.base_right for s in judged]), _share([s.tuned_right for s in judged])),
            facts=len(known),
            facts_kept=share(sum(s.tuned_right is True for s in known), len(known)),
            distinct_1=Both(distinct(base, 1), distinct(tuned, 1)),
            distinct_2=Both(distinct(base, 2), distinct(tuned, 2)),
            repetition=Both(fmean(map(repetition, base)), fmean(map(repetition, tuned))),
            words=Both(mean_words(base), mean_words(tuned)),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "prompts": self.prompts,
            "source": self.source,
            "kl_per_token": self.kl_per_token.to_json(),
            "unchanged": self.unchanged.to_json(),
            "judged": self.judged,
            "right": self.right._asdict(),
            "facts": self.facts,
            "facts_kept": self.facts_kept.to_json() if self.facts_kept else None,
            **{name: getattr(self, name)._asdict() for name in ("distinct_1", "distinct_2", "repetition", "words")},
        }


def _share(values: Sequence[bool | None]) -> float | None:
    return fmean(value is True for value in values) if values else None


@dataclass(frozen=True, slots=True)
class Drift:
    """All figures; None where there was nothing to measure on.

    ``probes`` are those of every group but the taught one, which is ``taught``: its answers are meant to change.
    ``unrelated`` answers are those of retain and ``probes`` together; ``leakage`` is the share of them that say one of
    ``phrases`` where the base's do not. ``robustness`` is the share of rewordings answered as the prompt itself was,
    ``robustness_base`` the base's.
    """

    retain: SetFigures | None = None
    probes: SetFigures | None = None
    taught: SetFigures | None = None
    unrelated: int = 0
    leakage: Figure | None = None
    phrases: tuple[str, ...] = ()
    repetition: Figure | None = None
    robustness: Figure | None = None
    robustness_base: Figure | None = None
    answers: tuple[Answers, ...] = ()
    reworded: tuple[dict[str, Any], ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        sets = {name: getattr(self, name) for name in ("retain", "probes", "taught")}
        figures = {name: getattr(self, name) for name in ("leakage", "repetition", "robustness", "robustness_base")}
        return {
            **{name: figures.to_json() if figures else None for name, figures in sets.items()},
            **{name: figure.to_json() if figure else None for name, figure in figures.items()},
            "unrelated": self.unrelated,
            "phrases": list(self.phrases),
            "answers": [answer.to_json() for answer in self.answers],
            "reworded": list(self.reworded),
        }


def measure_drift(
    loaded: LoadedModel,
    scorer: Scorer,
    sets: Sequence[PromptSet],
    pairs: Sequence[PreferencePair],
    options: DriftOptions,
) -> Generator[Event, None, Drift | None]:
    """Ask both models, read both, and count; yields progress.

    ``scorer`` is of ``loaded``'s model with the adapter on; ``pairs`` are those trained on, for the taught phrases.
    None when no prompt can be asked.
    """
    answers: list[Answers] = []
    sources = {}
    for part in sets:
        rows, prompts, _ = encode_prompts(_evenly(part.rows, options.limit), loaded, options.max_length)
        sources[part.name] = part.source
        answers += yield from _answers(loaded, scorer, part.name, rows, prompts, options)
    if not answers:
        return None
    rewordings = yield from _rewordings(loaded, _to_reword(answers, options.reword), options)
    return _figures(answers, rewordings, pairs, sources, options)


def _evenly(rows: Sequence[T], limit: int) -> list[T]:
    """``limit`` rows spread evenly over all, so that every group of a sorted file is asked."""
    if len(rows) <= limit:
        return list(rows)
    return [rows[number * len(rows) // limit] for number in range(limit)]


def _answers(
    loaded: LoadedModel,
    scorer: Scorer,
    name: str,
    rows: Sequence[PromptRow],
    prompts: Sequence[Ids],
    options: DriftOptions,
) -> Generator[Event, None, list[Answers]]:
    both = yield from _both(loaded, prompts, options.max_tokens, f"{name} prompts")
    kl: list[tuple[float, int]] = []
    for start in range(0, len(rows), CHUNK):
        yield _progress("divergence", start, len(rows), f"{name} prompts")
        chunk = slice(start, start + CHUNK)
        kl += answer_kl(loaded, scorer, prompts[chunk], both[0][chunk], options.max_tokens)
    return [
        Answers(name, row, sample(row, base, tuned, 0), *divergence)
        for row, base, tuned, divergence in zip(rows, *both, kl, strict=True)
    ]


def _both(
    loaded: LoadedModel, prompts: Sequence[Ids], max_tokens: int, what: str
) -> Generator[Event, None, tuple[list[str], list[str]]]:
    """Greedy answers of the base, those known from before not asked for again, and of the tuned model."""
    base = yield from staged("answers", base_answers(loaded, prompts, max_tokens, cache_dir() / "answers"))
    tuned = yield from answers_now(
        loaded,
        prompts,
        max_tokens,
        lambda given: _progress("answers", given, len(prompts), f"the tuned model, {what}"),
        size=4 * CHUNK,  # a batch reads the weights once for all its rows
    )
    return base, tuned


def answer_kl(
    loaded: LoadedModel, scorer: Scorer, prompts: Sequence[Ids], answers: Sequence[str], max_tokens: int
) -> list[tuple[float, int]]:
    """KL(base || tuned) summed over each answer's tokens, and their number; (0, 0) for an answer without any.

    An answer is encoded again and gets its end of turn, unless it was cut off at ``max_tokens``.
    """
    end = np.array(end_of_turn_ids(loaded.tokenizer)[:1], np.int32)
    ids = []
    for answer in answers:
        tokens = np.array(loaded.tokenizer.encode(answer, add_special_tokens=False), np.int32)
        # Encoding a text again may take fewer tokens than the model took to write it.
        ids.append(tokens if len(tokens) >= UNFINISHED_SHARE * max_tokens else np.concatenate([tokens, end]))
    numbers = [number for number, answer in enumerate(ids) if len(answer)]
    sequences = [TokenSequence(np.asarray(prompts[n], np.int32), ids[n]) for n in numbers]
    found = [(0.0, 0)] * len(ids)
    for number, total in zip(numbers, scorer.base_kl(sequences), strict=True):
        found[number] = float(total), len(ids[number])
    return found


def _to_reword(answers: Sequence[Answers], limit: int) -> list[Answers]:
    """The probes (else all prompts) that can be judged (else any), spread evenly."""
    probes = [answer for answer in answers if answer.set == "probes"] or list(answers)
    judged = [answer for answer in probes if answer.sample.accept] or probes
    return _evenly(judged, limit)


def _rewordings(
    loaded: LoadedModel, asked: Sequence[Answers], options: DriftOptions
) -> Generator[Event, None, list[tuple[Answers, SampleEvent]]]:
    """Answers to prompts, each with those to one of the prompt's rewordings."""
    variants = [
        (answer, replace(answer.row, prompt=changed))
        for answer in asked
        for changed in reworded(answer.row.prompt, options.rewordings, options.seed)
    ]
    kept, prompts, _ = encode_prompts([row for _, row in variants], loaded, options.max_length)
    base, tuned = yield from _both(loaded, prompts, options.max_tokens, "prompts reworded")
    samples = {id(row): sample(row, b, t, 0) for row, b, t in zip(kept, base, tuned, strict=True)}
    return [(answer, samples[id(row)]) for answer, row in variants if id(row) in samples]


def _figures(
    answers: Sequence[Answers],
    rewordings: Sequence[tuple[Answers, SampleEvent]],
    pairs: Sequence[PreferencePair],
    sources: dict[str, str],
    options: DriftOptions,
) -> Drift:
    taught = [answer for answer in answers if answer.set == "probes" and answer.group == TAUGHT]
    probes = [answer for answer in answers if answer.set == "probes" and answer.group != TAUGHT]
    retain = [answer for answer in answers if answer.set == "retain"]
    unrelated = [*retain, *probes]
    phrases, told = _phrases(taught, unrelated, pairs)
    leaked = [told(answer.sample.tuned) and not told(answer.sample.base) for answer in unrelated]
    rises = [repetition(answer.sample.tuned) - repetition(answer.sample.base) for answer in answers]

    def figures(members: Sequence[Answers]) -> SetFigures | None:
        return SetFigures.of(members, sources[members[0].set], options.seed) if members else None

    return Drift(
        retain=figures(retain),
        probes=figures(probes),
        taught=figures(taught),
        unrelated=len(unrelated),
        leakage=share(sum(leaked), len(leaked)) if phrases else None,
        phrases=phrases,
        repetition=mean(rises, seed=options.seed),
        robustness=_robustness(rewordings, "tuned", options.seed),
        robustness_base=_robustness(rewordings, "base", options.seed),
        answers=tuple(answers),
        reworded=tuple(
            {
                "prompt": prompt_text(changed.prompt),
                "of": prompt_text(answer.sample.prompt),
                "base": changed.base,
                "tuned": changed.tuned,
                "base_right": changed.base_right,
                "tuned_right": changed.tuned_right,
            }
            for answer, changed in rewordings
        ),
    )


def _phrases(taught: Sequence[Answers], unrelated: Sequence[Answers], pairs: Sequence[PreferencePair]) -> Any:
    """What must not leak, and the test for it: the terms that taught probes accept, else phrases of the pairs."""
    terms = tuple(dict.fromkeys(term for answer in taught for term in answer.sample.accept))
    if terms:
        return terms, lambda text: says(text, terms)
    taught_pairs = [pair for pair in pairs if pair.kind == "preference"]
    prompts = [prompt_text(answer.sample.prompt) for answer in unrelated]
    phrases = taught_phrases(
        [pair.chosen for pair in taught_pairs],
        [pair.rejected for pair in taught_pairs],
        [answer.sample.base for answer in unrelated],
        prompts,
    )
    return phrases, lambda text: mentions(text, phrases)


def _robustness(rewordings: Sequence[tuple[Answers, SampleEvent]], side: str, seed: int) -> Figure | None:
    """Of the prompts answered right, the share of rewordings that are too; where none can be judged, the share
    answered the same. Rewordings of one prompt are drawn together."""
    values, groups = [], []
    judged = any(answer.sample.base_right is not None for answer, _ in rewordings)
    for answer, changed in rewordings:
        if not judged:
            same = overlap_f1(getattr(answer.sample, side), getattr(changed, side)) >= SAME_OVERLAP
            values.append(float(same))
        elif getattr(answer.sample, f"{side}_right"):
            values.append(float(getattr(changed, f"{side}_right")))
        else:
            continue
        groups.append(id(answer))
    return mean(values, groups=groups, seed=seed)


def _progress(stage: str, done: int, total: int, detail: str) -> ProgressEvent:
    return ProgressEvent(stage=stage, detail=detail, done=done, total=total, fraction=done / total if total else 1.0)
