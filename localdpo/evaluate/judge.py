"""A local model as the judge of a blind comparison: two sides' answers to the same prompts, each shown in both orders.

Only an answer that is named in both orders has won; a judge that names one place twice has not decided, which is a
tie, and ties are kept apart. The verdicts go into a journal of `blind`, so that they are counted, shown and gone on
with like a person's; the same sides are never asked about twice. A small judge mostly likes one place: `same_place`
says how often, and above about half of the prompts its verdicts say little. It knows nothing about what is good.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from localdpo.data.candidates import Candidate, CandidateJournal, Request
from localdpo.data.fields import Message
from localdpo.data.judging import CRITERION, Verdict, ballots, read_verdict, verdict_of
from localdpo.data.pairs import prompt_key, read_prompts
from localdpo.errors import InputError, Problem
from localdpo.evaluate.blind import BlindTest, Choice, Comparison, Outcome, WinRate, swapped
from localdpo.evaluate.generate.speakers import Answered, Models, Source, answer_all
from localdpo.evaluate.generate.work import VERDICT_TOKENS
from localdpo.evaluate.heldout import held_out_pairs, recipe_of
from localdpo.evaluate.suitefile import sample_rows
from localdpo.files import environment_faults, sha256_file
from localdpo.model.lora import WEIGHTS_FILE
from localdpo.model.sampling import SamplingOptions
from localdpo.steps import Steps
from localdpo.train.events import ProgressEvent
from localdpo.train.run import RunFolder

__all__ = ["JudgeResult", "Side", "judge_answers", "judge_run"]

MAX_TOKENS = 128
STAGE = "judge"
_LIMIT = 100

Prompt = tuple[Message, ...]
Work = Generator[ProgressEvent, None, "JudgeResult"]


@dataclass(frozen=True, slots=True)
class Side:
    """Whose answers: a name for people, and what to load."""

    name: str
    source: Source


@dataclass(frozen=True, slots=True)
class JudgeResult:
    """How side b did against side a by a judge.

    ``rate`` counts decided prompts and ties; prompts whose replies name nothing are its skipped ones. ``same``
    prompts got the same answer from both sides: ties nobody was asked about. ``same_place`` counts prompts where the
    judge named the same place in both orders, of ``asked``. ``left_out`` had no answer to judge.
    """

    a: str
    b: str
    judge: str
    rate: WinRate
    asked: int
    same: int
    same_place: int
    left_out: int
    journal: Path

    def to_json(self) -> dict[str, Any]:
        """A row of "blind" in eval.json."""
        low, high = self.rate.interval
        return {
            "a": self.a,
            "b": self.b,
            "wins": self.rate.wins,
            "losses": self.rate.losses,
            "ties": self.rate.ties,
            "unclear": self.rate.skipped,
            "rate": {"value": self.rate.rate, "low": low, "high": high},
            "judge": self.judge,
            "asked": self.asked,
            "same_place": self.same_place,
            "left_out": self.left_out,
        }

    def sentence(self) -> str:
        """The result in words, with what the judge's habits make of it."""
        text = self.rate.sentence(self.b, self.a)
        if self.asked and self.same_place * 2 > self.asked:
            text += f"; the judge named the same place twice for {self.same_place} of {self.asked}: it hardly judges"
        return text


def judge_run(
    run: str | Path,
    judge: str,
    *,
    against: str | Path | None = None,
    pairs_file: str | Path | None = None,
    prompts_file: str | Path | None = None,
    limit: int | None = _LIMIT,
    max_tokens: int = MAX_TOKENS,
    criterion: str = CRITERION,
    seed: int = 0,
    models: Models | None = None,
) -> Work:
    """Let a local model judge a run (side b) against its base, or against another run (side a).

    The prompts are those of the pairs that the run held out or of ``pairs_file``, or those of ``prompts_file``; at
    most ``limit`` are drawn by ``seed``. One model is in memory at a time: let go of a loaded one first. The journals
    are in the run's folder ``blind``; the same call goes on where it was ended. Raises InputError for what is no run
    with an adapter, when there are no prompts, and what loading a model raises.
    """
    folder = RunFolder(run)
    b = _side(folder)
    a = Side("base", replace(b.source, adapter=None)) if against is None else _side(RunFolder(against))
    found = (
        held_out_pairs(folder, recipe_of(folder), pairs_file) if prompts_file is None else read_prompts(prompts_file)
    )
    distinct = list({prompt_key(row.prompt): row.prompt for row in found}.values())
    prompts = [distinct[i] for i in sample_rows(len(distinct), limit, seed)]
    own = models or Models()
    try:
        texts: list[list[str | None]] = []
        for side in (a, b):
            said = yield from _asked(own, side.source, prompts, max_tokens, _answers(folder), f"{side.name} answers")
            texts.append([answer.text if isinstance(answer, Candidate) else None for answer in said])
        pairs = [(p, one, other) for p, one, other in zip(prompts, *texts, strict=True) if one and other]
        if not pairs:
            raise InputError(Problem(str(run), "no prompt was answered by both sides", "Give other prompts"))
        journal = folder.path / "blind" / f"judge-{_key(a, b, judge, criterion, max_tokens)}.jsonl"
        result = yield from judge_answers(
            journal, (a.name, b.name), pairs, judge, criterion=criterion, seed=seed, models=own
        )
    finally:
        if models is None:
            own.close()
    return replace(result, left_out=len(prompts) - len(pairs))


