"""What a run was started from: opening its folder, keeping its recipe and data, refusing to resume another.

A new run never overwrites an old one: the old folder is set aside under the next free number. A
resumed run works from its own copies and goes on only if the recipe and the originals still say the
same. This module knows files and settings, no models, and never loads mlx.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from localdpo import __version__
from localdpo.errors import InputError, Problem
from localdpo.files import atomic_write, environment_faults, require_space, sha256_file, write_json
from localdpo.machine import describe_machine
from localdpo.recipe import Recipe, anchored, dump_recipe
from localdpo.train.events import StepEvent
from localdpo.train.run import ActiveRun, RunFolder, Status, acquire

MAY_CHANGE = frozenset(
    {
        "output_dir",
        "data.probes",
        "train.max_steps",
        "train.num_train_epochs",
        "train.save_steps",
        "train.save_total_limit",
        "train.stop_loss",
        "train.early_stopping_patience",
        "train.gradient_checkpointing",
        "train.memory",
        "train.alarms",
        "train.stop_on",
        "train.report_to",
    }
)
"""Keys that a resume may change: how long, how often and in how much memory, not what is computed."""

_ENDS = (
    "train.max_steps",
    "train.num_train_epochs",
    "train.stop_loss",
    "train.early_stopping_patience",
    "train.stop_on",
)
_BY_CONTENT = ("data.train", "data.eval", "data.retain", "lora.init_from")
_OURS = frozenset(
    {
        "run.json",
        "recipe.yaml",
        "pairs.jsonl",
        "eval.jsonl",
        "retain.jsonl",
        "metrics.jsonl",
        "samples.jsonl",
        "status.json",
        "control",
        ".control.taken",
        "lock",
        "train.log",
        "checkpoints",
        "start",
        "tensorboard",
        "wandb",
    }
)
ADAPTER_SHAPE = frozenset(
    {"lora.r", "lora.alpha", "lora.use_rslora", "lora.target_modules", "lora.num_layers", "quantize"}
)
"""Settings that an adapter cannot go on without: those of its tensors and of the base they belong to."""
_AFRESH = "start a new run by leaving out --resume"
_OTHERWISE = f"go on from its adapter in a new run with --fork, or {_AFRESH}"
_COPY_NAMES = {"data.train": "pairs.jsonl", "data.eval": "eval.jsonl"}
_SPARE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file the recipe names under ``key``, and the sha256 of what was read from it."""

    key: str
    path: Path
    sha256: str

    @classmethod
    def of(cls, key: str, path: Path) -> DataFile:
        """The file as it is now."""
        return cls(key, path, sha256_file(path))


@dataclass(frozen=True, slots=True)
class Fork:
    """The earlier run that a run goes on from, at which step, and what had changed."""

    run: str
    step: int
    changes: list[str]


@dataclass(frozen=True, slots=True)
class Opened:
    """A run folder ready to train into; ``set_aside`` is where an earlier run was moved to."""

    run: ActiveRun
    set_aside: Path | None = None
    fork: Fork | None = None


def open_new(
    recipe: Recipe,
    files: Mapping[str, DataFile],
    start: Path | None = None,
    origin: Callable[[Path | None], Fork] | None = None,
) -> Opened:
    """Make the run folder of ``recipe`` with its snapshot and take its lock.

    A run that is already there is set aside, unless it never finished a step. ``start`` is the adapter folder of a
    fork, which becomes the run's own, and ``origin`` says where it is from, given where the earlier run was moved to.
    Raises InputError for a folder that is not a run's, EnvironmentFault for a full or read-only disk or a live trainer.
    """
    path = Path(recipe.output_dir)
    kept = anchored(recipe)
    require_space(path, _SPARE_BYTES + sum(file.path.stat().st_size for file in files.values()))
    with environment_faults(path):
        _refuse_foreign(path)
        path.mkdir(parents=True, exist_ok=True)
        lock = acquire(path)
        try:
            moved, lock = _set_aside(path, lock)
            _remove_ours(path)
            if start is not None:
                os.rename(start, path / "start")
            fork = origin(moved) if origin is not None else None
            _write_info(path, kept, files, fork)
            run = ActiveRun(path, lock)
        except BaseException:
            lock.release()
            raise
    try:
        run.set_status(state="starting")
        _copy_files(run, files)
        atomic_write(run.recipe_file, dump_recipe(kept))
    except BaseException as error:
        run.__exit__(type(error), error, None)
        raise
    return Opened(run, moved, fork)


