"""Which recipe of a workspace trains on a file, and how long its pairs may be.

Reads the few keys it needs and leaves checking a recipe to `localdpo.recipe`, whose import takes a quarter of a second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from localdpo.errors import LocalDPOError
from localdpo.yamlfile import read_yaml
from localdpo_tui.services.pair_limits import PairLimits

__all__ = ["limits_for"]

_MOST_RECIPES = 50


def limits_for(folder: Path, pairs: Path) -> PairLimits:
    """Return the limits for the file `pairs`: those of the newest recipe in `folder` that trains on it."""
    found = []
    for path in _recipes(folder):
        try:
            value = read_yaml(path.read_bytes(), str(path)).value
        except (LocalDPOError, OSError):
            continue
        limits = _limits(path, value, pairs)
        if limits is not None:
            found.append((path.stat().st_mtime, limits))
    return max(found, key=lambda item: item[0])[1] if found else PairLimits()


def _recipes(folder: Path) -> Iterator[Path]:
    for place in (folder / "recipes", folder):
        try:
            yield from sorted(path for path in place.iterdir() if path.suffix in (".yaml", ".yml"))[:_MOST_RECIPES]
        except OSError:
            continue


def _limits(path: Path, value: Any, pairs: Path) -> PairLimits | None:
    data = value.get("data") if isinstance(value, dict) else None
    if not isinstance(data, dict):
        return None
    train = data.get("train")
    if not isinstance(train, str) or os.path.realpath(path.parent / train) != os.path.realpath(pairs):
        return None
    length, model = data.get("max_length"), value.get("model")
    defaults = PairLimits()
    return PairLimits(
        model if isinstance(model, str) else defaults.model,
        length if isinstance(length, int) and length > 0 else defaults.max_length,
        path,
    )
