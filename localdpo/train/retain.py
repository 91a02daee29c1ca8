"""Learning without forgetting: the base's own answers to everyday prompts, made into pairs that keep them.

A retain pair prefers what the base says to a prompt over an answer that belongs to another one. The
base's answers are generated once and cached on disk by model and prompt. This module knows nothing
about losses or steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np

from localdpo.data.encode import UNFINISHED, encode_prompt
from localdpo.data.pairs import Message, PreferencePair, PromptRow, Skipped
from localdpo.errors import EnvironmentFault, InputError
from localdpo.files import write_json
from localdpo.model.generate import batch_greedy
from localdpo.model.load import LoadedModel
from localdpo.model.lora import adapters_off
from localdpo.sequences import Ids

RETAIN_TOKENS = 32
"""Longest answer to keep: what makes an answer the base's own shows in its first words, and every token costs time."""
CHUNK = 128
TAUGHT = 10_000
"""Pairs to choose a rejected answer from: enough for any variety, and a bound on what is held in memory."""

Counted = Generator[tuple[int, int], None, list[str]]
"""Yields (done, wanted) on the way, returns the answers."""


class AnswerCache:
    """Greedy answers of one base model, on disk by prompt ids and length limit."""

    def __init__(self, folder: Path, fingerprint: str, max_tokens: int) -> None:
        self._file = folder / fingerprint[:32] / f"greedy-{max_tokens}.json"
        self._max_tokens = max_tokens
        self._answers = _read(self._file)

    @staticmethod
    def key(ids: Ids) -> str:
        """The sha256 of a prompt's ids."""
        return hashlib.sha256(np.ascontiguousarray(ids, dtype="<i4").tobytes()).hexdigest()

    def get(self, ids: Ids) -> str | None:
        """The answer to a prompt, None when it is not known."""
        return self._answers.get(self.key(ids))

    def put(self, prompts: Sequence[Ids], answers: Sequence[str]) -> None:
        """Keep answers. A cache that cannot be written costs time, not the run."""
        new = {self.key(ids): answer for ids, answer in zip(prompts, answers, strict=True)}
        # Read again first: another run may have added answers meanwhile.
        self._answers = {**_read(self._file), **self._answers, **new}
        with suppress(OSError, EnvironmentFault):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, self._answers)


def _read(file: Path) -> dict[str, str]:
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(data, dict):
        return {}
    return {key: answer for key, answer in data.items() if isinstance(answer, str)}


def base_answers(loaded: LoadedModel, prompts: Sequence[Ids], max_tokens: int, cache_folder: Path | None) -> Counted:
    """The base's greedy answers to prompts of token ids, adapters off; only unknown ones are generated.

    ``cache_folder`` None neither reads nor writes a cache. Leaving half way keeps what was generated.
    """
    cache = AnswerCache(cache_folder, loaded.fingerprint, max_tokens) if cache_folder is not None else None
    answers = [cache.get(ids) if cache is not None else None for ids in prompts]
    missing = [row for row, answer in enumerate(answers) if answer is None]
    done = len(prompts) - len(missing)
    yield done, len(prompts)
    # Like lengths together: less padding.
    missing.sort(key=lambda row: len(prompts[row]))
    for start in range(0, len(missing), CHUNK):
        rows = missing[start : start + CHUNK]
        with adapters_off(loaded.model):
            found = batch_greedy(loaded, [prompts[row] for row in rows], max_tokens)
        for row, answer in zip(rows, found, strict=True):
            answers[row] = answer
        if cache is not None:
            cache.put([prompts[row] for row in rows], found)
        done += len(rows)
        yield done, len(prompts)
    return [answer or "" for answer in answers]


def encode_prompts(
    rows: Sequence[PromptRow], loaded: LoadedModel, max_length: int
) -> tuple[list[PromptRow], list[Ids], list[Skipped]]:
    """The prompts that the template takes and that leave room for an answer, their ids, and the others."""
    kept: list[PromptRow] = []
    encoded: list[Ids] = []
    skipped = []
    for row in rows:
        try:
            ids = encode_prompt(row.prompt, loaded.tokenizer)
        except InputError as error:
            skipped.append(Skipped(row.source, row.line, error.problems[0].message))
            continue
        if len(ids) >= max_length:
            skipped.append(Skipped(row.source, row.line, f"its prompt has {len(ids):,} tokens"))
            continue
        kept.append(row)
        encoded.append(ids)
    return kept, encoded, skipped


def retain_pairs(
    rows: Sequence[PromptRow],
    answers: Sequence[str],
    train: Sequence[PreferencePair],
    loaded: LoadedModel,
    *,
    seed: int,
    weight: float = 1.0,
    max_tokens: int = RETAIN_TOKENS,
) -> list[PreferencePair]:
    """Pairs of kind "retain": the base's answer is chosen, a seeded choice of a taught answer rejected.

    Each counts for ``weight``.

    A prompt that the base answers with nothing makes no pair. An answer about as long as
    ``max_tokens`` was cut off: its pair says so in ``extra``. Taught answers are those of the first
    ``TAUGHT`` pairs.
    """
    taught = sorted({pair.chosen for pair in islice(train, TAUGHT) if pair.kind == "preference"})
    rng = np.random.Generator(np.random.PCG64([seed, 1]))
    pairs = []
    for row, answer in zip(rows, answers, strict=True):
        # Drawn for every row, so that one answer more or less moves no other row's choice.
        start = int(rng.integers(len(taught)))
        others = [text for text in (*taught[start:], *taught[:start]) if text.strip() != answer.strip()]
        if not answer.strip() or not others:
            continue
        # Encoding a text again may take fewer tokens than the model took to write it.
        cut = len(loaded.tokenizer.encode(answer, add_special_tokens=False)) >= 0.9 * max_tokens
        pairs.append(
            PreferencePair(
                row.prompt,
                answer,
                others[0],
                id=row.id,
                tags=row.tags,
                weight=weight,
                kind="retain",
                extra={UNFINISHED: True} if cut else {},
                line=row.line,
                source=row.source,
            )
        )
    return pairs


def messages_of(row: PromptRow) -> list[dict[str, str]]:
    """The prompt as plain dictionaries, for an event."""
    return [_plain(message) for message in row.prompt]


def _plain(message: Message) -> dict[str, str]:
    return {"role": str(message["role"]), "content": str(message["content"])}
