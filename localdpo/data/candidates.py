"""Answers that a model gave, kept as they come, so that a run that is ended goes on where it was.

Each answer is a line of a journal, known by everything that decides it: the model's content, its adapter's, the
sampling, the seed, the prompt and the number of the sample. Whoever asks again gets the answer that is there. A
judge's verdict and a rewrite are answers like any other. This module knows nothing about how models answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localdpo.data.fields import Message
from localdpo.data.jsonl import ProblemLog, read_rows
from localdpo.data.provenance import AnswerOrigin
from localdpo.journal import append_lines, repair_tail

__all__ = ["Candidate", "CandidateJournal", "Request", "Voice", "answer_seed"]


@dataclass(frozen=True, slots=True)
class Voice:
    """Whose answers they are: a base by name and content, and an adapter's folder and content, or none."""

    model: str
    fingerprint: str
    adapter: str = ""
    adapter_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """Something to be answered: chat messages, and which of several samples is wanted (0-based)."""

    prompt: tuple[Message, ...]
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer, not yet part of a pair. `origin.finish` is "length" when it was cut off."""

    text: str
    origin: AnswerOrigin

    @property
    def unfinished(self) -> bool:
        """Whether the limit on tokens cut it off."""
        return self.origin.finish == "length"


def answer_seed(seed: int, request: Request) -> int:
    """A seed of 64 bits for one answer: it depends on nothing but the run's seed, the prompt and the sample."""
    data = json.dumps([seed, _plain(request.prompt), request.sample], ensure_ascii=False, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(data.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _plain(prompt: Sequence[Message]) -> list[dict[str, Any]]:
    return [dict(turn) for turn in prompt]


@dataclass(slots=True)
class CandidateJournal:
    """The answers so far, on disk at `path`; None keeps them in memory only."""

    path: Path | None
    _known: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None) -> CandidateJournal:
        """Read what is there; half a line that a crash left is cut off, lines that are no answers are passed over.

        Raises EnvironmentFault, and InputError for a file that is not UTF-8 text.
        """
        journal = cls(path)
        if path is not None and path.exists():
            repair_tail(path)
            for row in read_rows(path, ProblemLog()):
                if isinstance(row.value.get("key"), str) and isinstance(row.value.get("text"), str):
                    journal._known[row.value["key"]] = row.value
        return journal

    def __len__(self) -> int:
        return len(self._known)

    @staticmethod
    def key(voice: Voice, sampling: Mapping[str, Any], seed: int, request: Request) -> str:
        """What an answer is known by: the sha256 of all that decides it."""
        decides = [
            voice.fingerprint, voice.adapter_sha256, dict(sampling), seed, _plain(request.prompt), request.sample,
        ]  # fmt: skip
        text = json.dumps(decides, ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def get(self, key: str) -> Candidate | None:
        """The answer known by `key`."""
        found = self._known.get(key)
        origin = AnswerOrigin.from_json(found.get("origin")) if found is not None else None
        return Candidate(found["text"], origin) if found is not None and origin is not None else None

    def put(self, answers: Iterable[tuple[str, Request, Candidate]]) -> None:
        """Keep answers that are not there yet, on disk before this returns. Raises EnvironmentFault."""
        new: list[dict[str, Any]] = [
            {"key": key, "prompt": _plain(request.prompt), "text": answer.text, "origin": answer.origin.to_json()}
            for key, request, answer in answers
            if key not in self._known
        ]
        self._known |= {row["key"]: row for row in new}
        if self.path is not None and new:
            append_lines(self.path, (json.dumps(row, ensure_ascii=False) for row in new))
