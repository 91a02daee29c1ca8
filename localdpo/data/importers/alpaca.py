"""Alpaca's `instruction` and `input` with two answers, in the forms that preference data has taken.

`chosen` and `rejected`; `output` as a list of the better answer and the worse; `output_1` and `output_2` with a
`preference` of 1 or 2. `history` is a list of earlier questions and answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localdpo.data.importers.family import Family, RowRefused, answer_turns, finished

__all__ = ["ALPACA"]


def _matches(row: Mapping[str, Any]) -> bool:
    two = "chosen" in row or isinstance(row.get("output"), list) or {"output_1", "output_2"} <= set(row)
    return isinstance(row.get("instruction"), str) and two and "completions" not in row


def _convert(row: dict[str, Any]) -> dict[str, Any]:
    chosen, rejected = _answers(row)
    asked = [row.pop("instruction", None), row.pop("input", None) or ""]
    if not all(isinstance(part, str) for part in asked):
        raise RowRefused('"instruction" or "input" is not text')
    prompt: Any = "\n".join(part for part in asked if part.strip())
    history = row.pop("history", None)
    if history:
        prompt = [*_history(history), {"role": "user", "content": prompt}]
    return finished(prompt, answer_turns(chosen), answer_turns(rejected), row)


def _answers(row: dict[str, Any]) -> tuple[Any, Any]:
    if "chosen" in row:
        chosen, rejected = row.pop("chosen"), row.pop("rejected", None)
    elif "output_1" in row:
        outputs, preference = [row.pop("output_1"), row.pop("output_2", None)], row.pop("preference", None)
        if preference not in (1, 2, "1", "2"):
            raise RowRefused('"preference" is neither 1 nor 2')
        chosen, rejected = outputs if int(preference) == 1 else outputs[::-1]
    else:
        outputs = row.pop("output", None)
        if not isinstance(outputs, list):
            raise RowRefused("has one answer and no preference")
        if len(outputs) != 2:
            raise RowRefused(f'"output" has {len(outputs)} answers; the better and the worse one are expected')
        chosen, rejected = outputs
    if chosen is None or rejected is None:
        raise RowRefused("has one answer and no preference")
    return chosen, rejected


def _history(history: Any) -> list[dict[str, str]]:
    pairs: list[Any] = history if isinstance(history, list) else [None]
    if not all(isinstance(p, list) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in pairs):
        raise RowRefused('"history" is not a list of questions with their answers')
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


ALPACA = Family("alpaca", "Alpaca preference rows", _matches, _convert)
