"""OpenAI's chat messages with two answers, in the three forms in use.

`input.messages` with `preferred_output` and `non_preferred_output`; `messages` with `chosen` and `rejected`; and
`messages` whose last turn is the chosen answer, with `rejected_response`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localdpo.data.importers.family import Family, RowRefused, answer_turns, finished, turns_of

__all__ = ["OPENAI"]


def _matches(row: Mapping[str, Any]) -> bool:
    if "preferred_output" in row and "non_preferred_output" in row:
        return True
    return isinstance(row.get("messages"), list) and "prompt" not in row


def _convert(row: dict[str, Any]) -> dict[str, Any]:
    if "preferred_output" in row:
        return _preference(row)
    turns = turns_of(row.pop("messages", None))
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return finished(turns, answer_turns(row.pop("chosen")), answer_turns(row.pop("rejected")), row)
    rejected = row.pop("rejected_response", None)
    if rejected is None:
        raise RowRefused("has one answer and no preference")
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise RowRefused("the messages do not end in the chosen answer")
    answers = rejected if isinstance(rejected, list) and all(isinstance(text, str) for text in rejected) else None
    if answers is not None:
        if len(answers) != 1:
            raise RowRefused(f"has {len(answers)} rejected answers; one is expected")
        rejected = answers[0]
    return finished(turns[:-1], turns[-1:], answer_turns(rejected), row)


def _preference(row: dict[str, Any]) -> dict[str, Any]:
    asked = row.pop("input", None)
    if isinstance(asked, Mapping):
        rest = {key: value for key, value in asked.items() if key not in ("messages", "tools", "parallel_tool_calls")}
        if asked.get("tools"):
            rest["tools"] = asked["tools"]
        asked, row = asked.get("messages"), rest | row
    prompt = asked if isinstance(asked, str) else turns_of(asked)
    chosen, rejected = row.pop("preferred_output"), row.pop("non_preferred_output", None)
    if chosen is None or rejected is None:
        raise RowRefused("has one answer and no preference")
    return finished(prompt, answer_turns(chosen), answer_turns(rejected), row)


OPENAI = Family("openai", "OpenAI chat messages", _matches, _convert)
