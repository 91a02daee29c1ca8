"""Going on from an earlier run with another recipe or other pairs: a new run that starts from its adapter.

A resume promises the bits of an uninterrupted run, so it refuses what has changed. A fork promises less and allows
more: the earlier run is kept as it is, and a new one takes over the weights of its adapter. Optimizer, learning-rate
schedule, data order and metrics begin anew. This module knows folders and settings, and nothing of training.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from localdpo.errors import InputError, Problem
from localdpo.files import MANIFEST, atomic_folder, environment_faults, require_space, verify_folder
from localdpo.recipe import Recipe
from localdpo.train.checkpoint import ADAPTER, list_checkpoints
from localdpo.train.run import RunFolder
from localdpo.train.snapshot import ADAPTER_SHAPE, DataFile, Fork, flat_settings, what_changed

__all__ = ["ForkPoint", "find_fork_point", "forked_message", "staged_start", "with_start"]


@dataclass(frozen=True, slots=True)
class ForkPoint:
    """The adapter folder that a fork of ``run`` takes over, of optimizer step ``step``.

    ``changes`` are those since the run began, ``damaged`` what is wrong with newer adapters that were passed over.
    """

    run: Path
    step: int
    adapter: Path
    changes: list[str]
    damaged: list[Problem]

    def origin(self, moved: Path | None) -> Fork:
        """What run.json keeps of it; ``moved`` is where the earlier run was set aside to."""
        return Fork(str((moved or self.run).absolute()), self.step, self.changes)


def find_fork_point(recipe: Recipe, files: Mapping[str, DataFile]) -> ForkPoint:
    """Where a fork of the run at ``recipe.output_dir`` begins: a finished run's adapter, else its newest checkpoint.

    Raises InputError when there is no run, when nothing of its adapter is whole, and when the recipe asks for an
    adapter of another shape.
    """
    folder = RunFolder(recipe.output_dir)
    info = folder.info()
    if not info:
        raise InputError(Problem(str(folder.path), "there is no run here to fork", "Leave out --fork to start it"))
    before = dict(flat_settings(info.get("recipe", {})))
    now = dict(flat_settings(recipe.model_dump(mode="json")))
    misshapen = [
        Problem(
            key,
            f"is {now[key]}, and was {before[key]} in the run to fork, whose adapter has that shape",
            "Set it back, or start a new run by leaving out --fork",
        )
        for key in sorted(ADAPTER_SHAPE)
        if key in before and before[key] != now[key]
    ]
    if misshapen:
        raise InputError(*misshapen)
    damaged: list[Problem] = []
    for step, adapter in _candidates(folder):
        problems = verify_folder(adapter)
        if not problems:
            changes = [f"{problem.where}: {problem.message}" for problem in what_changed(info, recipe, files, folder)]
            return ForkPoint(folder.path, step, adapter, changes, damaged)
        damaged += problems
    message = "no adapter of this run is whole" if damaged else "this run has saved nothing yet to go on from"
    raise InputError(*damaged, Problem(str(folder.path), message, "Start a new run by leaving out --fork"))


def _candidates(folder: RunFolder) -> Iterator[tuple[int, Path]]:
    """Steps and adapter folders, best first; an adapter that was never written is not among them."""
    status = folder.status()
    published = (status.adapter_step or status.step if status else 0), folder.adapter
    finished = status is not None and status.state == "finished"
    newest = [(step, path / ADAPTER) for step, path in reversed(list_checkpoints(folder.checkpoints))]
    for step, adapter in [published, *newest] if finished else [*newest, published]:
        if adapter.is_dir():
            yield step, adapter
    if folder.start.is_dir():
        yield 0, folder.start


@contextmanager
def staged_start(point: ForkPoint) -> Iterator[Path]:
    """A verified copy of the fork's adapter beside the run folder, for the new run to take; removed if it does not.

    Made before anything is moved, so that a full disk changes nothing. Raises EnvironmentFault.
    """
    staged = point.run.with_name(f".{point.run.name}.fork")
    size = sum(file.stat().st_size for file in point.adapter.iterdir() if file.is_file())
    require_space(staged, size)
    try:
        with environment_faults(staged), atomic_folder(staged) as temporary:
            for file in sorted(point.adapter.iterdir()):
                if file.is_file() and file.name != MANIFEST:
                    shutil.copyfile(file, temporary / file.name)
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def with_start(recipe: Recipe, run: RunFolder) -> Recipe:
    """The recipe as the model is set up from: a forked run starts from its own copy of the earlier adapter.

    Raises InputError when that copy is damaged.
    """
    if not run.start.is_dir():
        return recipe
    problems = verify_folder(run.start)
    if problems:
        raise InputError(*problems, Problem(str(run.path), "the adapter this run forked from is damaged"))
    return recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"init_from": run.start})})


def forked_message(fork: Fork) -> str:
    """What a new run says of the one it goes on from."""
    what = "; ".join(fork.changes) or "nothing else has changed"
    return f"This run goes on from the adapter of step {fork.step} of {fork.run}, which is kept. Changes: {what}."
