"""An adapter made elsewhere, by mlx-lm or PEFT, becomes a run: to chat with, evaluate, compare and continue from.

Its files are parsed by us, checked against the base's shapes and written again in our form; nothing pickled is read
and no code is run. The run's reference is the base without the adapter. It knows nothing of how it was trained.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import join
from typing import Any

import mlx.core as mx

from localdpo import __version__
from localdpo.catalogue import UPSTREAM
from localdpo.errors import InputError, Problem
from localdpo.export.peft_reader import PEFT_WEIGHTS, read_peft
from localdpo.export.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from localdpo.files import (
    MANIFEST,
    atomic_folder,
    atomic_write,
    environment_faults,
    require_space,
    sha256_file,
    write_json,
)
from localdpo.model.load import OpenModel, open_model
from localdpo.model.lora import LoraInfo, lora_scale, read_adapter, write_adapter
from localdpo.model.safety import PICKLE_SUFFIXES, read_json
from localdpo.recipe import Recipe, dump_recipe
from localdpo.train.events import EndEvent, event_line
from localdpo.train.run import RunFolder, Status
from localdpo.train.snapshot import free_name

Notify = Callable[[str], None]

REFERENCE = (
    "Its reference is the base without this adapter: rewards, drift and comparisons are measured from there. A run "
    "that goes on from it can measure from the base with it instead: dpo.reference=init."
)


@dataclass(frozen=True)
class Imported:
    """A run made from an adapter. ``named_base`` is what the adapter said it belongs to, if it said so."""

    run: Path
    format: str
    model: str
    named_base: str | None
    info: LoraInfo
    notes: tuple[str, ...]
    set_aside: Path | None = None

    def lines(self) -> list[str]:
        """What to tell the user."""
        info = self.info
        kept = [] if self.set_aside is None else [f"The run that was in {self.run} was kept: {self.set_aside}."]
        return [
            f"run: {self.run}",
            f"  {self.format} adapter of rank {info.rank}, scale {info.scale:g}, on {', '.join(info.keys)}",
            f"  in the top {info.num_layers} layers of {self.model}: {info.trainable:,} weights",
            *(f"  {note}" for note in [*kept, *self.notes, REFERENCE]),
            "next:",
            f"  {join(['localdpo', 'chat', str(self.run), '--compare'])}",
            f"  {join(['localdpo', 'train', 'RECIPE', *_same_shape(self)])}",
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "run": str(self.run),
            "format": self.format,
            "model": self.model,
            "named_base": self.named_base,
            "lora": asdict(self.info),
            "reference": "base",
            "notes": list(self.notes),
            "set_aside": None if self.set_aside is None else str(self.set_aside),
        }


def _same_shape(done: Imported) -> list[str]:
    """The overrides that give a recipe an adapter of the same shape, as going on from it asks for."""
    info = done.info
    settings = {
        "lora.init_from": RunFolder(done.run).adapter,
        "lora.r": info.rank,
        "lora.alpha": _alpha(info),
        "lora.num_layers": info.num_layers,
        "lora.target_modules": f"[{','.join(info.keys)}]",
    }
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def import_adapter(
    adapter: str | Path,
    run: str | Path,
    *,
    model: str | None = None,
    quantize: int | None = None,
    force: bool = False,
    notify: Notify | None = None,
) -> Imported:
    """Check the LoRA adapter in the folder ``adapter`` and make the run folder ``run`` from it.

    ``model`` names the base, else what the adapter says. ``force`` sets a run aside that is there already. Raises
    InputError for an adapter that is damaged, pickled, of another kind than LoRA, or of another base.
    """
    folder, target = Path(adapter), Path(run)
    config, kind = _recognise(folder)
    named = _named_base(config, kind)
    spec = model or _ours(named)
    if spec is None:
        raise InputError(Problem(str(folder), "does not say which model it belongs to", "Name it with --model"))
    _check_target(target, force)
    opened = open_model(spec, quantize=quantize, notify=notify)
    if kind == "mlx-lm":
        stored = read_adapter(folder, opened.model, opened)
        info, weights = stored.info, stored.weights
    else:
        info, weights = read_peft(folder, config, opened)
    # To the bit what a recipe with this alpha asks for: a run that goes on from it compares them.
    info = replace(info, scale=lora_scale(_alpha(info), info.rank))
    notes = tuple(_notes(spec, named, opened))
    require_space(target, 4 * info.trainable)
    aside = _set_aside(target)
    with environment_faults(target), atomic_folder(target) as temporary:
        _write(temporary, target, opened, info, weights, _origin(folder, kind, named))
    # A run's files change as it is used; the manifest is for folders that do not.
    with environment_faults(target):
        (target / MANIFEST).unlink()
    return Imported(target, kind, opened.spec, named, info, notes, aside)


def _recognise(folder: Path) -> tuple[dict[str, Any], str]:
    """The adapter's config, and "mlx-lm" or "peft"."""
    if not folder.is_dir():
        raise InputError(Problem(str(folder), "is not a folder", "Name the folder that holds adapter_config.json"))
    if (folder / "run.json").is_file():
        raise InputError(Problem(str(folder), "is a run already", "Name an adapter folder made by another tool"))
    if not (folder / ADAPTER_CONFIG).is_file():
        raise InputError(Problem(str(folder), f"has no {ADAPTER_CONFIG}", "It must be an adapter of mlx-lm or PEFT"))
    config = read_json(folder / ADAPTER_CONFIG)
    kind = "peft" if "peft_type" in config else "mlx-lm"
    if kind == "mlx-lm" and not {"lora_parameters", "fine_tune_type"} & set(config):
        raise InputError(
            Problem(str(folder / ADAPTER_CONFIG), "is neither mlx-lm's ('lora_parameters') nor PEFT's ('peft_type')")
        )
    weights = folder / (PEFT_WEIGHTS if kind == "peft" else ADAPTER_WEIGHTS)
    if not weights.is_file():
        raise InputError(_no_weights(folder, weights))
    return config, kind


