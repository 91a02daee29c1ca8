"""Candidates: answers sampled from the model, kept until they become pairs by correcting or ranking them.

Every candidate says what made it (`localdpo.data.provenance`), and so does each pair made here. Candidates are
a journal, so that what was generated survives whatever ends the program. This module knows no screens; who
answers is behind `Answerer`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from localdpo.data.drafts import hidden_folder
from localdpo.data.fields import Message
from localdpo.data.jsonl import ProblemLog, read_rows
from localdpo.data.pairs import prompt_key
from localdpo.data.provenance import PROVENANCE, AnswerOrigin, by_person, with_provenance
from localdpo.data.rows import PairDraft
from localdpo.errors import InputError, Problem
from localdpo.evaluate.blind import Comparison, Judgement
from localdpo.journal import append_line, repair_tail

__all__ = [
    "Answerer",
    "Candidate",
    "CandidateStore",
    "Finished",
    "Order",
    "Piece",
    "Progress",
    "candidates_file",
    "corrected_pair",
    "generate",
    "rank_comparisons",
    "rank_id",
    "ranked_pair",
    "ranking_file",
]

MAX_CANDIDATES = 64
"""More answers to one prompt in one go are a slip of the finger."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One sampled answer. `id` follows from the rest; white space at the answer's ends is not kept."""

    prompt: tuple[Message, ...]
    answer: str
    origin: AnswerOrigin

    @property
    def id(self) -> str:
        """The same for the same answer of the same sample to the same prompt."""
        said = [prompt_key(self.prompt).hex(), self.answer, self.origin.to_json()]
        return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=12).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The row of the candidate file."""
        return {
            "prompt": [dict(turn) for turn in self.prompt],
            "answer": self.answer,
            PROVENANCE: self.origin.to_json(),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Candidate | None:
        """What `to_json` wrote; None for anything else."""
        prompt, answer, origin = row.get("prompt"), row.get("answer"), AnswerOrigin.from_json(row.get(PROVENANCE))
        if not isinstance(answer, str) or origin is None or not _is_prompt(prompt):
            return None
        return cls(tuple(prompt), answer, origin)  # type: ignore[arg-type]


def _is_prompt(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in value
        )
    )


def candidates_file(pairs: str | Path) -> Path:
    """Where the candidates for a file of pairs are kept: in its workspace's hidden folder."""
    return _beside(Path(pairs), "candidates")


def ranking_file(pairs: str | Path) -> Path:
    """Where the verdicts on those candidates are kept."""
    return _beside(Path(pairs), "rankings")


def _beside(pairs: Path, kind: str) -> Path:
    real = Path(os.path.realpath(pairs))
    digest = hashlib.sha256(os.fsencode(real)).hexdigest()[:12]
    return hidden_folder(real) / kind / f"{real.stem[:40]}-{digest}.jsonl"


