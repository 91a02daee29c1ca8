"""The form in which a row's values are taken, whichever tool wrote them: the same for training, checks and imports.

Structure that stands in a text is taken out of it, what a container padded is dropped, and a row whose meaning is not
in its texts (pictures, sound) is refused: none of these is ever trained on as text. Nothing read is ever run.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from localdpo.text import line_ends

__all__ = ["RowRefused", "implicit_prompt", "looks_serialised", "plain_row", "with_line_ends"]

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Keys of data sets for models that see or hear; their texts say <image> where the picture was."""
_CONVERSATIONS = ("prompt", "chosen", "rejected", "messages", "conversations")
_LONGEST, _DEEPEST = 1_000_000, 40  # characters, and brackets in brackets: Python's own parser has limits too
_SERIALISED = re.compile(r"""\s*(?:\[\s*)?\{\s*['"](?:role|from|content|value|messages|conversations)['"]\s*:""")
_ENDS_PROMPT = re.compile(r"[:?？：]\s*\Z")


class RowRefused(Exception):
    """A row from which no pair can be made; the text says why, `code` is the check's name for it."""

    def __init__(self, reason: str, code: str = "schema") -> None:
        super().__init__(reason)
        self.code = code


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` with conversations and tools out of their texts, text parts joined and padding dropped.

    What is in this form already stays as it is. Raises RowRefused for a row that no text tells.
    """
    media = next((key for key in MEDIA if row.get(key)), None)
    if media is not None:
        raise RowRefused(f'has "{media}", and only text can be learned', "media")
    if row.get("label") is False and "chosen" in row and "rejected" in row:
        raise RowRefused('has a "label" of false, so which answer is the better one is not known', "no_preference")
    found = dict(row)
    answers = [found.get("chosen"), found.get("rejected")]
    serialised = all(isinstance(answer, str) and looks_serialised(answer) for answer in answers)
    for key in _CONVERSATIONS:
        value = found.get(key)
        if isinstance(value, str) and looks_serialised(value) and (serialised or key not in ("chosen", "rejected")):
            found[key] = _decoded(value, key)
        if isinstance(found.get(key), list | Mapping):
            found[key], tools = _turns(found[key])
            found |= {"tools": tools} if tools and not found.get("tools") else {}
    if isinstance(found.get("tools"), str):
        found["tools"] = _tools(found["tools"])
    if isinstance(found.get("tools"), list):
        found["tools"] = _without_nulls(found["tools"])
    return found


def looks_serialised(text: str) -> bool:
    """Whether a text begins as a conversation written out as JSON or as a Python literal."""
    return _SERIALISED.match(text) is not None


def _decoded(text: str, key: str) -> Any:
    value = _parsed(text)
    turns = value.get("messages") if isinstance(value, Mapping) else value
    if isinstance(turns, list) and turns and all(_is_message(turn) for turn in turns):
        return value
    raise RowRefused(f'"{key}" is a conversation written out as text, and cannot be read as one', "serialised")


def _turns(value: Any) -> tuple[Any, Any]:
    """A conversation's messages, or the one message, and the tools that stand beside them."""
    tools = None
    if isinstance(value, Mapping) and "messages" in value:
        value, tools = value["messages"], value.get("tools")
    return [_message(message) for message in value] if isinstance(value, list) else _message(value), tools


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _parsed(text: str) -> Any:
    """What JSON or a Python literal says; None where it is neither, or too large or deep to try."""
    if len(text) > _LONGEST or _depth(text) > _DEEPEST:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _depth(text: str) -> int:
    """At most so many brackets are open at once; those in strings are counted too."""
    depth = deepest = 0
    for mark in re.findall(r"[\[{(\]})]", text):
        depth += 1 if mark in "[{(" else -1
        deepest = max(deepest, depth)
    return deepest


def _message(value: Any) -> Any:
    """A message without what a container padded it with, its text parts joined. Raises RowRefused."""
    if not isinstance(value, Mapping):
        return value
    message = _without_nulls(value)
    for key in ("content", "value"):
        parts = message.get(key)
        if isinstance(parts, list) and all(isinstance(part, Mapping) for part in parts):
            if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
                raise RowRefused("a message holds something other than text, such as a picture", "media")
            message[key] = "".join(part["text"] for part in parts)
    return message


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct of a column all keys of any of them, null where there was none."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _tools(text: str) -> Any:
    """Tools are often a text of JSON; what is none stays, and is judged as any other value there."""
    if not text.strip():
        return []
    value = _parsed(text)
    return value if isinstance(value, list) else text


def implicit_prompt(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """The prompt that both texts begin with, and what is left of each; None where there is none to be told.

    TRL takes any common beginning. Answers that merely open alike have one too: it must hold a line end, or end in
    a question or a colon, and is cut between words.
    """
    if chosen == rejected:
        return None
    size = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = chosen[: min(len(chosen), len(rejected)) if size is None else size]
    while shared and not shared[-1].isspace():
        shared = shared[:-1]
    prompt, answers = shared.strip(), (chosen[len(shared) :].strip(), rejected[len(shared) :].strip())
    if not prompt or not all(answers) or not ("\n" in shared or _ENDS_PROMPT.search(prompt)):
        return None
    return prompt, *answers


def with_line_ends(value: Any) -> Any:
    """`value` with every line end of its texts as \\n."""
    if isinstance(value, str):
        return line_ends(value)
    if isinstance(value, Mapping):
        return {key: with_line_ends(inner) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [with_line_ends(inner) for inner in value]
    return value
