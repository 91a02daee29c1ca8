"""What a family of rows is, and how its turns and answers become ours.

A family turns one row of another tool into one row with `prompt`, `chosen` and `rejected` as
`localdpo.data.pairs` reads it; keys it does not use stay. What a row must be to teach something is decided there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from localdpo.data.rowform import RowRefused

__all__ = ["Family", "RowRefused", "answer_turns", "finished", "is_turns", "numbers", "turns_of"]

_ROLES = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "assistant": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "system": "system", "developer": "developer",
    "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip
_OURS: dict[str, type | tuple[type, ...]] = {
    "tags": list,
    "tools": list,
    "weight": (int, float),
    "system": str,
    "id": (str, int),
}


@dataclass(frozen=True, slots=True)
class Family:
    """`matches` tells whether a row looks like this family's; `convert` changes a row into ours or raises RowRefused.

    `convert` may take the row's own object apart.
    """

    name: str
    title: str
    matches: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[dict[str, Any]], dict[str, Any]]


def is_turns(value: Any, role: str = "role", content: str = "content") -> bool:
    """Whether a value is a list of messages under those keys."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) and role in v for v in value)


def turns_of(value: Any) -> list[dict[str, Any]]:
    """A list of messages with `role` and `content`, from those or from `from` and `value`. Raises RowRefused."""
    if not isinstance(value, list) or not value:
        raise RowRefused(f"{str(value)[:40]!r} is neither text nor a list of messages")
    return [_turn(item) for item in value]


def _turn(item: Any) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise RowRefused("a message is not an object")
    speaker = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    role = _ROLES.get(str(speaker).lower())
    if role is None:
        raise RowRefused(f"a message is by {str(speaker)[:40]!r}, which is no role")
    rest = {key: value for key, value in item.items() if key not in ("role", "content", "from", "value", "weight")}
    return {"role": role, "content": _content(content, bool(rest.get("tool_calls"))), **rest}


def _content(content: Any, may_be_empty: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_be_empty:
        return ""
    raise RowRefused("a message has no text")


def answer_turns(value: Any) -> Any:
    """An answer as text or as messages: a text stays, one message becomes a list of one. Raises RowRefused."""
    if isinstance(value, str):
        return value
    return turns_of([value] if isinstance(value, Mapping) else value)


def finished(prompt: Any, chosen: Any, rejected: Any, rest: Mapping[str, Any]) -> dict[str, Any]:
    """The row, its texts made messages if the prompt or an answer is; what `rest` holds under our keys is checked.

    A value of `rest` that cannot be what our key means is kept as `imported_<key>`.
    """
    row: dict[str, Any] = {}
    for key, value in rest.items():
        wanted = _OURS.get(key)
        fits = wanted is None or value is None or (isinstance(value, wanted) and not isinstance(value, bool))
        row[key if fits and key not in ("prompt", "chosen", "rejected") else f"imported_{key}"] = value
    answers = {"chosen": chosen, "rejected": rejected}
    if not all(isinstance(value, str) for value in (prompt, chosen, rejected)):
        answers = {key: _as_turns(value) for key, value in answers.items()}
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return ({} if prompt is None else {"prompt": prompt}) | answers | row


def _as_turns(value: Any) -> Any:
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def numbers(values: Iterable[Any]) -> list[float] | None:
    """The values as numbers, None unless all are: numbers, or texts that are some."""
    found = []
    for value in values:
        try:
            number = float(value)
        except (TypeError, ValueError):
            return None
        if isinstance(value, bool) or number != number:
            return None
        found.append(number)
    return found
