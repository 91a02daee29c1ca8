"""Held-out pairs under a finished run's adapter: loss, reward accuracy and margin, as in training.

It reads a run folder and changes nothing in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from localdpo.data.encode import encode_pairs
from localdpo.data.pairs import PreferencePair, Skipped, read_pairs
from localdpo.dpo.losses import LossSettings, PairLogps
from localdpo.dpo.reference import ReferenceCache
from localdpo.dpo.scorer import PairScorer
from localdpo.errors import InputError, Problem
from localdpo.model.load import load_model
from localdpo.model.lora import load_adapter
from localdpo.paths import cache_dir
from localdpo.recipe import Recipe, load_recipe
from localdpo.train.inputs import read_inputs
from localdpo.train.monitor import held_out_metrics
from localdpo.train.run import RunFolder
from localdpo.train.snapshot import copies


@dataclass(frozen=True, slots=True)
class HeldOut:
    """``metrics`` have the names of an evaluation in training; ``pairs`` were scored, ``skipped`` were not."""

    metrics: dict[str, float]
    pairs: int
    skipped: tuple[Skipped, ...]


def evaluate_run(folder: str | Path, pairs_file: str | Path | None = None) -> HeldOut:
    """Score held-out pairs with the published adapter of a run.

    The pairs are those the run held out, or all of ``pairs_file``. Raises InputError when ``folder``
    is no run with an adapter, or there are no pairs.
    """
    run = RunFolder(folder)
    if not run.info() or not run.adapter.is_dir():
        raise InputError(Problem(str(folder), "is no run with an adapter", "Train one with `localdpo train`"))
    recipe = load_recipe(run.recipe_file, check_files=False)
    pairs = _pairs(run, recipe, pairs_file)
    loaded = load_model(recipe.model, quantize=recipe.quantize, memory=recipe.train.memory)
    load_adapter(run.adapter, loaded)
    encoding = encode_pairs(pairs, loaded.tokenizer, recipe.data.max_length, recipe.data.truncation)
    settings = LossSettings.from_recipe(recipe.dpo)
    scorer = PairScorer(loaded.model)
    reference: PairLogps | None = None
    if not settings.reference_free:
        cache = ReferenceCache(cache_dir() / "reference", loaded.fingerprint, loaded.device)
        reference = cache.get(scorer, encoding.pairs)
    metrics = held_out_metrics(scorer.logps(encoding.pairs), reference, encoding.pairs, settings)
    return HeldOut(metrics, len(encoding.pairs), tuple(encoding.skipped))


def _pairs(run: RunFolder, recipe: Recipe, pairs_file: str | Path | None) -> list[PreferencePair]:
    if pairs_file is not None:
        return read_pairs(pairs_file).pairs
    if run.info().get("imported"):
        fix = "Name a file of pairs to evaluate on"
        raise InputError(Problem(str(run.path), "this run was imported, without pairs", fix))
    # What must stay, and what is probed, is no part of this: their files need not exist any more.
    data = recipe.data.model_copy(update={"retain": None, "probes": None})
    held_out = read_inputs(recipe.model_copy(update={"data": data}), copies(run)).held_out
    if not held_out:
        raise InputError(Problem(str(run.path), "this run held out no pairs", "Name a file of pairs to evaluate on"))
    return held_out