def judge_answers(
    journal: Path,
    sides: tuple[str, str],
    answers: Sequence[tuple[Prompt, str, str]],
    judge: str,
    *,
    criterion: str = CRITERION,
    seed: int = 0,
    models: Models | None = None,
) -> Work:
    """Judge given answers: (prompt, side a's, side b's). ``journal`` is made, or gone on with.

    Raises InputError when it is no journal of a blind test or of other sides, and what loading a model raises.
    """
    test = _opened(journal, sides, judge, criterion, seed)
    for prompt, one, other in answers:
        test.add(Comparison(_digest([[dict(turn) for turn in prompt], one, other]), prompt, (one, other)))
    wanted = {_digest([[dict(turn) for turn in prompt], one, other]) for prompt, one, other in answers}
    # Those that an earlier call left without a verdict are asked about too: a journal is judged in its order.
    to_ask = [
        item
        for key, item in test.comparisons.items()
        if _differ(item) and (key in wanted or key not in test.judgements)
    ]
    requests = [
        Request(tuple(ballot.question(item.prompt, item.answers, criterion)))
        for item in to_ask
        for ballot in ballots(2)
    ]
    own = models or Models()
    try:
        replies = yield from _replies(own, judge, requests, journal)
    finally:
        if models is None:
            own.close()
    verdicts = {item.id: (replies[2 * n], replies[2 * n + 1]) for n, item in enumerate(to_ask)}
    _record(test, verdicts)
    outcomes = [test.judgements[key].outcome for key in test.comparisons if key in wanted]
    rate = WinRate(outcomes.count("b"), outcomes.count("a"), outcomes.count("tie"), outcomes.count("skip"))
    seen = [verdicts[key] for key in wanted if key in verdicts]
    same_place = sum(one == other and one in ("first", "second") for one, other in seen)
    return JudgeResult(*sides, judge, rate, len(seen), len(wanted) - len(seen), same_place, 0, journal)


def _opened(journal: Path, sides: tuple[str, str], judge: str, criterion: str, seed: int) -> BlindTest:
    if not journal.exists():
        with environment_faults(journal):
            journal.parent.mkdir(parents=True, exist_ok=True)
        return BlindTest.start(journal, sides, seed, {"judge": judge, "criterion": criterion})
    test = BlindTest.resume(journal)
    if test.sides != sides or test.about.get("judge") != judge:
        message = f"holds verdicts of {test.about.get('judge', 'a person')} on {' and '.join(test.sides)}"
        raise InputError(Problem(str(journal), message, "Choose another journal"))
    return test


def _replies(
    models: Models, judge: str, requests: Sequence[Request], journal: Path
) -> Generator[ProgressEvent, None, list[Verdict]]:
    """The judge's verdict on each request, in terms of the order it was shown; "unclear" where it gave none."""
    if not requests:
        return []
    prompts = [request.prompt for request in requests]
    found = yield from _asked(
        models, Source(judge), prompts, VERDICT_TOKENS, _answers_beside(journal), f"{judge} judges"
    )
    return [read_verdict(reply.text) if isinstance(reply, Candidate) else "unclear" for reply in found]


def _record(test: BlindTest, verdicts: dict[str, tuple[Verdict, Verdict]]) -> None:
    """Write a verdict for every comparison that has none; equal answers are a tie."""
    while (shown := test.current()) is not None:
        one, other = verdicts.get(shown.id, ("tie", "tie"))
        outcomes: dict[Verdict, Outcome] = {"first": "a", "second": "b", "tie": "tie", "unclear": "skip"}
        test.judge(_as_shown(outcomes[verdict_of(one, other)], swapped(test.seed, shown.id)))


def _as_shown(outcome: Outcome, flipped: bool) -> Choice:
    """What a judge who saw the journal's own order would have said."""
    if outcome == "tie" or outcome == "skip":
        return outcome
    return "first" if (outcome == "b") == flipped else "second"


def _differ(item: Comparison) -> bool:
    return item.answers[0].strip() != item.answers[1].strip()


def _asked(
    models: Models, source: Source, prompts: Sequence[Prompt], max_tokens: int, journal: Path, detail: str
) -> Generator[ProgressEvent, None, list[Answered]]:
    """Greedy answers of a model to prompts; those in the journal are not asked for again."""
    yield ProgressEvent(stage="load", detail=source.name, total=1)
    requests = [Request(prompt) for prompt in prompts]
    work = answer_all(
        models.speaker(source), requests, SamplingOptions(max_tokens=max_tokens), 0, CandidateJournal.open(journal)
    )
    steps = Steps(work)
    for done, total in steps:
        yield ProgressEvent(stage=STAGE, detail=detail, done=done, total=total, fraction=done / total if total else 1)
    return steps.result


def _side(run: RunFolder) -> Side:
    recipe = recipe_of(run)
    return Side(run.path.resolve().name, Source(recipe.model, run.adapter, recipe.quantize, recipe.train.memory))


def _answers(run: RunFolder) -> Path:
    return run.path / "blind" / "answers" / "sides.jsonl"


def _answers_beside(journal: Path) -> Path:
    return journal.parent / "answers" / "judges.jsonl"


def _key(a: Side, b: Side, judge: str, criterion: str, max_tokens: int) -> str:
    """A journal's name: another adapter, judge or question makes another journal."""
    weights = [sha256_file(side.source.adapter / WEIGHTS_FILE) for side in (a, b) if side.source.adapter is not None]
    decides = [weights, a.name, b.name, a.source.model, b.source.model, judge, criterion, max_tokens]
    return f"{_slug(b.name)}-{_slug(a.name)}-{_digest(decides)[:8]}"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "-" for c in name)[:40] or "run"


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()[:16]
