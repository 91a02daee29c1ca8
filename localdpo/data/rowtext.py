"""Change some values of a JSON object's text and leave every other byte of it as it is.

Numbers keep their digits, keys their order, spaces their places: only the text of a value that changes is
replaced. This module knows nothing about preference pairs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # public in effect: json's own C scanner
from typing import Any

__all__ = ["ABSENT", "complete", "set_values"]

ABSENT = object()
"""The value of a key that is to be removed."""

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, strict=True)
_OPENERS = {"{": "}", "[": "]"}


@dataclass(frozen=True, slots=True)
class _Span:
    """Where one member of an object stands: its key starts at `key`, its value is `value` to `end`."""

    key: int
    value: int
    end: int


def set_values(text: str, changes: Mapping[str, Any]) -> str:
    """Return the text of the object with the values of `changes` set, appended or, where `ABSENT`, removed.

    `text` must be one JSON object without repeated keys. New values are written in the text's own style: its
    separators, and escapes instead of characters beyond ASCII where it has such escapes and no such character.
    """
    spans = _spans(text)
    style = _Style.of(text, spans)
    pieces: list[tuple[int, int, str]] = []
    for key, span in spans.items():
        value = changes.get(key, span)
        if value is not span and value is not ABSENT:
            pieces.append((span.value, span.end, style.dump(value)))
    for start, end, new in reversed(pieces):
        text = text[:start] + new + text[end:]
    for key in [key for key in spans if changes.get(key) is ABSENT]:
        text = _without(text, key)
    return _appended(text, {k: v for k, v in changes.items() if k not in spans and v is not ABSENT}, style)


def _spans(text: str) -> dict[str, _Span]:
    """Return the members of the object in `text`, in order."""
    spans: dict[str, _Span] = {}
    position = _skip(text, text.index("{") + 1)
    while text[position] != "}":
        key, after = scanstring(text, position + 1, True)
        value = _skip(text, _skip(text, after) + 1)
        _, end = _DECODER.raw_decode(text, value)
        spans[key] = _Span(position, value, end)
        position = _skip(text, end)
        if text[position] == ",":
            position = _skip(text, position + 1)
    return spans


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _without(text: str, key: str) -> str:
    """Remove a member and one of the commas beside it."""
    spans = _spans(text)
    keys = list(spans)
    number = keys.index(key)
    if number + 1 < len(keys):
        return text[: spans[key].key] + text[spans[keys[number + 1]].key :]
    start = spans[keys[number - 1]].end if number else spans[key].key
    return text[:start] + text[spans[key].end :]


def _appended(text: str, members: Mapping[str, Any], style: _Style) -> str:
    if not members:
        return text
    spans = _spans(text)
    joined = style.comma.join(f"{style.dump(key)}{style.colon}{style.dump(value)}" for key, value in members.items())
    if not spans:
        at = text.index("{") + 1
        return text[:at] + joined + text[at:]
    at = max(span.end for span in spans.values())
    return text[:at] + style.comma + joined + text[at:]


@dataclass(frozen=True, slots=True)
class _Style:
    comma: str
    colon: str
    ascii_only: bool

    @classmethod
    def of(cls, text: str, spans: Mapping[str, _Span]) -> _Style:
        """Read the style off a text; json's own where there is nothing to read it off."""
        ordered = list(spans.values())
        comma, colon = ", ", ": "
        if len(ordered) > 1:
            comma = text[ordered[0].end : ordered[1].key]
        if ordered:
            _, after = scanstring(text, ordered[0].key + 1, True)
            colon = text[after : ordered[0].value]
        return cls(comma, colon, text.isascii() and "\\u" in text)

    def dump(self, value: Any) -> str:
        separators = ("," if self.comma.strip(" ") == "," and " " not in self.comma else ", ", self.colon)
        return json.dumps(value, ensure_ascii=self.ascii_only, allow_nan=False, separators=separators)


def complete(text: str) -> str | None:
    """Return `text`, an object that was cut off, closed so that it is JSON again, or None when that cannot be.

    What was being written when it was cut off (half a key, half an escape) is dropped; half a string is kept.
    """
    closers, in_string, ends = _open_parts(text)
    if not closers and not in_string:
        return None
    # The whole text first, then ever shorter ones, each up to a comma: what follows it was not finished.
    for end in [len(text), *reversed(ends[-16:])]:
        candidate = _closed(text[:end])
        if candidate is not None:
            return candidate
    return None


def _closed(text: str) -> str | None:
    closers, in_string, _ = _open_parts(text)
    endings = [text]
    if in_string:
        endings = [text[: len(text) - cut] + '"' for cut in range(min(len(text), 7))]
    for ending in endings:
        candidate = ending + "".join(reversed(closers))
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and value:
            return candidate
    return None


def _open_parts(text: str) -> tuple[list[str], bool, list[int]]:
    """Return what closes the brackets open at the end, whether a string is open, and where commas stand."""
    closers: list[str] = []
    commas: list[int] = []
    in_string = False
    for match in re.finditer(r'\\.|["{}\[\],]', text, re.DOTALL):
        mark = match.group()
        if in_string or mark == '"':
            in_string = in_string != (mark == '"')
        elif mark in _OPENERS:
            closers.append(_OPENERS[mark])
        elif mark in "}]":
            closers = closers[:-1]
        elif mark == ",":
            commas.append(match.start())
    return closers, in_string, commas
