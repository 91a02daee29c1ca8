"""Where localdpo keeps its cache and finds the recipes it ships. Reads the environment, touches no file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs

__all__ = ["cache_dir", "child_environment", "follow", "follow_recipe", "from_here", "recipe_paths", "recipes_dir"]


def cache_dir() -> Path:
    """Return the cache folder: `$LOCALDPO_CACHE`, or this platform's user cache. It may not exist yet."""
    chosen = os.environ.get("LOCALDPO_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(platformdirs.user_cache_dir("localdpo", appauthor=False))


def child_environment() -> dict[str, str]:
    """Return the environment in which a child process finds this package wherever this process found it."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def recipes_dir() -> Path:
    """Return the folder of the recipes shipped with localdpo, from a wheel or from a checkout."""
    package = Path(__file__).resolve().parent
    shipped = package / "_recipes"
    return shipped if shipped.is_dir() else package.parent / "recipes"


def follow(path: str, before: str, now: str | Path) -> str:
    """Where ``path`` is, when what remembered it stood in the folder ``before`` and now stands in ``now``.

    Both absolute. A path that is gone is looked for where it was from there: a project that was moved as a whole has
    everything in the same places. What is found in neither place stays as it was written, for messages to name.
    """
    if not (os.path.isabs(path) and os.path.isabs(before)) or os.path.lexists(path):
        return path
    beside = os.path.normpath(os.path.join(os.path.abspath(now), os.path.relpath(path, before)))
    return beside if os.path.exists(beside) else path


_RECIPE_PATHS = (
    ("", "model"),
    *(("data", key) for key in ("train", "eval", "retain", "probes")),
    ("lora", "init_from"),
)


def recipe_paths(values: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A recipe as plain values, with ``change`` done to every absolute path but ``output_dir``."""
    found = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for section, key in _RECIPE_PATHS:
        place = found.get(section) if section else found
        path = place.get(key) if isinstance(place, dict) else None
        if isinstance(place, dict) and isinstance(path, str) and os.path.isabs(path):
            place[key] = change(path)
    return found


def follow_recipe(values: dict[str, Any], now: str | Path) -> dict[str, Any]:
    """A run's recipe as plain values, with the paths it has now that the run stands in the folder ``now``.

    Its own ``output_dir`` says where the run stood when they were written.
    """
    before = values.get("output_dir")
    return recipe_paths(values, lambda path: follow(path, before, now)) if isinstance(before, str) else values


def from_here(path: str | Path) -> str:
    """``path`` as one would type it: relative to the current folder where it is inside that."""
    place = Path(path).absolute()
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else str(path)
