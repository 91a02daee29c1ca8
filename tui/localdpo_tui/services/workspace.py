"""The folder that the UI works in: what is in it, how an empty one begins, and what is remembered of it.

    pairs/*.jsonl    recipes/*.yaml    runs/<name>/    .localdpo/ (drafts, chats, trash, what the UI remembers)

A folder with pair files or recipes in its top level is a workspace too. Every method touches the disk: call them on a
thread where the folder may be slow. This module never loads mlx and knows no screens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localdpo.console.workspace import create
from localdpo.data.drafts import HIDDEN, make_hidden
from localdpo.errors import InputError, Problem
from localdpo.files import atomic_write, environment_faults, write_json

if TYPE_CHECKING:
    from localdpo.train.run import RunFolder

__all__ = ["Workspace"]

BLANK_PAIRS, BLANK_RECIPE = "my-pairs.jsonl", "my-recipe.yaml"
DEFAULT_MODEL = "smollm2-135m"
_STATE_BYTES = 1_000_000


class Workspace:
    """The workspace in `folder`. Making one reads nothing."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self.pairs = self.folder / "pairs"
        self.recipes_folder = self.folder / "recipes"
        self.runs_folder = self.folder / "runs"
        self.hidden = self.folder / HIDDEN
        self.drafts = self.hidden / "drafts"
        self.trash = self.hidden / "trash"
        self.logs = self.hidden / "logs"
        self._state_file = self.hidden / "ui.json"

    # -- what is there

    def pair_files(self) -> list[Path]:
        """Return the files of pairs, by name: those in `pairs/`, then those in the folder itself."""
        return [*_files(self.pairs, (".jsonl",)), *_files(self.folder, (".jsonl",))]

    def recipes(self) -> list[Path]:
        """Return the recipes, by name: those in `recipes/`, then those in the folder itself."""
        return [*_files(self.recipes_folder, (".yaml", ".yml")), *_files(self.folder, (".yaml", ".yml"))]

    def runs(self) -> list[RunFolder]:
        """Return the run folders, by name."""
        from localdpo.train.run import find_runs  # not needed to open: the first paint does not wait for it

        return find_runs(self.runs_folder)

    def is_empty(self) -> bool:
        """Return whether there is nothing to work with yet. A folder that is not there is empty."""
        return not (self.pair_files() or self.recipes() or self.runs())

    def check(self) -> None:
        """Raise InputError when the folder is a file, or is not there and its parent is not either."""
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(Problem(str(self.folder), "this is a file", "Name a folder"))
        if not self.folder.exists() and not self.folder.parent.is_dir():
            raise InputError(Problem(str(self.folder), "there is no such folder", "Check the path, or make it first"))

    def relative(self, path: str | Path) -> str:
        """Return a path as the user would write it: inside the folder from there, else whole."""
        path = Path(path)
        return str(path.relative_to(self.folder)) if path.is_relative_to(self.folder) else str(path)

    # -- how it begins

    def create_example(self) -> list[Path]:
        """Copy the shipped example; files that are there are left alone. Returns the new files.

        Raises InputError when the folder is a file, EnvironmentFault.
        """
        with environment_faults(self.folder):
            return create(self.folder)

    def create_blank(self, model: str = DEFAULT_MODEL) -> tuple[Path, Path]:
        """Make a file of pairs without pairs and a recipe for it, where they are not there; return both.

        Raises EnvironmentFault.
        """
        pairs, recipe = self.pairs / BLANK_PAIRS, self.recipes_folder / BLANK_RECIPE
        with environment_faults(self.folder):
            for folder in (self.pairs, self.recipes_folder, self.runs_folder):
                folder.mkdir(parents=True, exist_ok=True)
        if not pairs.exists():
            atomic_write(pairs, b"")
        if not recipe.exists():
            atomic_write(recipe, f"model: {json.dumps(model)}\ndata: {{train: ../pairs/{BLANK_PAIRS}}}\n")
        return pairs, recipe

    # -- what is remembered

    def state(self) -> dict[str, Any]:
        """Return what the UI remembered of this folder (last place, file, row …); nothing when that cannot be read."""
        try:
            if self._state_file.stat().st_size > _STATE_BYTES:
                return {}
            value = json.loads(self._state_file.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def remember(self, **values: Any) -> None:
        """Remember values by name, None to forget one; others stay. Raises EnvironmentFault."""
        state = {key: value for key, value in {**self.state(), **values}.items() if value is not None}
        if state == self.state():
            return
        with environment_faults(self.hidden):
            make_hidden(self.hidden)
        write_json(self._state_file, state)


def _files(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    wanted = tuple(suffixes)
    try:
        found = [path for path in folder.iterdir() if path.suffix in wanted and not path.name.startswith(".")]
        return sorted(path for path in found if path.is_file())
    except OSError:
        return []
