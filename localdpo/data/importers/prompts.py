"""Prompts out of any conversation, with the answer it has as `target`: where there is no preference yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localdpo.data.importers.family import Family, RowRefused, turns_of

__all__ = ["PROMPTS", "prompt_of"]

_CONVERSATIONS = ("messages", "conversations", "conversation")
_QUESTIONS = ("prompt", "instruction", "question", "query", "input")
_ANSWERS = ("target", "chosen", "output", "response", "answer", "completion", "preferred_output")


def prompt_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row with `prompt`, and `target` where an answer is given. Raises RowRefused."""
    kept = {key: row[key] for key in ("id", "tags") if isinstance(row.get(key), str | list)}
    turns = next((turns_of(row[key]) for key in _CONVERSATIONS if isinstance(row.get(key), list)), None)
    target = next((_text(row[key]) for key in _ANSWERS if row.get(key)), None)
    if turns is None:
        turns = _question(row)
    if not turns and isinstance(row.get("chosen"), list):
        turns = turns_of(row["chosen"])
    if turns and turns[-1]["role"] == "assistant":
        target, turns = turns[-1]["content"], turns[:-1]
    if not turns or turns[-1]["role"] not in ("user", "tool") or not turns[-1]["content"].strip():
        raise RowRefused("has no prompt that ends with a user's turn")
    system = row.get("system")
    if isinstance(system, str) and system.strip() and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    plain = len(turns) == 1 and turns[0]["role"] == "user"
    found: dict[str, Any] = {"prompt": turns[0]["content"] if plain else turns}
    return found | ({"target": target} if target and target.strip() else {}) | kept


def _question(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    key = next((key for key in _QUESTIONS if row.get(key)), None)
    if key is None:
        return []
    if isinstance(row[key], list):
        return turns_of(row[key])
    if not isinstance(row[key], str):
        raise RowRefused(f'"{key}" is neither text nor messages')
    more = row.get("input") if key == "instruction" else None
    text = f"{row[key]}\n{more}" if isinstance(more, str) and more.strip() else row[key]
    return [{"role": "user", "content": text}]


def _text(value: Any) -> str | None:
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    return value if isinstance(value, str) else None


PROMPTS = Family("prompts", "prompts with or without an answer", lambda row: True, prompt_of)
