"""ShareGPT conversations with two answers: `conversations` of `from` and `value`, then `chosen` and `rejected`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localdpo.data.importers.family import Family, RowRefused, answer_turns, finished, turns_of

__all__ = ["SHAREGPT"]


def _matches(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("conversations"), list)


def _convert(row: dict[str, Any]) -> dict[str, Any]:
    turns = turns_of(row.pop("conversations", None))
    if row.get("chosen") is None or row.get("rejected") is None:
        raise RowRefused("has one answer and no preference")
    if isinstance(row.get("tools"), str):
        raise RowRefused('"tools" is not JSON')
    return finished(turns, answer_turns(row.pop("chosen")), answer_turns(row.pop("rejected")), row)


SHAREGPT = Family("sharegpt", "ShareGPT conversations", _matches, _convert)
