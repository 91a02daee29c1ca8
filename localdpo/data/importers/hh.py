"""Anthropic's hh-rlhf: two whole transcripts, each a text of `Human:` and `Assistant:` turns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from localdpo.data.importers.family import Family, RowRefused, finished

__all__ = ["HH"]

_START = re.compile(r"\s*(Human|Assistant):")
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def _matches(row: Mapping[str, Any]) -> bool:
    texts = [row.get("chosen"), row.get("rejected")]
    return "prompt" not in row and all(isinstance(text, str) and _START.match(text) for text in texts)


def _convert(row: dict[str, Any]) -> dict[str, Any]:
    return finished(None, _turns(row.pop("chosen", None)), _turns(row.pop("rejected", None)), row)


def _turns(text: Any) -> list[dict[str, str]]:
    """The turns of a transcript; white space around each is the format's, not the speaker's."""
    if not isinstance(text, str) or not _START.match(text):
        raise RowRefused("is not a transcript that begins with a turn of Human or Assistant")
    marks = list(_TURN.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        {"role": _ROLES[mark.group(1)], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]


HH = Family("hh-rlhf", "hh-rlhf transcripts", _matches, _convert)
