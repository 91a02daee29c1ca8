"""Blind A/B: two models answer held-out prompts, somebody says which answer is better, and the win rate follows.

The journal lies in the run's folder, `blind/`, under a name that holds the adapters' digests: a run trained on is
another model and gets a test of its own. Answers are made while verdicts are given, and kept, so that going on
another day makes none twice. It knows no screens; who answers is behind `Answerer`.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from localdpo.data.fields import Message
from localdpo.data.pairs import prompt_key, read_prompts
from localdpo.data.provenance import AnswerOrigin
from localdpo.errors import InputError, Problem
from localdpo.evaluate.blind import BlindTest, Choice, Comparison, Shown
from localdpo.files import sha256_file
from localdpo.recipe import load_recipe
from localdpo.train.inputs import read_inputs
from localdpo.train.run import RunFolder
from localdpo.train.snapshot import copies
from localdpo_tui.services.candidates import Answerer, Finished

__all__ = ["ANSWER_TOKENS", "BlindAB", "Contest", "held_out_prompts", "journal_of"]

ANSWER_TOKENS = 128
_UNSAFE = re.compile(r"[^\w.-]+")


@dataclass(frozen=True, slots=True)
class Contest:
    """Who is compared: the run of side b, and side a, another run of the same base or (None) the base itself."""

    run: Path
    other: Path | None = None

    @property
    def sides(self) -> tuple[str, str]:
        """The names of a and b."""
        return (self.other.name if self.other is not None else "base", self.run.name)


def held_out_prompts(run: str | Path, file: str | Path | None = None) -> list[tuple[Message, ...]]:
    """The prompts to compare on: those of `file`, or what the run held out, and its probes. Each once, in order.

    Reads files. Raises InputError when there are none: with too few pairs nothing is held out.
    """
    if file is not None:
        return _once([row.prompt for row in read_prompts(file)])
    folder = RunFolder(run)
    recipe = load_recipe(folder.recipe_file, check_files=False)
    found: list[tuple[Message, ...]] = []
    # Files that are gone cost only what they held: the run has its own copy of its pairs.
    data = recipe.data.model_copy(update={"retain": None, "probes": None})
    found += [pair.prompt for pair in read_inputs(recipe.model_copy(update={"data": data}), copies(folder)).held_out]
    found += [_prompt(sample.prompt) for sample in folder.samples()]
    if not found:
        raise InputError(Problem(str(run), "this run held out no pairs and has no probes", "Choose a file of prompts"))
    return _once(found)


def _prompt(messages: Sequence[Mapping[str, str]]) -> tuple[Message, ...]:
    return tuple(Message(role=turn["role"], content=turn["content"]) for turn in messages)


def _once(prompts: Sequence[tuple[Message, ...]]) -> list[tuple[Message, ...]]:
    first: dict[bytes, tuple[Message, ...]] = {}
    for prompt in prompts:
        first.setdefault(prompt_key(prompt), prompt)
    return list(first.values())


def journal_of(contest: Contest, prompts: Sequence[tuple[Message, ...]]) -> Path:
    """Where the test of these adapters on these prompts is kept. Reads the adapters' weights.

    Raises InputError when a run has no adapter.
    """
    digest = hashlib.sha256()
    for run in (contest.run, contest.other):
        if run is None:
            continue
        weights = RunFolder(run).adapter / "adapters.safetensors"
        if not weights.is_file():
            raise InputError(Problem(str(run), "this run has no adapter yet", "Let it end first"))
        digest.update(sha256_file(weights).encode())
    for prompt in prompts:
        digest.update(prompt_key(prompt))
    name = f"{_UNSAFE.sub('_', contest.sides[0])}-{digest.hexdigest()[:10]}.jsonl"
    return RunFolder(contest.run).path / "blind" / name


class BlindAB:
    """A contest under way: `fill` makes answers, the rest is for the judge."""

    def __init__(self, contest: Contest, prompts: Sequence[tuple[Message, ...]], test: BlindTest) -> None:
        self.title = f"Blind: {contest.sides[1]} against {contest.sides[0]}"
        self.contest = contest
        self.making = ""
        self._prompts = list(prompts)
        self._test = test
        # Answers are added on one thread while verdicts are given on another.
        self._lock = threading.Lock()

    @classmethod
    def open(cls, contest: Contest, file: Path | None = None) -> BlindAB:
        """Go on with the contest's test, or begin it. Reads and writes files.

        Raises InputError (no adapter, no prompts) and EnvironmentFault.
        """
        prompts = held_out_prompts(contest.run, file)
        journal = journal_of(contest, prompts)
        if journal.exists():
            ab = cls(contest, prompts, BlindTest.resume(journal))
            ab._settle()
            return ab
        about = {"prompts": str(file) if file is not None else "held out", "max_tokens": ANSWER_TOKENS}
        return cls(contest, prompts, BlindTest.start(journal, contest.sides, secrets.randbits(32), about))

    async def fill(self, a: Answerer, b: Answerer) -> AsyncGenerator[None, None]:
        """Make the answers that are missing; yields whenever there is something new to show.

        Raises what the models raise; what was made is kept.
        """
        for number, prompt in enumerate(self._prompts):
            key = prompt_key(prompt).hex()
            if key in self._test.comparisons:
                continue
            answers: list[str] = []
            origins: list[AnswerOrigin | None] = []
            for answerer in (a, b):
                self.making = f"making answers: prompt {number + 1} of {len(self._prompts)}"
                yield
                text, origin = await _whole(answerer, prompt)
                answers.append(text)
                origins.append(origin)
            comparison = Comparison(key, prompt, (answers[0], answers[1]), (origins[0], origins[1]))
            await asyncio.to_thread(self._add, comparison)
            yield
        self.making = ""
        yield

    def _add(self, comparison: Comparison) -> None:
        with self._lock:
            self._test.add(comparison)
            self._settle()

    def _settle(self) -> None:
        """Equal answers are a tie that nobody need look at."""
        while (shown := self._test.current()) is not None and shown.first == shown.second:
            self._test.judge("tie")

    def current(self) -> Shown | None:
        """The answers to judge now."""
        return self._test.current()

    def judge(self, choice: Choice) -> None:
        """Take the verdict on `current`. Raises EnvironmentFault."""
        with self._lock:
            self._test.judge(choice)
            self._settle()

    def undo(self) -> bool:
        """Take the latest verdict that somebody gave back. Raises EnvironmentFault."""
        with self._lock:
            if not any(a.answers[0] != a.answers[1] for a, _ in self._test.decided()):
                return False
            while (latest := self._test.undo()) is not None:
                a, b = self._test.comparisons[latest.id].answers
                if a != b:
                    return True
            return False

    def position(self) -> str:
        """How far we are."""
        done = f"{len(self._test.judgements)} of {len(self._prompts)} judged"
        return f"{done}, {self.making}" if self.making else done

    def result(self) -> str:
        """The win rate and its interval so far, in words."""
        a, b = self._test.sides
        return self._test.win_rate().sentence(b, a)

    def waiting(self) -> str:
        """What comes, or the result."""
        if self.making:
            return "The models are answering; the first two answers come in a moment."
        return f"Every prompt is judged.\n\n{self.result()}\n\nThe verdicts are kept in {self._test.path.name}."


async def _whole(answerer: Answerer, prompt: Sequence[Message]) -> tuple[str, AnswerOrigin | None]:
    pieces: list[str] = []
    origin: AnswerOrigin | None = None
    sampling = {"temperature": 0.0, "max_tokens": ANSWER_TOKENS}
    async with aclosing(answerer.answer(prompt, sampling)) as answer:
        async for part in answer:
            if isinstance(part, Finished):
                origin = part.origin
            else:
                pieces.append(part.text)
    return "".join(pieces).strip(), origin
