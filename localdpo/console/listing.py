"""`localdpo runs` and `localdpo models`: tables for people, rows for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localdpo.console.fetch import fetch
from localdpo.console.terminal import bytes_text, columns, count_text, say
from localdpo.errors import InputError, Problem
from localdpo.text import sanitise

if TYPE_CHECKING:
    from localdpo.catalogue import CatalogueEntry


TOKENS_A_PAIR = 256
"""What the memory column supposes of a pair, prompt and both answers together."""
_VERDICT = ("learned", "kept", "short", "words")
_FIT = {"safe": "fits", "tight": "tight", "too big": "too big"}


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    say(*columns(header, [[sanitise(cell) for cell in row] for row in rows], right))


def show_runs(folder: Path, as_json: bool) -> None:
    """Print the runs in ``folder``. Raises InputError when it is not there."""
    from localdpo.train.run import find_runs

    if not folder.is_dir():
        fix = "`localdpo train RECIPE` makes the first run"
        raise InputError(Problem(str(folder), "there is no such folder", fix))
    rows = [run_row(run) for run in find_runs(folder)]
    if as_json:
        _print_json(rows)
    elif rows:
        table = [
            [
                str(row["path"]),
                str(row["state"]),
                f"{row['step']}/{row['total_steps']}",
                "" if row["best_loss"] is None else f"{row['best_loss']:.4f}",
                row["verdict"]["short"] if row["verdict"] else "",
                str(row["model"] or ""),
            ]
            for row in rows
        ]
        _print_table(("run", "state", "step", "best loss", "verdict", "model"), table, right=(2, 3))
    else:
        print(f"no runs in {sanitise(str(folder))}")


def run_row(run: Any) -> dict[str, Any]:
    """Return what `localdpo runs --json` says about a run folder."""
    from localdpo.evaluate.evidence import verdict_of_run

    status, model = run.status(), run.info().get("model")
    verdict = verdict_of_run(run)
    row = {
        "path": str(run.path),
        "state": "new",
        "step": 0,
        "total_steps": 0,
        "best_loss": None,
        **(asdict(status) if status else {}),
        "model": model.get("spec") if isinstance(model, Mapping) else None,
        "adapter": str(run.adapter) if (run.adapter / "adapter_config.json").is_file() else None,
        "verdict": {name: getattr(verdict, name) for name in ("learned", "kept", "short", "words")}
        if verdict
        else None,
    }
    return row


def show_models(as_json: bool) -> None:
    """Print the catalogue."""
    from localdpo.catalogue import CATALOGUE

    rows = [model_row(entry.name) for entry in CATALOGUE]
    if as_json:
        _print_json(rows)
        return
    table = [
        [
            row["name"],
            count_text(row["parameters"]),
            bytes_text(row["disk_bytes"]),
            bytes_text(row["memory_bytes"]),
            row["fit"],
            "yes" if row["cached"] else "no",
            row["hub_id"] or "",
        ]
        for row in rows
    ]
    _print_table(("name", "size", "disk", "memory", "here", "cached", "Hub id"), table, right=(1, 2, 3))
    say(f"\nmemory: what the default recipe takes on this machine with pairs of {TOKENS_A_PAIR} tokens, roughly")


def show_model(name: str, as_json: bool) -> None:
    """Print what is known of one model without fetching it. Raises InputError when the name means nothing."""
    row = model_row(name)
    if as_json:
        _print_json(row)
        return
    shown = {
        "model": row["name"],
        "what": row["description"],
        "Hub id": row["hub_id"],
        "license": row["license"],
        "parameters": row["parameters"] and count_text(row["parameters"]),
        "on disk": row["disk_bytes"] and bytes_text(row["disk_bytes"]),
        "memory": row["memory_bytes"] and f"{bytes_text(row['memory_bytes'])} to train here: {row['fit']}",
        "folder": row["path"] or f"not on this machine; `localdpo models get {row['name']}` fetches it",
    }
    width = max(map(len, shown))
    for key, value in shown.items():
        if value:
            print(f"{key:{width}}  {sanitise(str(value))}")


def get_model(name: str, as_json: bool) -> None:
    """Fetch a model if it is not there, and print its folder."""
    source = fetch(name)
    if as_json:
        _print_json(model_row(name))
    else:
        print(sanitise(str(source.path)))


def model_row(spec: str) -> dict[str, Any]:
    """Return what `localdpo models info --json` says; what is not known is null."""
    from localdpo.catalogue import find_entry
    from localdpo.model.resolve import cached_path

    entry, path = find_entry(spec), cached_path(spec)
    row: dict[str, Any] = dict.fromkeys(
        ("hub_id", "description", "license", "parameters", "disk_bytes", "memory_bytes", "fit")
    )
    if entry is not None:
        memory, fit = dpo_memory(entry)
        row |= {
            "hub_id": entry.hub_id,
            "description": entry.description,
            "license": entry.license,
            "parameters": entry.parameters,
            "disk_bytes": entry.disk_bytes,
            "memory_bytes": memory,
            "fit": fit,
        }
    return {
        "name": entry.name if entry else spec,
        "path": path and str(path),
        "cached": path is not None,
        **row,
    }


def dpo_memory(entry: CatalogueEntry) -> tuple[int, str]:
    """Return the bytes that the default recipe takes on this machine, and "fits", "tight" or "too big".

    As the trainer does, it holds the base in the way that suits the memory there is, and turns to gradient
    checkpointing where that would not be safe.
    """
    from localdpo.dpo.budget import mode_of
    from localdpo.model.device import describe_device
    from localdpo.model.load import choose_memory
    from localdpo.recipe import LoraRecipe, TrainRecipe
    from localdpo.train.memory import ModelShape, estimate_step

    device, shape, lora = describe_device(), ModelShape.of(entry), LoraRecipe()
    layers = lora.num_layers if isinstance(lora.num_layers, int) else None
    window = TrainRecipe().per_device_train_batch_size * TOKENS_A_PAIR
    mode = mode_of(device.kind, choose_memory(entry.parameters, "auto"))
    for checkpointing in (False, True):
        estimate = estimate_step(
            shape,
            mode,
            window,
            TOKENS_A_PAIR,
            trainable=shape.lora_parameters(lora.r, layers, lora.target_modules),
            lora_layers=layers,
            weight_bytes=4 * shape.parameters if mode == "cpu" else entry.disk_bytes,
            checkpointing=checkpointing,
        )
        verdict = estimate.verdict(device.memory_available)
        if verdict == "safe":
            break
    return estimate.total, _FIT[verdict]