def open_again(recipe: Recipe, files: Mapping[str, DataFile]) -> Opened:
    """Take the lock of the run of ``recipe`` to go on with it.

    Raises InputError when there is no such run, or when the recipe or the data differ from what it
    was started with (every difference is named), EnvironmentFault when a trainer is at work on it.
    """
    folder = RunFolder(recipe.output_dir)
    info = folder.info()
    if not info:
        raise InputError(Problem(str(folder.path), "there is no run here to resume", "Leave out --resume to start it"))
    if damaged := folder.damaged_info():
        raise InputError(
            Problem(
                str(folder.info_file), f"is damaged: {', '.join(damaged)}", "Start a new run by leaving out --resume"
            )
        )
    if problems := [*what_changed(info, recipe, files, folder), *_damaged_copies(info, folder)]:
        raise InputError(*problems)
    lock = acquire(folder.path)
    try:
        before = folder.status()
        if before is not None and before.state == "finished":
            _refuse_finished(before, info, recipe)
        kept = anchored(recipe)
        with environment_faults(folder.path):
            folder.control_file.unlink(missing_ok=True)
            write_json(folder.info_file, {**info, "recipe": kept.model_dump(mode="json")})
            atomic_write(folder.recipe_file, dump_recipe(kept))
            return Opened(ActiveRun(folder.path, lock, before or Status()))
    except BaseException:
        lock.release()
        raise


def copies(folder: RunFolder) -> dict[str, Path]:
    """The run's own copies of its data files, by recipe key; those it needs and has."""
    return {key: folder.path / name for key, name in _COPY_NAMES.items() if (folder.path / name).is_file()}


def _refuse_foreign(path: Path) -> None:
    """Raise InputError when ``path`` holds something other than a run: those files are the user's own."""
    if not path.exists() or (path / "run.json").is_file():
        return
    if not path.is_dir():
        raise InputError(Problem("output_dir", f"{path} is a file", "Choose another folder"))
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in _OURS)
    if foreign:
        named = ", ".join(foreign[:3]) + ("…" if len(foreign) > 3 else "")
        raise InputError(
            Problem(
                "output_dir",
                f"{path} holds other files ({named}) and no run",
                "Choose another folder with --set output_dir=…",
            )
        )


def _set_aside(path: Path, lock: FileLock) -> tuple[Path | None, FileLock]:
    """Move a run with something to keep to the next free name; returns where to, and the lock of ``path``."""
    if not _worth_keeping(RunFolder(path)):
        return None, lock
    moved = free_name(path)
    os.rename(path, moved)
    path.mkdir()
    # Ours until the new one is held: whoever waits for the old lock then finds another run here and leaves.
    fresh = acquire(path)
    lock.release()
    return moved, fresh


def _worth_keeping(folder: RunFolder) -> bool:
    if folder.adapter.exists() or any(folder.checkpoints.glob("step-*")):
        return True
    return any(isinstance(event, StepEvent) for event in folder.every_event())