class CandidateStore:
    """The candidates of one pair file, in a journal at `path`. Writing methods touch the disk before they return."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._all: dict[str, Candidate] = {}
        self._by_prompt: dict[bytes, dict[str, Candidate]] = {}
        self._used: set[str] = set()

    def load(self) -> list[Problem]:
        """Read the journal, cutting off half a line at its end; returns what could not be read.

        Raises EnvironmentFault when the file cannot be touched.
        """
        self._all.clear()
        self._by_prompt.clear()
        self._used.clear()
        if not self.path.exists():
            return []
        repair_tail(self.path)
        log = ProblemLog()
        for row in read_rows(self.path, log):
            removed, used = row.value.get("removed"), row.value.get("used")
            candidate = Candidate.from_json(row.value)
            if isinstance(removed, str):
                self._forget(removed)
            elif isinstance(used, str):
                self._used.add(used)
            elif candidate is not None:
                self._keep(candidate)
            else:
                log.add(f"{self.path}:{row.line}", "is not a candidate")
        return log.first

    def _keep(self, candidate: Candidate) -> None:
        self._all[candidate.id] = candidate
        self._by_prompt.setdefault(prompt_key(candidate.prompt), {})[candidate.id] = candidate

    def _forget(self, identity: str) -> Candidate | None:
        candidate = self._all.pop(identity, None)
        if candidate is not None:
            key = prompt_key(candidate.prompt)
            self._by_prompt[key].pop(identity)
            if not self._by_prompt[key]:
                del self._by_prompt[key]
        return candidate

    def __len__(self) -> int:
        return len(self._all)

    def of(self, prompt: Sequence[Message]) -> list[Candidate]:
        """The candidates for a prompt, oldest first."""
        return list(self._by_prompt.get(prompt_key(prompt), {}).values())

    def prompts(self) -> list[tuple[Message, ...]]:
        """The prompts that have candidates."""
        return [next(iter(found.values())).prompt for found in self._by_prompt.values()]

    def all(self) -> list[Candidate]:
        """Every candidate, oldest first."""
        return list(self._all.values())

    def add(self, candidate: Candidate) -> None:
        """Keep a candidate. Raises EnvironmentFault."""
        append_line(self.path, json.dumps(candidate.to_json(), ensure_ascii=False))
        self._keep(candidate)

    def used(self, identity: str) -> bool:
        """Whether a pair was made of this candidate."""
        return identity in self._used

    def mark_used(self, identity: str) -> None:
        """Note that a pair was made of a candidate. Raises EnvironmentFault."""
        if identity in self._all and identity not in self._used:
            append_line(self.path, json.dumps({"used": identity}))
            self._used.add(identity)

    def remove(self, identity: str) -> Candidate | None:
        """Forget a candidate that is no good. Raises EnvironmentFault."""
        if identity not in self._all:
            return None
        append_line(self.path, json.dumps({"removed": identity}))
        return self._forget(identity)


@dataclass(frozen=True, slots=True)
class Order:
    """What to generate: `count` answers to each prompt. Sample i of a prompt is drawn with `seed` + i.

    `sampling` has the names of `SamplingOptions` but `seed`. Raises InputError when there is nothing to do.
    """

    prompts: tuple[tuple[Message, ...], ...]
    count: int = 2
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not self.prompts:
            problems.append(Problem("prompts", "there is no prompt to answer", "Write a prompt first"))
        if not 1 <= self.count <= MAX_CANDIDATES:
            problems.append(Problem("candidates", f"{self.count} must be within 1 to {MAX_CANDIDATES}"))
        if self.count > 1 and self.sampling.get("temperature", 1.0) <= 0:
            fix = "Raise the temperature, 0.8 for example, or ask for one"
            problems.append(Problem("temperature", "at 0 every candidate is the same", fix))
        if problems:
            raise InputError(*problems)


@dataclass(frozen=True, slots=True)
class Piece:
    """More text of the answer under way."""

    text: str
    tokens_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer: what made it, as far as whoever answers knows (model, adapter, finish…)."""

    origin: AnswerOrigin


