"""The data of a run: files read, pairs held out, and everything worth a warning before a model is loaded.

This module knows files and pairs, no tokens, and never loads mlx.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from localdpo.data.pairs import (
    PreferencePair,
    PromptRow,
    Skipped,
    collect_pairs,
    listed,
    pair_shelf,
    prompt_key,
    read_prompts,
)
from localdpo.data.shelf import Shelf
from localdpo.data.split import held_out_rows, overlap
from localdpo.errors import Problem
from localdpo.paths import recipes_dir
from localdpo.recipe import DataRecipe, Recipe
from localdpo.train.snapshot import DataFile

EVERYDAY = "everyday.jsonl"
_START = "lora.init_from"
MIN_PAIRS_TO_SPLIT = 20
"""With fewer pairs a fraction holds out none: two pairs measure nothing, and two less to learn from hurt."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a recipe's data section comes to; ``files`` are the originals as they were read, by key.

    Pairs are on shelves: however many there are, they take little memory.
    """

    train: Shelf[PreferencePair]
    held_out: Shelf[PreferencePair]
    retain: list[PromptRow]
    probes: list[PromptRow]
    skipped: list[Skipped]
    warnings: list[Problem]
    files: dict[str, DataFile]


def data_paths(data: DataRecipe) -> dict[str, Path]:
    """The data files by recipe key, the shipped everyday prompts included."""
    retain = recipes_dir() / EVERYDAY if data.retain == "everyday" else data.retain
    named = {"train": data.train, "eval": data.eval, "retain": retain, "probes": data.probes}
    return {f"data.{key}": path for key, path in named.items() if isinstance(path, Path)}


def originals(data: DataRecipe) -> dict[str, DataFile]:
    """The data files that exist, with their sums: those that a resume compares with what it started from."""
    return {key: DataFile.of(key, path) for key, path in data_paths(data).items() if path.is_file()}


def starting_files(recipe: Recipe) -> dict[str, DataFile]:
    """The weights of the adapter that a run goes on from, if it does and they are there."""
    folder = recipe.lora.init_from
    weights = None if folder is None else folder / "adapters.safetensors"
    return {} if weights is None or not weights.is_file() else {_START: DataFile.of(_START, weights)}


def read_inputs(recipe: Recipe, copies: Mapping[str, Path] | None = None) -> Inputs:
    """Read all data of a recipe; ``copies`` (by key) are read in place of the originals.

    Messages name the originals all the same. Raises InputError for broken rows, and when a file has
    no usable pair.
    """
    data, paths = recipe.data, data_paths(recipe.data)
    files = {key: DataFile.of(key, path) for key, path in paths.items() if key not in (copies or {})}
    files |= starting_files(recipe)
    train, skipped, warnings = _pairs(paths["data.train"], (copies or {}).get("data.train"))
    if "data.eval" in paths:
        held_out, also_skipped, also_warned = _pairs(paths["data.eval"], (copies or {}).get("data.eval"))
        warnings += [*also_warned, *_overlap_warning(paths["data.eval"], train, held_out)]
        skipped += also_skipped
    else:
        train, held_out = _split(train, data, recipe.seed)
    retain = read_prompts(paths["data.retain"]) if "data.retain" in paths else []
    probes = read_prompts(paths["data.probes"]) if "data.probes" in paths else []
    retain = _without_taught(retain, chain(train, held_out))
    warnings += _probe_warning(probes, train, retain)
    return Inputs(train, held_out, retain, probes, skipped, warnings, files)


def _pairs(path: Path, copy: Path | None) -> tuple[Shelf[PreferencePair], list[Skipped], list[Problem]]:
    """The usable pairs, the rows left out, and warnings; all name ``path``, even where ``copy`` is what is read."""
    pairs, source = pair_shelf(), str(path)
    if copy is None:
        return pairs, *collect_pairs(path, pairs.append)
    skipped, warnings = collect_pairs(copy, lambda pair: pairs.append(replace(pair, source=source)))
    return (
        pairs,
        [replace(row, source=source) for row in skipped],
        [replace(problem, where=problem.where.replace(str(copy), source)) for problem in warnings],
    )


def _split(
    pairs: Shelf[PreferencePair], data: DataRecipe, seed: int
) -> tuple[Shelf[PreferencePair], Shelf[PreferencePair]]:
    fraction = data.eval if isinstance(data.eval, float) else 0.0
    if len(pairs) < MIN_PAIRS_TO_SPLIT:
        return pairs, pairs.pick([])
    # Rows that a file already marks as retained are there to be trained on.
    preferences, others = array("l"), array("l")
    for row, pair in enumerate(pairs):
        (preferences if pair.kind == "preference" else others).append(row)
    held = held_out_rows((prompt_key(pair.prompt) for pair in pairs.pick(preferences)), fraction, seed)
    rows = np.asarray(preferences)
    return pairs.pick(chain(np.delete(rows, held), others)), pairs.pick(rows[held])


def _without_taught(retain: Sequence[PromptRow], pairs: Iterable[PreferencePair]) -> list[PromptRow]:
    """A prompt whose answer is being changed cannot keep its old one."""
    taught = {id(row) for row in overlap(pairs, retain)}
    return [row for row in retain if id(row) not in taught]


def _overlap_warning(path: Path, train: Sequence[PreferencePair], held_out: Sequence[PreferencePair]) -> list[Problem]:
    shared = overlap(train, held_out)
    if not shared:
        return []
    return [
        Problem(
            str(path),
            f"{len(shared):,} of {len(held_out):,} held-out pairs ({listed([row.line for row in shared])}) "
            "have prompts that are trained on",
            "Their figures will look better than they are: remove them from one of the files",
        )
    ]


def _probe_warning(
    probes: Sequence[PromptRow], train: Sequence[PreferencePair], retain: Sequence[PromptRow]
) -> list[Problem]:
    shared = overlap(chain(train, retain), probes)
    if not shared:
        return []
    return [
        Problem(
            probes[0].source,
            f"{len(shared):,} of {len(probes):,} probes are taught ({listed([row.line for row in shared])})",
            "Reword them: an answer learned by heart says nothing about others",
        )
    ]
