"""A blind test of two models on held-out prompts: who plays, on what, and where the journal is kept.

The journal lies in the run's folder, `blind/`, under a name that holds the adapters' digests: a run trained on is
another model and gets a test of its own. The terminal UI and `localdpo blind` open the same one, so a test begun in
either goes on in the other. This module knows neither models nor screens and never loads mlx.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from localdpo.data.fields import Message
from localdpo.data.pairs import prompt_key, read_prompts
from localdpo.errors import InputError, Problem
from localdpo.evaluate.blind import BlindTest
from localdpo.files import sha256_file
from localdpo.recipe import load_recipe
from localdpo.train.inputs import read_inputs
from localdpo.train.run import RunFolder
from localdpo.train.snapshot import copies

__all__ = ["ANSWER_TOKENS", "Contest", "held_out_prompts", "journal_of", "open_test", "settle", "undo"]

ANSWER_TOKENS = 128
"""Longest answer in a test; part of what a journal's answers are, so the same wherever it is opened."""
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


def open_test(contest: Contest, prompts: Sequence[tuple[Message, ...]], file: Path | None = None) -> BlindTest:
    """Go on with the contest's test, or begin it; ``file`` is where the prompts are from, None for held-out ones.

    Raises InputError (no adapter) and EnvironmentFault.
    """
    journal = journal_of(contest, prompts)
    if journal.exists():
        test = BlindTest.resume(journal)
        settle(test)
        return test
    about = {"prompts": os.path.abspath(file) if file is not None else "held out", "max_tokens": ANSWER_TOKENS}
    return BlindTest.start(journal, contest.sides, secrets.randbits(32), about)


def settle(test: BlindTest) -> None:
    """Equal answers are a tie that nobody need look at."""
    while (shown := test.current()) is not None and shown.first == shown.second:
        test.judge("tie")


def undo(test: BlindTest) -> bool:
    """Take the latest verdict that somebody gave back, with the settled ties after it; False when there is none."""
    if not any(comparison.answers[0] != comparison.answers[1] for comparison, _ in test.decided()):
        return False
    while (latest := test.undo()) is not None:
        a, b = test.comparisons[latest.id].answers
        if a != b:
            return True
    return False
