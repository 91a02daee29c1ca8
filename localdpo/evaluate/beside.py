"""The base beside the tuned model: their answers to the same prompts, and how likely they find the same answers.

The base is the model with its adapters off, and what it says or scores is kept in the caches that training uses. A
model without an adapter is its own base, and asked once. This module judges nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from localdpo.core.reference import ReferenceCache
from localdpo.core.score import Scorer
from localdpo.data.chat import ChatFormat, Refusal
from localdpo.data.fields import Message
from localdpo.model.generate import batch_greedy
from localdpo.model.load import LoadedModel
from localdpo.model.lora import adapter_weights
from localdpo.paths import cache_dir
from localdpo.sequences import EncodedRow, Ids, RowValues, completion_lengths, sequences_of
from localdpo.steps import mapped
from localdpo.train.events import ProgressEvent
from localdpo.train.retain import CHUNK, base_answers

__all__ = [
    "Both",
    "Question",
    "Scored",
    "Scores",
    "answers_now",
    "both_answers",
    "both_logps",
    "encode_question",
    "one_by_one",
    "progress",
]

_Result = TypeVar("_Result")


class _HasName(Protocol):
    @property
    def name(self) -> str: ...


_Named = TypeVar("_Named", bound=_HasName)

SCORED_TOGETHER = 64
"""Answers scored between two reports."""

Both = tuple[list[str], list[str]]
"""The base's and the tuned model's answers."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the answers whose log-probs are wanted, as token ids; an answer ends in its end-of-turn token."""

    prompt_ids: Ids
    answers: tuple[Ids, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """The log-prob (nats) of each answer of a question, summed over its tokens, and how many those are; [answers]."""

    logps: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]

    @property
    def per_token(self) -> npt.NDArray[np.float64]:
        """Mean log-prob of a token."""
        return self.logps / self.tokens


Scores = tuple[list[Scored], list[Scored]]
"""The base's and the tuned model's, a question each."""


def progress(stage: str, detail: str, done: int, total: int) -> ProgressEvent:
    """``done`` of ``total`` of a stage."""
    return ProgressEvent(stage=stage, detail=detail, done=done, total=total, fraction=done / total if total else 1.0)


def one_by_one(
    stage: str, asked: Sequence[_Named], ask: Callable[[_Named], Generator[ProgressEvent, None, _Result]]
) -> Generator[ProgressEvent, None, list[_Result]]:
    """``ask`` of each in turn, announced by its name."""
    results = []
    for number, one in enumerate(asked):
        yield progress(stage, one.name, number, len(asked))
        results.append((yield from ask(one)))
    return results


def encode_question(
    chat: ChatFormat, prompt: Sequence[Message], answers: Sequence[str], longest: int
) -> Question | str:
    """The ids of a prompt and the answers to it; or the reason why there are none, as when they exceed ``longest``."""
    try:
        conversation = chat.encode(prompt, answers)
    except Refusal as refusal:
        return str(refusal)
    ids = [np.asarray(ids, np.int32) for ids in (conversation.prompt_ids, *conversation.completions)]
    size = len(ids[0]) + max((len(answer) for answer in ids[1:]), default=0)
    if size > longest:
        return f"it has {size:,} tokens, and the model has room for {longest:,}"
    return Question(ids[0], tuple(ids[1:]))


def longest_of(loaded: LoadedModel) -> int:
    """Tokens that the model was made for; 4096 where its config does not say."""
    limit = loaded.config.get("max_position_embeddings")
    return limit if isinstance(limit, int) and limit > 0 else 4096


def both_answers(
    loaded: LoadedModel, prompts: Sequence[Ids], max_tokens: int, stage: str, name: str
) -> Generator[ProgressEvent, None, Both]:
    """Greedy answers of at most ``max_tokens`` to prompts of token ids, by the base and by the model as it stands."""
    tuned_too = bool(adapter_weights(loaded.model))
    wanted = len(prompts) * (1 + tuned_too)
    base = yield from mapped(
        base_answers(loaded, prompts, max_tokens, cache_dir() / "answers"),
        lambda counts: progress(stage, f"{name}: the base answers", counts[0], wanted),
    )
    if not tuned_too:
        return base, list(base)
    tuned = yield from answers_now(
        loaded,
        prompts,
        max_tokens,
        lambda done: progress(stage, f"{name}: the tuned model answers", len(prompts) + done, wanted),
    )
    return base, tuned


def answers_now(
    loaded: LoadedModel,
    prompts: Sequence[Ids],
    max_tokens: int,
    told: Callable[[int], ProgressEvent],
    size: int = CHUNK,
) -> Generator[ProgressEvent, None, list[str]]:
    """Greedy answers of the model as it stands, ``size`` prompts of like length together, in the order of the prompts.

    Yields what ``told`` makes of the number of answers given, before each batch.
    """
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield told(start)
        for row, answer in zip(rows, batch_greedy(loaded, [prompts[row] for row in rows], max_tokens), strict=True):
            answers[row] = answer
    return answers


def both_logps(
    loaded: LoadedModel, scorer: Scorer, questions: Sequence[Question], stage: str, name: str
) -> Generator[ProgressEvent, None, Scores]:
    """Log-probs of every answer of every question, by the base and by the model as it stands; exact, dropout off."""
    rows = [EncodedRow.of(question.prompt_ids, question.answers) for question in questions]
    tuned_too = bool(adapter_weights(loaded.model))
    answers = sum(len(row.sequences) for row in rows)
    wanted = answers * (1 + tuned_too)
    cache = ReferenceCache(cache_dir() / "reference", loaded.fingerprint, loaded.device)
    base = yield from mapped(
        cache.fill(scorer, rows),
        lambda counts: progress(stage, f"{name}: the base scores", answers - counts[1] + counts[0], wanted),
    )
    if not tuned_too:
        return _by_question(rows, base), _by_question(rows, base)
    # Equal prompts stay side by side, and are run once.
    sequences = sequences_of(rows)
    order = sorted(range(answers), key=lambda place: sequences[place].prompt_ids.tolist())
    tuned = np.zeros(answers, np.float32)
    for start in range(0, answers, SCORED_TOGETHER):
        places = order[start : start + SCORED_TOGETHER]
        yield progress(stage, f"{name}: the tuned model scores", answers + start, wanted)
        tuned[places] = scorer.logps([sequences[place] for place in places])
    return _by_question(rows, base), _by_question(rows, tuned)


def _by_question(rows: Sequence[EncodedRow], logps: np.ndarray) -> list[Scored]:
    values = RowValues.of(logps, rows)
    return [
        Scored(values.take([number]).astype(np.float64), completion_lengths(row.sequences))
        for number, row in enumerate(rows)
    ]
