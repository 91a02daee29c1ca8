"""The ways out of localdpo, by name, and what they share: a checked output folder, written whole or not at all.

Each target is a module with ``write(job) -> Written``. This module knows no format and loads no mlx; a target's
module is loaded when it is used.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localdpo import __version__
from localdpo.errors import InputError, Problem
from localdpo.export.source import ADAPTER_WEIGHTS, Source
from localdpo.files import MANIFEST, atomic_folder, environment_faults, sha256_file, write_json

MARKER = "export.json"
"""In every folder an export wrote: what it is of. Only a folder that has one may be replaced."""

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What can be asked of an export; a target ignores what does not concern it.

    ``base``: the base's name in the tool that will load the adapter (peft: a Hub id or folder; gguf: a GGUF file
    or an Ollama model). ``with_base``: put the base beside the adapter. ``quantize``: bits of a fused model, None
    for full precision. ``accept_loss``: write a fused model even if it no longer answers as the adapter does.
    """

    base: str | None = None
    with_base: bool = False
    quantize: int | None = None
    accept_loss: bool = False


@dataclass(frozen=True)
class Job:
    """An export under way: write into ``folder``, which becomes ``target`` when all is well."""

    source: Source
    folder: Path
    target: Path
    options: Options
    say: Notify


@dataclass(frozen=True)
class Written:
    """What a target wrote: how to use it, one line each, and figures about how faithful it is."""

    next_steps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Exported:
    """A finished export: the folder, its files with their sizes in bytes, and what the target had to say."""

    target: str
    folder: Path
    files: dict[str, int]
    written: Written

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "target": self.target,
            "folder": str(self.folder),
            "files": self.files,
            "notes": list(self.written.notes),
            "next": list(self.written.next_steps),
            "figures": dict(self.written.figures),
        }


@dataclass(frozen=True)
class Target:
    """A way out: its name, what it makes in a few words, and the module that does it."""

    name: str
    summary: str
    module: str

    def write(self, job: Job) -> Written:
        """Write ``job``. Raises InputError and EnvironmentFault."""
        written: Written = importlib.import_module(self.module).write(job)
        return written


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("peft", "an adapter for PEFT and what loads PEFT adapters", "localdpo.export.peft"),
        Target("gguf", "an adapter for llama.cpp, Ollama and LM Studio", "localdpo.export.gguf"),
        Target("fused", "a whole model, the adapter folded into the base", "localdpo.export.fused"),
        Target("mlx", "an adapter for mlx_lm.generate, mlx_lm.chat and mlx_lm.server", "localdpo.export.mlx"),
    )
}
"""The targets that write a folder; ``hub`` sends one elsewhere and is in a module of its own."""


def export(
    source: Source,
    target: str,
    folder: str | Path,
    *,
    options: Options | None = None,
    force: bool = False,
    notify: Notify | None = None,
) -> Exported:
    """Write ``source`` for ``target`` into ``folder``, whole or not at all.

    ``force`` replaces an earlier export there, and nothing else. Raises InputError for an unknown target, a folder
    in use, and what the target cannot express; EnvironmentFault for disk, memory, network or a missing extra.
    """
    if target not in TARGETS:
        raise InputError(Problem("--to", f"{target!r} is no target", f"It is one of {', '.join(TARGETS)}"))
    place = Path(folder).expanduser().absolute()
    check_output(place, source.adapter, force=force)
    say = notify or (lambda _: None)
    with atomic_folder(place) as temporary:
        written = TARGETS[target].write(Job(source, temporary, place, options or Options(), say))
        write_json(
            temporary / MARKER,
            {
                "target": target,
                "model": source.model,
                "adapter_sha256": sha256_file(source.adapter / ADAPTER_WEIGHTS),
                "localdpo": __version__,
                "figures": dict(written.figures),
            },
        )
        for entry in temporary.rglob("*"):
            entry.chmod(0o755 if entry.is_dir() else 0o644)
    with environment_faults(place):
        place.chmod(0o755)
        files = {p.relative_to(place).as_posix(): p.stat().st_size for p in sorted(place.rglob("*")) if p.is_file()}
    return Exported(target, place, files, written)


def check_output(place: Path, adapter: Path, *, force: bool) -> None:
    """Raise InputError unless ``place`` is free, or holds an earlier export and may be replaced."""
    own, real = adapter.resolve(), place.resolve()
    if real == own or own.is_relative_to(real) or real.is_relative_to(own):
        raise InputError(Problem(str(place), "holds the adapter itself, or lies in it", "Choose another folder"))
    if not place.exists() and not place.is_symlink():
        return
    if place.is_dir() and not any(place.iterdir()):
        return
    if not _is_export(place):
        raise InputError(Problem(str(place), "exists already and is no export", "Choose another folder with --out"))
    if not force:
        raise InputError(
            Problem(str(place), "holds an earlier export", "Choose another folder with --out, or replace it by --force")
        )


def _is_export(place: Path) -> bool:
    try:
        marker = json.loads((place / MARKER).read_bytes())
        known = set(json.loads((place / MANIFEST).read_bytes())["files"]) | {MANIFEST, ".DS_Store"}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    # What the user has put beside the export is not ours to delete.
    present = {entry.relative_to(place).as_posix() for entry in place.rglob("*") if not entry.is_dir()}
    return isinstance(marker, dict) and present <= known
