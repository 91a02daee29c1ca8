"""What is exported, served and talked to: the adapter of a run, or an adapter folder, and the base it belongs to.

Files and names only; nothing here reads a weight or loads mlx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from localdpo.errors import InputError, Problem
from localdpo.recipe import Recipe, load_recipe
from localdpo.train.run import RunFolder

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapters.safetensors"


@dataclass(frozen=True)
class Source:
    """An adapter, and what to load for it.

    ``path`` is what the user named, ``adapter`` the folder in mlx-lm's format, ``model`` the base as a recipe
    names it, ``quantize`` the bits it was packed into at load. ``run`` and ``recipe`` are None for a bare adapter.
    """

    path: Path
    adapter: Path
    model: str
    quantize: int | None = None
    memory: Literal["auto", "fast", "lean"] = "auto"
    recipe: Recipe | None = None
    run: RunFolder | None = None

    @property
    def name(self) -> str:
        """A short name for what is written: the folder's."""
        return self.path.resolve().name or "adapter"

    @property
    def info(self) -> Mapping[str, Any]:
        """The run's run.json; empty for a bare adapter."""
        return self.run.info() if self.run is not None else {}


def find_source(path: str | Path, model: str | None = None) -> Source:
    """The adapter at ``path``, a run folder or an adapter folder in mlx-lm's format.

    ``model`` goes before what the run or the adapter says. Raises InputError when there is no adapter, or no
    word about its base.
    """
    path = Path(path)
    if (path / ADAPTER_CONFIG).is_file():
        return _bare(path, model)
    run = RunFolder(path)
    if not run.recipe_file.is_file():
        raise InputError(Problem(str(path), "is no run folder and no adapter folder", "`localdpo runs` lists the runs"))
    if not (run.adapter / ADAPTER_CONFIG).is_file():
        status = run.status()
        state = f"it is {status.state} at step {status.step}" if status else "it has not begun"
        raise InputError(
            Problem(str(path), f"this run has no adapter yet: {state}", "Let it end, or resume it with --resume")
        )
    recipe = load_recipe(run.recipe_file, check_files=False)
    return Source(path, run.adapter, model or recipe.model, recipe.quantize, recipe.train.memory, recipe, run)


def _bare(path: Path, model: str | None) -> Source:
    from localdpo.model.safety import read_json

    if not (path / ADAPTER_WEIGHTS).is_file():
        raise InputError(
            Problem(
                str(path),
                f"has no {ADAPTER_WEIGHTS}: it is no adapter in mlx-lm's format",
                "`localdpo import-adapter` takes PEFT's",
            )
        )
    named = read_json(path / ADAPTER_CONFIG).get("model")
    if model is None and not isinstance(named, str):
        raise InputError(Problem(str(path), "an adapter alone does not say its model", "Name it with --model"))
    return Source(path, path, model or str(named))