def _no_weights(folder: Path, weights: Path) -> Problem:
    pickled = [path for path in sorted(folder.iterdir()) if path.suffix in (*PICKLE_SUFFIXES, ".npz")]
    if pickled:
        return Problem(
            str(pickled[0]),
            "is not read: a pickled file can run code",
            "Save the adapter with safetensors (in PEFT: save_pretrained with safe_serialization=True)",
        )
    return Problem(str(weights), "is missing")


def _named_base(config: Mapping[str, Any], kind: str) -> str | None:
    value = config.get("base_model_name_or_path" if kind == "peft" else "model")
    return value if isinstance(value, str) and value.strip() else None


def _ours(named: str | None) -> str | None:
    """A base as localdpo names it: the catalogue's model for its full-precision original."""
    return next((name for name, original in UPSTREAM.items() if original == named), named)


def _notes(spec: str, named: str | None, model: OpenModel) -> list[str]:
    notes = []
    if named is not None and named != spec:
        what = "a quantised copy of it" if UPSTREAM.get(spec) == named else "which fits in every shape"
        notes.append(f"The adapter names {named} as its base; this run has it on {spec}, {what}.")
    if model.config.get("quantization") and UPSTREAM.get(spec) == named:
        notes.append("Its answers can differ a little from those on the original: the base does.")
    return notes


def _origin(folder: Path, kind: str, named: str | None) -> dict[str, Any]:
    weights = folder / (PEFT_WEIGHTS if kind == "peft" else ADAPTER_WEIGHTS)
    return {
        "from": str(folder.absolute()),
        "format": kind,
        "sha256": sha256_file(weights),
        "base": named,
        "reference": "base",
    }


def _check_target(target: Path, force: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    run = RunFolder(target)
    if not run.info():
        raise InputError(Problem(str(target), "exists already and is no run", "Choose another folder with --out"))
    if run.is_running():
        raise InputError(Problem(str(target), "a trainer is at work on this run", "Choose another folder with --out"))
    if not force:
        fix = "Choose another folder with --out, or set this run aside by --force"
        raise InputError(Problem(str(target), "holds a run already", fix))


def _set_aside(target: Path) -> Path | None:
    with environment_faults(target):
        if not target.is_dir() or not any(target.iterdir()):
            return None
        aside = free_name(target)
        os.rename(target, aside)
    return aside


def _write(
    folder: Path,
    target: Path,
    model: OpenModel,
    info: LoraInfo,
    weights: Mapping[str, mx.array],
    origin: Mapping[str, Any],
) -> None:
    run, recipe = RunFolder(folder), _recipe(target, model, info)
    belongs = {"model": model.spec, "base_fingerprint": model.fingerprint}
    wide = {name: value.astype(mx.float32) for name, value in weights.items()}
    write_adapter(run.adapter, wide, info, belongs)
    described = {
        "format": 1,
        "id": uuid.uuid4().hex,
        "localdpo": __version__,
        "created": round(time.time(), 3),
        "recipe": recipe.model_dump(mode="json"),
        "files": {},
        "model": {"spec": model.spec, "fingerprint": model.fingerprint},
        "imported": dict(origin),
    }
    message = f"Imported from {origin['from']}"
    status = Status(state="finished", reason="imported", message=message, adapter_step=0, updated=round(time.time(), 3))
    end = EndEvent(
        reason="imported", message=message, adapter=str(RunFolder(target).adapter.absolute()), adapter_step=0
    )
    write_json(run.info_file, described)
    write_json(run.status_file, asdict(status))
    atomic_write(run.metrics_file, event_line(end))
    atomic_write(run.recipe_file, dump_recipe(recipe))


def _alpha(info: LoraInfo) -> float:
    return info.scale * info.rank


def _recipe(target: Path, model: OpenModel, info: LoraInfo) -> Recipe:
    """What would attach the same adapter again; its data are for whoever trains on to name."""
    spec = str(model.source.path) if model.source.kind == "folder" else model.spec
    layers = len(model.model.layers)
    return Recipe.model_validate(
        {
            "model": spec,
            "quantize": model.quantized_at_load,
            "output_dir": target.absolute(),
            "data": {"train": target.absolute() / "pairs.jsonl", "eval": None, "retain": None},
            "lora": {
                "r": info.rank,
                "alpha": _alpha(info),
                "dropout": info.dropout,
                "target_modules": list(info.keys),
                "num_layers": "all" if info.num_layers == layers else info.num_layers,
            },
        }
    )
