"""The data of a run: files read, pairs held out, and everything worth a warning before a model is loaded.

This module knows files and pairs, no tokens, and never loads mlx.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from localdpo.data.pairs import PairFile, PreferencePair, PromptRow, Skipped, listed, read_pairs, read_prompts
from localdpo.data.split import overlap, split_by_prompt
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
    """What a recipe's data section comes to; ``files`` are the originals as they were read, by key."""

    train: list[PreferencePair]
    held_out: list[PreferencePair]
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
    pairs = _pairs(paths["data.train"], (copies or {}).get("data.train"))
    warnings, skipped = list(pairs.warnings), list(pairs.skipped)
    if "data.eval" in paths:
        held_file = _pairs(paths["data.eval"], (copies or {}).get("data.eval"))
        train, held_out = pairs.pairs, held_file.pairs
        warnings += [*held_file.warnings, *_overlap_warning(paths["data.eval"], train, held_out)]
        skipped += held_file.skipped
    else:
        train, held_out = _split(pairs.pairs, data, recipe.seed)
    retain = read_prompts(paths["data.retain"]) if "data.retain" in paths else []
    probes = read_prompts(paths["data.probes"]) if "data.probes" in paths else []
    retain = _without_taught(retain, [*train, *held_out])
    warnings += _probe_warning(probes, train, retain)
    return Inputs(train, held_out, retain, probes, skipped, warnings, files)


def _pairs(path: Path, copy: Path | None) -> PairFile:
    file = read_pairs(copy or path)
    if copy is None:
        return file
    return PairFile(
        [replace(pair, source=str(path)) for pair in file.pairs],
        [replace(row, source=str(path)) for row in file.skipped],
        [replace(problem, where=problem.where.replace(str(copy), str(path))) for problem in file.warnings],
    )


def _split(
    pairs: list[PreferencePair], data: DataRecipe, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    fraction = data.eval if isinstance(data.eval, float) else 0.0
    if len(pairs) < MIN_PAIRS_TO_SPLIT:
        return pairs, []
    # Rows that a file already marks as retained are there to be trained on.
    train, held_out = split_by_prompt([pair for pair in pairs if pair.kind == "preference"], fraction, seed)
    return [*train, *(pair for pair in pairs if pair.kind != "preference")], held_out


def _without_taught(retain: Sequence[PromptRow], pairs: Sequence[PreferencePair]) -> list[PromptRow]:
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
    shared = overlap([*train, *retain], probes)
    if not shared:
        return []
    return [
        Problem(
            probes[0].source,
            f"{len(shared):,} of {len(probes):,} probes are taught ({listed([row.line for row in shared])})",
            "Reword them: an answer learned by heart says nothing about others",
        )
    ]
