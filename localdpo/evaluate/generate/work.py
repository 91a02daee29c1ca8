"""Generate pairs: candidates for each prompt, then a method that makes pairs of them.

The work yields how far it is and returns what came of it: pairs, ties, answers to be edited, and a count with a
reason for every prompt that gave none. All answers, a judge's and a rewriter's too, are in the journal, so a run
that was ended asks nothing twice.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from localdpo.data.candidates import Candidate, CandidateJournal, Request
from localdpo.data.judging import CRITERION, Verdict, ballots, read_verdict, standing
from localdpo.data.leftout import LeftOut
from localdpo.data.pairing import (
    REWRITE,
    Edits,
    Substitution,
    Unfinished,
    best_and_worst,
    by_standing,
    corrected,
    distinct,
    rewrite_request,
    substituted,
    without_thanks,
)
from localdpo.data.pairs import PreferencePair, PromptRow, prompt_key
from localdpo.data.provenance import PROVENANCE, by_person
from localdpo.data.rewards import RewardSum
from localdpo.errors import InputError, Problem
from localdpo.evaluate.generate.speakers import Answered, Models, Source, answer_all
from localdpo.model.sampling import SamplingOptions
from localdpo.steps import mapped
from localdpo.train.events import ProgressEvent

__all__ = [
    "ByEdits", "ByJudge", "ByRewards", "ByRewrite", "BySubstitution", "GenerateSettings", "Generated", "Method",
    "generate_pairs",
]  # fmt: skip

MOST_JUDGED = 6
"""Answers to a prompt that a judge compares, two by two and in both orders: 30 questions."""
VERDICT_TOKENS = 12


@dataclass(frozen=True, slots=True)
class ByRewards:
    """The best answer against the worst, by rewards."""

    rewards: RewardSum
    unfinished: Unfinished = "rejected"
    min_gap: float = 0.0


@dataclass(frozen=True, slots=True)
class ByJudge:
    """The best answer against the worst, by a model that is asked in both orders."""

    judge: Source
    criterion: str = CRITERION


@dataclass(frozen=True, slots=True)
class BySubstitution:
    """Each answer rejected; the same with some text replaced is chosen."""

    substitutions: tuple[Substitution, ...]


@dataclass(frozen=True, slots=True)
class ByEdits:
    """Each answer rejected; what a person made of it is chosen. Without the file, its rows are written first."""

    edits: Edits


@dataclass(frozen=True, slots=True)
class ByRewrite:
    """Each answer rejected; a stronger model's rewrite of it is chosen."""

    writer: Source
    instruction: str = REWRITE


Method = ByRewards | ByJudge | BySubstitution | ByEdits | ByRewrite


@dataclass(frozen=True, slots=True)
class GenerateSettings:
    """Who answers, how often, how, and what pairs are made of the answers. ``seed`` is of all sampling."""

    sources: tuple[Source, ...]
    method: Method
    samples: int = 4
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions(max_tokens=256, temperature=0.8))
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise InputError for settings that cannot give a pair."""
        problems = []
        if self.samples < 1:
            problems.append(Problem("--samples", f"{self.samples} must be 1 or more"))
        several = self.samples * len(self.sources)
        if isinstance(self.method, ByRewards | ByJudge) and several < 2:
            problems.append(Problem("--samples", "one answer a prompt has no best and worst", "Ask for 2 or more"))
        if self.sampling.temperature == 0 and self.samples > 1:
            message = f"0 gives {self.samples} times the same answer"
            problems.append(Problem("--temperature", message, "Raise it, or set --samples 1"))
        if isinstance(self.method, ByJudge) and several > MOST_JUDGED:
            message = f"a judge compares at most {MOST_JUDGED} answers a prompt, and {several} are asked for"
            problems.append(Problem("--samples", message, "Ask for fewer"))
        if problems:
            raise InputError(*problems)


@dataclass(slots=True)
class Generated:
    """What came of it. ``ties`` and ``to_edit`` are rows of JSON; ``same_place`` counts a judge's biased replies."""

    prompts: int = 0
    answers: int = 0
    unfinished: int = 0
    pairs: list[PreferencePair] = field(default_factory=list)
    ties: list[dict[str, Any]] = field(default_factory=list)
    to_edit: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=lambda: LeftOut("answer"))
    compared: int = 0
    same_place: int = 0


