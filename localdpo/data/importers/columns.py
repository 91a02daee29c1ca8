"""Tables whose columns have names of their own: mapped as asked for, else guessed.

A column is named by its key, or by a path of keys and list positions such as `answers.0.text`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from localdpo.data.importers.family import Family, RowRefused, answer_turns, finished
from localdpo.errors import InputError, Problem

__all__ = ["TARGETS", "guess_columns", "mapped_family", "parse_mapping"]

TARGETS = ("prompt", "chosen", "rejected", "system", "id", "tags", "weight", "tools")

_NAMES = {
    "prompt": (
        "prompt", "question", "instruction", "query", "input", "user", "request", "context", "post", "message",
    ),
    "chosen": (
        "chosen", "chosen_response", "response_chosen", "chosen_answer", "preferred", "preferred_response", "better",
        "better_response", "best", "good", "winner", "win", "accepted", "positive", "answer_chosen", "chosen_text",
    ),
    "rejected": (
        "rejected", "rejected_response", "response_rejected", "rejected_answer", "dispreferred", "non_preferred",
        "worse", "worse_response", "worst", "bad", "loser", "lose", "negative", "answer_rejected", "rejected_text",
    ),
    "system": ("system", "system_prompt", "system_message"),
}  # fmt: skip
_MISSING = object()


def parse_mapping(assignments: Sequence[str]) -> dict[str, str]:
    """`target=column` assignments as a dictionary. Raises InputError with every problem."""
    mapping: dict[str, str] = {}
    problems = []
    for assignment in assignments:
        target, equals, column = assignment.partition("=")
        target = target.strip()
        if not equals or not column:
            problems.append(Problem(f"--map {assignment}", "is not of the form target=column", "Such as chosen=good"))
        elif target not in TARGETS:
            problems.append(Problem(f"--map {assignment}", f"{target!r} is no target", f"One of {', '.join(TARGETS)}"))
        elif target in mapping:
            problems.append(Problem(f"--map {assignment}", f"{target} is mapped twice"))
        else:
            mapping[target] = column
    if problems:
        raise InputError(*problems)
    return mapping


def guess_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Target -> column by its name, for columns that the first rows have; empty unless both answers are found."""
    columns = {_bare(key): key for row in rows for key in row}
    guess = {
        target: columns[_bare(name)]
        for target, names in reversed(_NAMES.items())
        for name in reversed(names)
        if _bare(name) in columns
    }
    return (
        {target: guess[target] for target in TARGETS if target in guess} if {"chosen", "rejected"} <= set(guess) else {}
    )


def _bare(name: str) -> str:
    return "".join(char for char in name.lower() if char.isalnum())


def mapped_family(mapping: Mapping[str, str]) -> Family:
    """The family of rows whose columns are called as `mapping` says."""

    def matches(row: Mapping[str, Any]) -> bool:
        return all(_look(row, mapping[key]) is not _MISSING for key in ("chosen", "rejected") if key in mapping)

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        values = {target: _look(row, column) for target, column in mapping.items()}
        absent = [mapping[key] for key in ("prompt", "chosen", "rejected") if values.get(key, 0) in (_MISSING, None)]
        if absent:
            raise RowRefused(f"there is nothing in the column {absent[0][:60]!r}")
        rest = {key: value for key, value in row.items() if key not in mapping.values()}
        rest |= {key: value for key, value in values.items() if key not in _ANSWERS and value is not _MISSING}
        given = {key: values.get(key, rest.pop(key, None)) for key in _ANSWERS}
        prompt, chosen, rejected = (
            given[key] if given[key] is None else answer_turns(given[key]) for key in ("prompt", "chosen", "rejected")
        )
        return finished(prompt, chosen, rejected, rest)

    return Family("columns", "columns by name", matches, convert)


_ANSWERS = ("prompt", "chosen", "rejected")


def _look(row: Mapping[str, Any], path: str) -> Any:
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _MISSING
    return value
