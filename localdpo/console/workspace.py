"""`localdpo init`: a workspace with the shipped example: pairs/, recipes/ and runs/."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from localdpo.errors import InputError, Problem
from localdpo.files import atomic_write
from localdpo.paths import recipes_dir
from localdpo.text import sanitise

_DATA_NAME = re.compile(r"(?<![\w./-])([\w-]+\.jsonl)\b")


def create(target: Path) -> list[Path]:
    """Copy the shipped recipes to ``target``/recipes and their data to ``target``/pairs.

    Returns the new files; those that are there already are left alone. Raises InputError when ``target`` is a
    file.
    """
    if target.exists() and not target.is_dir():
        raise InputError(Problem(str(target), "this is a file", "name a folder"))
    shipped = recipes_dir()
    made = []
    for folder in ("pairs", "recipes", "runs"):
        (target / folder).mkdir(parents=True, exist_ok=True)
    for source in sorted(shipped.iterdir()):
        text = source.read_text("utf-8")
        if source.suffix == ".yaml":
            path, text = target / "recipes" / source.name, _DATA_NAME.sub(r"../pairs/\1", text)
        elif source.suffix == ".jsonl":
            path = target / "pairs" / source.name
        else:
            continue
        if not path.exists():
            atomic_write(path, text)
            made.append(path)
    return made


def init(target: Path) -> None:
    """Make the workspace and say what to do with it."""
    made = create(target)
    for path in made:
        print(f"wrote {sanitise(str(path))}")
    if not made:
        print("nothing to write: the workspace is complete")
    recipes = sorted((target / "recipes").glob("*.yaml"))
    if recipes:
        # Runs go to the current folder, so the workspace should be it.
        there = "" if target.resolve() == Path.cwd() else f"cd {shlex.quote(str(target))} && "
        print(f"next: {sanitise(there)}localdpo train recipes/{sanitise(recipes[0].name)}")