class Answerer(Protocol):
    """Whoever answers. Closing the iterator early stops the answer."""

    def answer(self, prompt: Sequence[Message], sampling: Mapping[str, Any]) -> AsyncGenerator[Piece | Finished, None]:
        """Yield pieces, then one `Finished`. `sampling` may hold `seed`."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """Where generation is: prompt `row`, its sample `sample`, and `done` of `total` answers finished.

    Either `text` came, or the answer ended: then `candidate` is set, or None when the model said nothing.
    """

    row: int
    sample: int
    done: int
    total: int
    text: str = ""
    tokens_per_second: float = 0.0
    ended: bool = False
    candidate: Candidate | None = None


async def generate(answerer: Answerer, order: Order, store: CandidateStore) -> AsyncGenerator[Progress, None]:
    """Answer every prompt `order.count` times; yields as text comes and as answers end.

    Candidates are for the caller to keep (`store.add`, away from the UI thread); `store` says how many samples a
    prompt has, so that asking again goes on with new seeds. Closing the iterator stops the answer under way.
    """
    total, done = len(order.prompts) * order.count, 0
    for row, prompt in enumerate(order.prompts):
        first = _next_sample(store.of(prompt), order.seed)
        for sample in range(first, first + order.count):
            pieces: list[str] = []
            origin: AnswerOrigin | None = None
            sampling = {**order.sampling, "seed": order.seed + sample}
            async with aclosing(answerer.answer(prompt, sampling)) as answer:
                async for part in answer:
                    if isinstance(part, Finished):
                        origin = part.origin
                        continue
                    pieces.append(part.text)
                    yield Progress(row, sample, done, total, part.text, part.tokens_per_second)
            done += 1
            text = "".join(pieces).strip()
            candidate = Candidate(tuple(prompt), text, origin) if text and origin is not None else None
            yield Progress(row, sample, done, total, ended=True, candidate=candidate)


def _next_sample(known: Iterable[Candidate], seed: int) -> int:
    """The first sample whose seed no candidate of this prompt had: asked again, the model says something new."""
    used = {candidate.origin.seed for candidate in known}
    sample = 0
    while seed + sample in used:
        sample += 1
    return sample


def corrected_pair(
    prompt: Sequence[Message],
    rejected: str,
    chosen: str,
    origin: AnswerOrigin | None,
    *,
    how: str = "correct",
    tags: Sequence[str] = (),
) -> PairDraft:
    """A pair from an answer of the model and a person's edit of it: the edit is chosen.

    `how` is "correct" for a candidate and "reply" for a reply in a chat. Raises InputError when the edit is
    blank or changes nothing.
    """
    if not chosen.strip():
        raise InputError(Problem("chosen", "the better answer is blank", "Write what the model should have said"))
    if chosen.strip() == rejected.strip():
        fix = "Change the copy into what the model should have said"
        raise InputError(Problem("chosen", "it is the same as the model's answer", fix))
    return PairDraft(
        tuple(prompt),
        chosen,
        rejected,
        tags=tuple(tags),
        extra=with_provenance({}, how, chosen=by_person(), rejected=origin),
    )


def rank_comparisons(candidates: Sequence[Candidate]) -> list[Comparison]:
    """What to judge to rank the candidates of one prompt: neighbours two by two, a last odd one with the first.

    Answers that read the same are taken once: there is nothing to choose between them. Fewer than two different
    ones give nothing.
    """
    first: dict[str, Candidate] = {}
    for candidate in candidates:
        first.setdefault(candidate.answer, candidate)
    different = list(first.values())
    if len(different) < 2:
        return []
    couples = list(zip(different[::2], different[1::2], strict=False))
    if len(different) % 2:
        couples.append((different[0], different[-1]))
    return [Comparison(f"{a.id}-{b.id}", a.prompt, (a.answer, b.answer), (a.origin, b.origin)) for a, b in couples]


def ranked_pair(comparison: Comparison, judgement: Judgement, *, tags: Sequence[str] = ()) -> PairDraft | None:
    """The pair that a verdict makes; None for a tie and a skip, which stay in the test's journal."""
    if judgement.outcome not in ("a", "b"):
        return None
    won = 0 if judgement.outcome == "a" else 1
    return PairDraft(
        comparison.prompt,
        comparison.answers[won],
        comparison.answers[1 - won],
        id=rank_id(comparison.id),
        tags=tuple(tags),
        extra=with_provenance({}, "rank", chosen=comparison.origins[won], rejected=comparison.origins[1 - won]),
    )


def rank_id(comparison: str) -> str:
    """The id of the pair that a comparison makes: judging it again replaces that pair, undo finds it."""
    return f"rank-{hashlib.blake2b(comparison.encode(), digest_size=8).hexdigest()}"