Work = Generator[ProgressEvent, None, Generated]
Candidates = list[tuple[PromptRow, list[Candidate]]]


def generate_pairs(
    rows: Sequence[PromptRow], settings: GenerateSettings, journal: CandidateJournal, models: Models | None = None
) -> Work:
    """Make pairs for ``rows``. Raises InputError and what loading a model raises."""
    result = Generated()
    own = models or Models()
    try:
        found = yield from _candidates(rows, settings, journal, own, result)
        method = settings.method
        match method:
            case ByRewards():
                for row, candidates in found:
                    made = best_and_worst(
                        row, candidates, method.rewards, unfinished=method.unfinished, min_gap=method.min_gap
                    )
                    _take(result, row, made)
            case BySubstitution():
                _substitute(found, method, result)
            case ByEdits():
                _edit(found, method, result)
            case ByRewrite():
                yield from _rewrite(found, method, settings, journal, own, result)
            case ByJudge():
                yield from _judge(found, method, settings, journal, own, result)
    finally:
        if models is None:
            own.close()
    return result


def _take(result: Generated, row: PromptRow, made: PreferencePair | str) -> None:
    if isinstance(made, str):
        result.left_out.add(row.line, made)
    else:
        result.pairs.append(made)


def _progress(stage: str, detail: str, done: int, total: int) -> ProgressEvent:
    return ProgressEvent(stage=stage, detail=detail, done=done, total=total, fraction=done / total if total else 1.0)


def _asked(
    source: Source,
    stage: str,
    requests: Sequence[Request],
    sampling: SamplingOptions,
    seed: int,
    journal: CandidateJournal,
    models: Models,
) -> Generator[ProgressEvent, None, list[Answered]]:
    yield _progress("load", source.name, 0, 1)
    work = answer_all(models.speaker(source), requests, sampling, seed, journal)
    return (yield from mapped(work, lambda counts: _progress(stage, source.name, *counts)))


def _candidates(
    rows: Sequence[PromptRow],
    settings: GenerateSettings,
    journal: CandidateJournal,
    models: Models,
    result: Generated,
) -> Generator[ProgressEvent, None, Candidates]:
    """The answers of every source to every prompt; a prompt that comes again is left out."""
    first: dict[bytes, PromptRow] = {}
    for row in rows:
        if prompt_key(row.prompt) in first:
            result.left_out.add(row.line, "its prompt is an earlier one", settings.samples * len(settings.sources))
        first.setdefault(prompt_key(row.prompt), row)
    result.prompts = len(first)
    kept = list(first.values())
    requests = [Request(row.prompt, sample) for row in kept for sample in range(settings.samples)]
    by_row: dict[int, list[Candidate]] = {number: [] for number in range(len(kept))}
    for source in settings.sources:
        answers = yield from _asked(source, "answers", requests, settings.sampling, settings.seed, journal, models)
        for number, answer in enumerate(answers):
            owner = number // settings.samples
            if isinstance(answer, str):
                result.left_out.add(kept[owner].line, answer)
                continue
            result.answers += 1
            result.unfinished += answer.unfinished
            by_row[owner].append(answer)
    return [(kept[number], candidates) for number, candidates in by_row.items() if candidates]


def _substitute(found: Candidates, method: BySubstitution, result: Generated) -> None:
    for row, candidates in found:
        for candidate in distinct(candidates):
            if candidate.unfinished:
                result.left_out.add(row.line, "its answer was cut off at the token limit")
                continue
            better = substituted(candidate, method.substitutions)
            _take(result, row, corrected(row, candidate, better, "substitution"))


