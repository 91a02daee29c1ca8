"""Checkpoints: everything a run needs to go on to the same bits, in folders that are whole or not there.

``checkpoints/step-000100/`` holds ``adapter/`` (mlx-lm's format), ``optimizer.safetensors``,
``state.json`` and a manifest of sha256 sums that is checked before anything is read. This module
knows nothing about data or losses.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from localdpo.data.order import Position
from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.files import atomic_folder, verify_folder, write_json
from localdpo.model.load import LoadedModel
from localdpo.model.lora import LoraInfo, save_adapter

ADAPTER = "adapter"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run is, beside its adapter and optimizer.

    ``position`` is that of the next window, ``rng`` the two words of mlx's random key, ``stale`` the
    evaluations since the best one, ``metrics_bytes`` the size of metrics.jsonl at this moment, and
    ``total_steps`` what the learning-rate schedule was laid out for.
    """

    step: int
    position: Position
    total_steps: int
    rng: tuple[int, int]
    num_tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    stale: int = 0
    metrics_bytes: int = 0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainState:
        """Read what ``asdict`` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        position = Position(int(data["position"]["epoch"]), int(data["position"]["window"]))
        high, low = (int(word) for word in data["rng"])
        rest = {key: value for key, value in data.items() if key not in ("position", "rng")}
        return cls(position=position, rng=(high, low), **rest)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was verified and read."""

    path: Path
    state: TrainState
    optimizer: dict[str, mx.array]

    @property
    def adapter(self) -> Path:
        """The adapter folder inside it."""
        return self.path / ADAPTER


def rng_state() -> tuple[int, int]:
    """The two words of mlx's random key on this thread."""
    state: Any = mx.random.state
    high, low = state[0].tolist()
    return int(high), int(low)


def restore_rng(words: tuple[int, int]) -> None:
    """Set mlx's random key: a seed is nothing but the key's two words side by side."""
    mx.random.seed(words[0] << 32 | words[1])


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is kept."""
    return folder / f"step-{step:06d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints in ``folder``, oldest first, whole or not."""
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir() if entry.is_dir())
    return sorted((int(match[1]), entry) for match, entry in found if match)


def save_checkpoint(
    folder: Path,
    state: TrainState,
    optimizer: Mapping[str, mx.array],
    loaded: LoadedModel,
    info: LoraInfo,
) -> Path:
    """Write the checkpoint of ``state.step`` into ``folder``, whole or not at all; returns its path.

    Raises EnvironmentFault, a full disk included; what was there before is then untouched.
    """
    path = checkpoint_path(folder, state.step)
    with disk_faults(path), atomic_folder(path) as temporary:
        save_adapter(temporary / ADAPTER, loaded.model, info, loaded)
        mx.save_safetensors(str(temporary / _OPTIMIZER), dict(optimizer))
        write_json(temporary / _STATE, asdict(state))
    return path


def load_latest(folder: Path) -> tuple[Checkpoint | None, list[Problem]]:
    """The newest checkpoint in ``folder`` that is whole, and what is wrong with the newer ones.

    None when there is no checkpoint at all. Raises InputError when there are some and none is whole.
    """
    damaged: list[Problem] = []
    for _, path in reversed(list_checkpoints(folder)):
        problems = verify_folder(path)
        if not problems:
            try:
                return _read(path), damaged
            except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
                problems = [Problem(str(path), f"cannot be read ({error})")]
        damaged += problems
    if damaged:
        raise InputError(*damaged, Problem(str(folder), "no checkpoint is whole", "Start a new run"))
    return None, []


def prune(folder: Path, keep: int | None, spare: Sequence[int | None] = ()) -> list[Path]:
    """Delete the oldest checkpoints beyond ``keep`` (None keeps all); returns what was deleted.

    Those of the steps in ``spare`` (the best one) are neither deleted nor counted, and neither is
    the newest that is whole ever deleted.
    """
    if keep is None:
        return []
    others = [(step, path) for step, path in list_checkpoints(folder) if step not in spare]
    doomed = [path for _, path in others[: -max(keep, 1)]]
    if doomed and not any(not verify_folder(path) for _, path in others[-max(keep, 1) :]):
        return []
    for path in doomed:
        # The manifest goes first: half a deletion must not look like a checkpoint.
        (path / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    return doomed


def _read(path: Path) -> Checkpoint:
    state = TrainState.from_json(json.loads((path / _STATE).read_text(encoding="utf-8")))
    arrays: Any = mx.load(str(path / _OPTIMIZER))
    return Checkpoint(path, state, arrays)


@contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """mlx reports a write that fails, for want of space for one, as a RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise EnvironmentFault(
            Problem(str(path), f"could not be saved ({error})", "Free some space on this disk, then use --resume")
        ) from error
