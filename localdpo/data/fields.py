"""Take one JSON row apart, field by field, and log what is not as it must be.

This module knows what messages, tags and weights look like, and nothing about what a row is for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

from localdpo.data.jsonl import ProblemLog, Row

__all__ = ["Kind", "Message", "RowFields", "blank_prompt"]

Kind = Literal["preference", "retain"]
_ROLES = ("system", "developer", "user", "assistant", "tool")
_MISSING = object()


class Message(TypedDict):
    """One turn of a conversation. Further keys, such as a tool's name, are handed on to the chat template."""

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]


def blank_prompt(prompt: Sequence[Message]) -> bool:
    """Return whether no turn but a system message says anything."""
    return not any(turn["content"].strip() for turn in prompt if turn["role"] != "system")


@dataclass(slots=True)
class RowFields:
    """One row being taken apart: fields are taken out of `values`, and what stays is unknown to us."""

    row: Row
    name: str
    log: ProblemLog
    values: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.values = self.row.value

    def bad(self, key: str, message: str, fix: str = "") -> None:
        """Log a problem with a field."""
        self.log.add(f"{self.name}:{self.row.line}", f'"{key}" {message}', fix)

    def take(self, key: str) -> Any:
        """Remove an optional field and return it; null counts as absent, as exporters write it for that."""
        value = self.values.pop(key, None)
        return _MISSING if value is None else value

    def require(self, *keys: str) -> bool:
        """Log one problem that names every key that is missing or null; return whether there is none."""
        absent = [f'"{key}"' for key in keys if self.values.get(key) is None]
        if absent:
            has = ", ".join(f'"{key[:40]}"' for key in list(self.values)[:8]) or "no keys"
            null = any(self.values.get(key, 0) is None for key in keys)
            verb = ("is" if len(absent) == 1 else "are") + (" null" if null else " missing")
            self.log.add(f"{self.name}:{self.row.line}", f"{' and '.join(absent)} {verb}", f"The row has {has}")
        return not absent

    def turns(self, key: str, role: str) -> tuple[Message, ...] | None:
        """Take a field that is text (one turn of `role`) or a list of messages."""
        value = self.take(key)
        if value is _MISSING:
            return ()
        if isinstance(value, str):
            return (Message(role=role, content=value),)
        if not isinstance(value, list) or not value:
            self.bad(key, "must be text or a list of messages", 'A message is {"role": …, "content": …}')
            return None
        messages = [self._message(key, index, item) for index, item in enumerate(value, 1)]
        return None if None in messages else tuple(m for m in messages if m is not None)

    def _message(self, key: str, index: int, item: Any) -> Message | None:
        if not isinstance(item, dict):
            self.bad(key, f"has a message {index} that is not an object with role and content")
            return None
        role, content = item.get("role"), item.get("content")
        if role not in _ROLES:
            self.bad(key, f"has a message {index} with the role {role!r:.40}", f"Roles are {', '.join(_ROLES)}")
            return None
        if content is None and item.get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            self.bad(key, f"has a message {index} whose content is not text")
            return None
        rest = {k: v for k, v in item.items() if v is not None}
        return Message(**{**rest, "role": role, "content": content})  # type: ignore[typeddict-item]

    def prompt_turns(self) -> tuple[Message, ...] | None:
        """Take `prompt` and `system`; an absent prompt gives no turns."""
        prompt = self.turns("prompt", "user")
        system = self.text("system")
        if prompt is None or not system.strip():
            return prompt
        if any(turn["role"] == "system" for turn in prompt):
            self.bad("system", "is given, and the prompt has a system message too", "Keep one of the two")
            return None
        return (Message(role="system", content=system), *prompt)

    def answerable(self, prompt: Sequence[Message]) -> bool:
        """Log a problem, and return False, unless the prompt ends with a turn to be answered."""
        if prompt and prompt[-1]["role"] in ("user", "tool"):
            return True
        last = f"{prompt[-1]['role']}'s" if prompt else "nobody's"
        self.log.add(
            f"{self.name}:{self.row.line}",
            f"the prompt ends with {last} turn",
            "It must end with the user's turn that is to be answered",
        )
        return False

    def text(self, key: str) -> str:
        """Take an optional text; absent is the empty text."""
        value = self.take(key)
        if value is not _MISSING and not isinstance(value, str):
            self.bad(key, "must be text")
        return value if isinstance(value, str) else ""

    def texts(self, key: str) -> tuple[str, ...]:
        """Take an optional list of texts, none of them blank."""
        value = self.take(key)
        if value is _MISSING:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
            self.bad(key, "must be a list of texts, none of them blank")
            return ()
        return tuple(value)

    def common(self) -> tuple[tuple[str, ...], str | None]:
        """Take `tags` and `id`. A number as id becomes text."""
        tags = self.texts("tags")
        identity = self.take("id")
        if isinstance(identity, int) and not isinstance(identity, bool):
            identity = str(identity)
        if identity is not _MISSING and not isinstance(identity, str):
            self.bad("id", "must be text")
        return tags, identity if isinstance(identity, str) else None

    def weight(self) -> float:
        """Take the optional weight, 1 when absent."""
        value = self.take("weight")
        if value is _MISSING:
            return 1.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            self.bad("weight", "must be a number, 0 or more")
            return 1.0
        return float(value)

    def tools(self) -> tuple[dict[str, Any], ...]:
        """Take the optional list of tool descriptions."""
        value = self.take("tools")
        if value is _MISSING:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self.bad("tools", "must be a list of objects, one for each tool")
            return ()
        return tuple(value)

    def kind(self) -> Kind:
        """Take the kind of pair, which our own snapshots of a run's data hold."""
        # A row's own "kind" may mean anything: only ours is taken, any other is kept as unknown.
        if self.values.get("kind") in ("preference", "retain"):
            kind: Kind = self.values.pop("kind")
            return kind
        return "preference"
