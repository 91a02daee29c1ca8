"""A judge that says what a test wants, among models that answer as they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from localdpo.data.candidates import Candidate
from localdpo.evaluate.generate import speakers

Replies = Callable[[str], str]


def replying(monkeypatch: pytest.MonkeyPatch, judge: Path, reply: Replies) -> list[str]:
    """Make the model at `judge` say what `reply` makes of its prompt; the others answer as they do."""
    asked: list[str] = []
    real = speakers._decode

    def decode(speaker: Any, requests: Any, *rest: Any) -> list[Candidate]:
        found = real(speaker, requests, *rest)
        if speaker.voice.model != str(judge):
            return found
        texts = [request.prompt[-1]["content"] for request in requests]
        asked.extend(texts)
        stop = [replace(candidate.origin, finish="stop") for candidate in found]
        return [Candidate(reply(text), origin) for text, origin in zip(texts, stop, strict=True)]

    monkeypatch.setattr(speakers, "_decode", decode)
    return asked