def free_name(path: Path) -> Path:
    """The first of ``path``.1, ``path``.2 … that does not exist: where an earlier run is moved to."""
    number = 1
    while (candidate := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return candidate


def _remove_ours(path: Path) -> None:
    """Delete what a run that came to nothing left; not its lock, nor the log our own process may write."""
    for name in _OURS - {"lock", "train.log"}:
        entry = path / name
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _write_info(path: Path, recipe: Recipe, files: Mapping[str, DataFile], fork: Fork | None) -> None:
    write_json(
        path / "run.json",
        {
            "format": 1,
            "id": uuid.uuid4().hex,
            "localdpo": __version__,
            "created": round(time.time(), 3),
            "machine": describe_machine(),
            "recipe": recipe.model_dump(mode="json"),
            "files": {key: {"path": os.path.abspath(file.path), "sha256": file.sha256} for key, file in files.items()},
            **({"fork": asdict(fork)} if fork else {}),
        },
    )


def _copy_files(run: ActiveRun, files: Mapping[str, DataFile]) -> None:
    for key, name in _COPY_NAMES.items():
        if key not in files:
            continue
        target = run.path / name
        with environment_faults(target):
            temporary = target.with_name(f".{name}.copy")
            shutil.copyfile(files[key].path, temporary)
            if sha256_file(temporary) != files[key].sha256:
                temporary.unlink()
                raise InputError(Problem(str(files[key].path), "changed while it was being read", "Try again"))
            os.replace(temporary, target)


def what_changed(
    info: Mapping[str, Any], recipe: Recipe, files: Mapping[str, DataFile], folder: RunFolder
) -> list[Problem]:
    """What is no longer as it was when the run of ``info`` (run.json) was started and may not change on a resume."""
    return [*_recipe_differences(info, recipe), *_file_differences(info, files, folder)]


def _recipe_differences(info: Mapping[str, Any], recipe: Recipe) -> list[Problem]:
    now = dict(flat_settings(recipe.model_dump(mode="json")))
    # A setting that the run's version did not have yet worked as its default does now.
    before = {**_defaults(), **dict(flat_settings(info.get("recipe", {})))}
    problems = []
    for key, new in now.items():
        old = before.get(key)
        by_content = (
            key in info.get("files", {}) and key in _BY_CONTENT and isinstance(old, str) and isinstance(new, str)
        )
        if old == new or key in MAY_CHANGE or key == "model" or by_content:
            continue
        problems.append(
            Problem(
                key,
                f"is {new}, and was {old} when this run was started",
                f"Set it back, or {_AFRESH if key in ADAPTER_SHAPE else _OTHERWISE}",
            )
        )
    return problems + _shorter(before, now)


def _defaults() -> dict[str, Any]:
    least = Recipe.model_validate({"model": "-", "data": {"train": "-"}})
    return dict(flat_settings(least.model_dump(mode="json")))


def _refuse_finished(status: Status, info: Mapping[str, Any], recipe: Recipe) -> None:
    before = {**_defaults(), **dict(flat_settings(info.get("recipe", {})))}
    now = dict(flat_settings(recipe.model_dump(mode="json")))
    if any(before.get(key) != now[key] for key in _ENDS):
        return
    raise InputError(
        Problem(
            str(recipe.output_dir),
            f"this run is finished, at step {status.step} of {status.total_steps}",
            "Raise train.num_train_epochs or train.max_steps to go on, or leave out --resume to start a new run",
        )
    )


def _shorter(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Problem]:
    """A run may be made longer, not shorter than it is: fewer steps could lie behind it already."""
    problems = []
    for key in ("train.max_steps", "train.num_train_epochs"):
        old, new = before.get(key, -1), now[key]
        if isinstance(old, int | float) and 0 < new < old:
            problems.append(
                Problem(key, f"is {new}, and this run was started with {old}", "A resume can only raise it")
            )
    return problems


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a dumped recipe by their dotted keys."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat_settings(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _file_differences(info: Mapping[str, Any], files: Mapping[str, DataFile], folder: RunFolder) -> list[Problem]:
    problems = []
    known = info.get("files", {})
    for key, file in files.items():
        was = known.get(key)
        if was is not None and was["sha256"] != file.sha256:
            message = f"{file.path} has changed since this run was started"
            copy = _COPY_NAMES.get(key)
            kept = ""
            if copy:
                message += _lines_changed(folder.path / copy, file.path)
                kept = f" (the run's own copy is {folder.path / copy})"
            problems.append(Problem(key, message, f"Put it back{kept}, or {_OTHERWISE}"))
    return problems


def _lines_changed(before: Path, now: Path) -> str:
    """How many lines came and went, in brackets; nothing when one of the files cannot be read."""
    try:
        old, new = (Counter(_line_sums(path)) for path in (before, now))
    except OSError:
        return ""
    if old == new:
        return " (the same lines in another order)"
    return f" ({(new - old).total():,} lines added, {(old - new).total():,} removed)"


def _line_sums(path: Path) -> Iterator[int]:
    with path.open("rb") as file:
        yield from (hash(line.rstrip(b"\r\n")) for line in file)


def _damaged_copies(info: Mapping[str, Any], folder: RunFolder) -> list[Problem]:
    problems, known = [], info.get("files", {})
    for name, copy in ((n, c) for n, c in _COPY_NAMES.items() if n in known):
        at = folder.path / copy
        if not at.is_file() or sha256_file(at) != known[name]["sha256"]:
            problems.append(
                Problem(str(at), "this run's own copy of its data is missing or changed", "Start a new run")
            )
    return problems
