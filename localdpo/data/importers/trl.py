"""TRL's preference rows, texts or messages, with a prompt or without: the form that localdpo reads itself.

Binarised UltraFeedback is one of these. Messages under `from` and `value`, and an answer that is a single message,
are taken as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localdpo.data.importers.family import Family, answer_turns, turns_of
from localdpo.data.rowform import implicit_prompt

__all__ = ["TRL"]


def _matches(row: Mapping[str, Any]) -> bool:
    answers = [row.get("chosen"), row.get("rejected")]
    if not all(isinstance(answer, str | list | Mapping) for answer in answers):
        return False
    implicit = all(isinstance(answer, list) and len(answer) > 1 for answer in answers) or (
        all(isinstance(answer, str) for answer in answers) and implicit_prompt(*map(str, answers)) is not None
    )
    return isinstance(row.get("prompt"), str | list) or implicit


def _convert(row: dict[str, Any]) -> dict[str, Any]:
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        row["prompt"] = turns_of(prompt)
    for key in ("chosen", "rejected"):
        if not isinstance(row.get(key), str | None):
            row[key] = answer_turns(row[key])
    if row.get("messages") == row.get("chosen"):
        row.pop("messages", None)  # UltraFeedback's third copy of the chosen conversation
    return row


TRL = Family("trl", "TRL preference rows", _matches, _convert)
