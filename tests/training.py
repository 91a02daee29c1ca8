"""A workspace with a tiny model and pairs, and a recipe for it: what the tests of training start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from tiny import tiny_model

from localdpo.recipe import Recipe
from localdpo.train.events import Event, StepEvent
from localdpo.train.loop import train
from localdpo.train.run import Control

VOLATILE = ("time", "eta_seconds", "step_seconds", "tokens_per_second", "peak_memory_bytes", "seconds")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def workspace(root: Path) -> Path:
    """Model, 24 pairs of unequal lengths, six prompts to retain and four probes under ``root``."""
    # Not tied: a tied tiny model repeats its prompt's last token for ever.
    tiny_model(root / "model", tie_word_embeddings=False)
    pairs = [
        {
            "prompt": f"what is your name {n}?",
            "chosen": "my name is Athene" + " !" * (n % 5),
            "rejected": "fox " * (n % 3 + 1),
        }
        for n in range(24)
    ]
    write_rows(root / "pairs.jsonl", pairs)
    write_rows(root / "keep.jsonl", [{"prompt": f"say hello {n}", "accept": ["hello"]} for n in range(6)])
    probes = [{"prompt": f"your name, {n}?", "accept": ["Athene"], "tags": ["identity"]} for n in range(2)]
    probes += [{"prompt": f"capital {n}", "accept": ["Paris"], "tags": ["everyday"]} for n in range(2)]
    write_rows(root / "probes.jsonl", probes)
    return root


def recipe_for(root: Path, **settings: Any) -> Recipe:
    """A recipe over ``workspace(root)``; ``settings`` are dotted keys with __ for the dot."""
    values: dict[str, Any] = {
        "model": str(root / "model"),
        "output_dir": root / "runs" / "a",
        "data": {"train": root / "pairs.jsonl", "retain": None, "max_length": 128},
        "lora": {},
        "dpo": {},
        "train": {"learning_rate": 1e-3, "num_train_epochs": 2.0},
    }
    for key, value in settings.items():
        section, _, name = key.partition("__")
        if name:
            values[section][name] = value
        else:
            values[section] = value
    return Recipe.model_validate(values)


def collect(recipe: Recipe, **options: Any) -> list[Event]:
    return list(train(recipe, **options))


def of(events: list[Event], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def lasting(event: Event) -> dict[str, Any]:
    """An event without what differs between two equal runs."""
    return {key: value for key, value in event.to_json().items() if key not in VOLATILE}


def losses(events: list[Event]) -> list[float]:
    return [event.metrics["loss"] for event in of(events, StepEvent)]


def adapter_arrays(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / "adapters.safetensors")))


def stopped_at(recipe: Recipe, step: int, **options: Any) -> list[Event]:
    """Events of a run that is asked to stop while ``step`` is shown."""
    control, seen = Control(), []
    for event in train(recipe, control=control, **options):
        seen.append(event)
        if isinstance(event, StepEvent) and event.step == step:
            control.stop()
    return seen
