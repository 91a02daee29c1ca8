"""The base beside the tuned model: their answers to the same prompts, and how likely they find the same answers.

The base is the model with its adapters off, and what it says or scores is kept in the caches that training uses. A
model without an adapter is its own base, and asked once. This module judges nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from localdpo.data.chat import ChatFormat, Refusal
from localdpo.data.encode import EncodedPair, Ids
from localdpo.data.fields import Message
from localdpo.dpo.losses import PairLogps
from localdpo.dpo.reference import ReferenceCache
from localdpo.dpo.scorer import PairScorer
from localdpo.model.generate import batch_greedy
from localdpo.model.load import LoadedModel
from localdpo.model.lora import adapter_weights
from localdpo.paths import cache_dir
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

SCORED_TOGETHER = 32
"""Pairs of answers scored between two reports."""

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
    loaded: LoadedModel, scorer: PairScorer, questions: Sequence[Question], stage: str, name: str
) -> Generator[ProgressEvent, None, Scores]:
    """Log-probs of every answer of every question, by the base and by the model as it stands; exact, dropout off."""
    pairs = [pair for question in questions for pair in _as_pairs(question)]
    tuned_too = bool(adapter_weights(loaded.model))
    wanted = len(pairs) * (1 + tuned_too)
    cache = ReferenceCache(cache_dir() / "reference", loaded.fingerprint, loaded.device)
    base = yield from mapped(
        cache.fill(scorer, pairs),
        lambda counts: progress(stage, f"{name}: the base scores", len(pairs) - counts[1] + counts[0], wanted),
    )
    if not tuned_too:
        return _by_question(questions, base), _by_question(questions, base)
    # Equal prompts stay side by side, and are run once.
    order = sorted(range(len(pairs)), key=lambda row: pairs[row].prompt_ids.tolist())
    sums = np.zeros((len(pairs), 2), np.float32)
    for start in range(0, len(order), SCORED_TOGETHER):
        rows = order[start : start + SCORED_TOGETHER]
        yield progress(stage, f"{name}: the tuned model scores", len(pairs) + start, wanted)
        found = scorer.logps([pairs[row] for row in rows])
        sums[rows] = np.stack([found.chosen, found.rejected], axis=1)
    tuned = PairLogps(sums[:, 0], sums[:, 1], base.chosen_tokens, base.rejected_tokens)
    return _by_question(questions, base), _by_question(questions, tuned)


def _as_pairs(question: Question) -> Iterable[EncodedPair]:
    """The answers two by two, as the scorer takes them; of an odd number the last goes with the first."""
    answers = question.answers
    for start in range(0, len(answers), 2):
        yield EncodedPair(question.prompt_ids, answers[start], answers[(start + 1) % len(answers)])


def _by_question(questions: Sequence[Question], logps: PairLogps) -> list[Scored]:
    flat = np.stack([logps.chosen, logps.rejected], axis=1).astype(np.float64)
    found, at = [], 0
    for question in questions:
        count = len(question.answers)
        rows = -(-count // 2)
        tokens = np.array([len(answer) for answer in question.answers], np.int64)
        found.append(Scored(flat[at : at + rows].reshape(-1)[:count], tokens))
        at += rows
    return found
