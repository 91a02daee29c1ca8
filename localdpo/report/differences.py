"""In which settings two recipes differ, as plain JSON. Imports nothing, so that a screen may use it too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["flat", "recipe_differences"]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + str(key)] = value
    return found


def recipe_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The keys whose values differ between two recipes as plain JSON (run.json's "recipe"), with both values."""
    left, right = flat(before), flat(after)
    return [
        (key, left.get(key), right.get(key))
        for key in dict.fromkeys([*left, *right])
        if left.get(key) != right.get(key)
    ]
