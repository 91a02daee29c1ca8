"""Where localdpo keeps its cache and finds the recipes it ships. Reads the environment, touches no file."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

__all__ = ["cache_dir", "child_environment", "from_here", "recipes_dir"]


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


def from_here(path: str | Path) -> str:
    """``path`` as one would type it: relative to the current folder where it is inside that."""
    place = Path(path).absolute()
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else str(path)