def _edit(found: Candidates, method: ByEdits, result: Generated) -> None:
    edits = method.edits.read() if method.edits.path.exists() else None
    for row, candidates in found:
        for candidate in distinct(candidates):
            if edits is None:
                result.to_edit.append(method.edits.line(row, candidate))
                continue
            text = edits.get(method.edits.key(row, candidate))
            if text is None:
                result.left_out.add(row.line, f"its answer is not in {method.edits.path.name}")
                continue
            _take(result, row, corrected(row, candidate, Candidate(text, by_person()), "edit"))


def _greedy(max_tokens: int) -> SamplingOptions:
    return SamplingOptions(max_tokens=max_tokens)


def _rewrite(
    found: Candidates,
    method: ByRewrite,
    settings: GenerateSettings,
    journal: CandidateJournal,
    models: Models,
    result: Generated,
) -> Generator[ProgressEvent, None, None]:
    asked = [(row, candidate) for row, candidates in found for candidate in distinct(candidates)]
    requests = [Request(tuple(rewrite_request(row.prompt, c.text, method.instruction))) for row, c in asked]
    # Twice the room: a rewrite may be longer than what it rewrites.
    sampling = _greedy(2 * settings.sampling.max_tokens)
    answers = yield from _asked(method.writer, "rewrites", requests, sampling, settings.seed, journal, models)
    for (row, candidate), answer in zip(asked, answers, strict=True):
        if isinstance(answer, str):
            result.left_out.add(row.line, f"it cannot be rewritten: {answer}")
        elif answer.unfinished:
            result.left_out.add(row.line, "its rewrite was cut off at the token limit")
        else:
            better = Candidate(without_thanks(answer.text), replace(answer.origin, by="rewrite"))
            note = {"instruction": method.instruction}
            _take(result, row, corrected(row, candidate, better, "rewrite", **note))


def _judge(
    found: Candidates,
    method: ByJudge,
    settings: GenerateSettings,
    journal: CandidateJournal,
    models: Models,
    result: Generated,
) -> Generator[ProgressEvent, None, None]:
    judged: Candidates = []
    requests: list[Request] = []
    for row, candidates in found:
        # An answer that was cut off is not shown: a judge cannot know why it ends there.
        shown = distinct([candidate for candidate in candidates if not candidate.unfinished])
        if len(shown) < 2:
            result.left_out.add(row.line, "fewer than two different answers are finished", len(candidates))
            continue
        judged.append((row, shown))
        texts = [candidate.text for candidate in shown]
        asked = [ballot.question(row.prompt, texts, method.criterion) for ballot in ballots(len(shown))]
        requests += [Request(tuple(question)) for question in asked]
    answers = yield from _asked(
        method.judge, "verdicts", requests, _greedy(VERDICT_TOKENS), settings.seed, journal, models
    )
    at = 0
    for row, shown in judged:
        count = len(ballots(len(shown)))
        _settle(row, shown, answers[at : at + count], method, result)
        at += count


def _settle(
    row: PromptRow, shown: list[Candidate], answers: Sequence[Answered], method: ByJudge, result: Generated
) -> None:
    """The pair that the verdicts on one prompt make, or a tie for a person to settle."""
    failed = next((answer for answer in answers if isinstance(answer, str)), None)
    if failed is not None:
        result.left_out.add(row.line, f"it cannot be judged: {failed}", len(shown))
        return
    replies = [answer for answer in answers if isinstance(answer, Candidate)]
    verdicts: list[Verdict] = [read_verdict(reply.text) for reply in replies]
    found = standing(len(shown), verdicts)
    result.compared += found.compared
    result.same_place += found.same_place
    made = by_standing(row, shown, found, replies[0].origin, method.criterion)
    if isinstance(made, PreferencePair):
        result.pairs.append(made)
        return
    result.ties.append(
        {
            "prompt": [dict(turn) for turn in row.prompt],
            "answers": [candidate.text for candidate in shown],
            "wins": list(found.wins),
            "reason": made,
            PROVENANCE: {"how": "tie", "answers": [candidate.origin.to_json() for candidate in shown]},
        }
    )
