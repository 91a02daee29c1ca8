"""Values out of JSON that may come from anywhere: each has the type that was asked for, or is absent.

A run folder may be damaged, of a later version, or made by somebody else; a reader of these functions need not care.
This module knows JSON, and how eval.json writes a figure with its interval.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localdpo.evaluate.intervals import Figure

__all__ = [
    "MAX_BYTES",
    "Figure",
    "figure",
    "flag",
    "items",
    "number",
    "object_at",
    "read_object",
    "text",
    "texts",
    "tilde",
]

MAX_BYTES = 64_000_000
"""A JSON file larger than this is not read for a page."""

_HOME = re.compile(r"^(/home/[^/]+|/Users/[^/]+|/root)(?=/|$)")


def number(value: object) -> float | None:
    """`value` if it is a finite number."""
    # An integer may be too large for a float: JSON has no limit.
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        return None
    return float(value) if math.isfinite(value) else None


def text(value: object) -> str:
    """`value` if it is a string, else an empty one."""
    return value if isinstance(value, str) else ""


def texts(value: object) -> list[str]:
    """The strings in a list; none if it is no list."""
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def flag(value: object) -> bool | None:
    """`value` if it is true or false."""
    return value if isinstance(value, bool) else None


def items(value: object) -> list[dict[str, Any]]:
    """The objects in a list; none if it is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def object_at(value: object, *keys: str) -> dict[str, Any]:
    """The object under `keys`, empty where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return dict(value) if isinstance(value, Mapping) else {}


def figure(value: object) -> Figure | None:
    """A figure as `{"value": …, "low": …, "high": …}` or as a bare number."""
    if not isinstance(value, Mapping):
        bare = number(value)
        return None if bare is None else Figure(bare)
    middle = number(value.get("value"))
    if middle is None:
        return None
    low, high = number(value.get("low")), number(value.get("high"))
    return Figure(middle, low, high) if low is not None and high is not None and low <= high else Figure(middle)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is none, or none that can be read."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return {}
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def tilde(value: str) -> str:
    """A path without the name of the user whose home it is in: a page is made to be shown."""
    return _HOME.sub("~", value)
