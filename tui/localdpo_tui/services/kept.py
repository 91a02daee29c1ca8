"""Which run of a folder is the current one, and which were before it: keep, and roll back.

The choice is one small file beside the runs, `current.json`, with the `id` of each run (as in its run.json), so
that scripts can read it too. A missing or damaged file is no choice. This module knows no widgets and no
models; it reads and writes files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from localdpo.errors import InputError, Problem
from localdpo.files import write_json
from localdpo.train.run import RunFolder, find_runs

__all__ = ["Kept", "keep_run", "read_kept", "roll_back"]

KEPT = "current.json"


@dataclass(frozen=True, slots=True)
class Kept:
    """The names of the current run and of those that were before it, oldest first."""

    current: str | None = None
    before: tuple[str, ...] = ()


def read_kept(folder: Path) -> Kept:
    """Which run of the folder is kept as the current one; runs that are gone are passed over."""
    current, before = _read(folder)
    names = _names(folder)
    return Kept(names.get(current or ""), tuple(names[key] for key in before if key in names))


def keep_run(folder: Path, name: str) -> Kept:
    """Make a run the current one. Raises InputError when it has no adapter, EnvironmentFault."""
    run = RunFolder(folder / name)
    identity = run.info().get("id")
    if not isinstance(identity, str) or not (run.adapter / "adapter_config.json").is_file():
        raise InputError(Problem(name, "has no adapter to keep yet", "Let it finish, or stop it: a stop saves one"))
    current, before = _read(folder)
    if current != identity:
        earlier = [*before, current] if current else before
        _write(folder, identity, [key for key in earlier if key != identity])
    return read_kept(folder)


def roll_back(folder: Path) -> Kept:
    """Make the run before the current one the current one again; those that are gone are passed over.

    Raises InputError when there is none.
    """
    _, before = _read(folder)
    names = _names(folder)
    there = [key for key in before if key in names and RunFolder(folder / names[key]).adapter.is_dir()]
    if not there:
        raise InputError(Problem("", "No earlier run was kept", "Keep a run with k; the one before it is remembered"))
    _write(folder, there[-1], there[:-1])
    return read_kept(folder)


def _names(folder: Path) -> dict[str, str]:
    """Runs by their identity: a new run in the same folder sets the earlier one aside under another name."""
    found = ((run.info().get("id"), run.path.name) for run in find_runs(folder))
    return {identity: name for identity, name in found if isinstance(identity, str)}


def _read(folder: Path) -> tuple[str | None, list[str]]:
    try:
        data = json.loads((folder / KEPT).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None, []
    if not isinstance(data, Mapping):
        return None, []
    current, before = data.get("current"), data.get("before")
    keys = [key for key in before if isinstance(key, str)] if isinstance(before, list) else []
    return current if isinstance(current, str) else None, keys


def _write(folder: Path, current: str, before: Sequence[str]) -> None:
    write_json(folder / KEPT, {"current": current, "before": list(before)})
