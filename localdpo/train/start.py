"""What a run starts from, and what it may not move far from: the base, or an adapter trained before.

On-policy rounds need both: each goes on from the adapter of the round before, and its reference either stays the
base or moves along. This module knows adapters, not rounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from localdpo.core.reference import ScoresReference
from localdpo.core.score import Scorer
from localdpo.errors import InputError, Problem
from localdpo.files import sha256_file
from localdpo.model.load import LoadedModel
from localdpo.model.lora import WEIGHTS_FILE, LoraInfo, adapter_weights, load_adapter
from localdpo.recipe import Recipe
from localdpo.sequences import TokenSequence

__all__ = ["Start", "reference_of", "start_from"]


@dataclass(frozen=True)
class Start:
    """The adapter that a run goes on from: its arrays by name, and the sha256 of their file."""

    weights: dict[str, mx.array]
    sha256: str


def start_from(recipe: Recipe, loaded: LoadedModel, info: LoraInfo) -> Start | None:
    """Put the adapter of ``lora.init_from`` on the model, in place of the fresh one that ``info`` describes.

    None when the recipe names none. Raises InputError when the adapter has another shape than the recipe asks for.
    """
    folder = recipe.lora.init_from
    if folder is None:
        return None
    found = load_adapter(folder, loaded, dropout=recipe.lora.dropout)
    shapes = (
        ("rank", found.rank, info.rank),
        ("scale", found.scale, info.scale),
        ("layers", found.num_layers, info.num_layers),
        ("modules", sorted(found.keys), sorted(info.keys)),
    )
    problems = [
        Problem("lora.init_from", f"{folder} has {name} {has}, and the recipe asks for {wanted}")
        for name, has, wanted in shapes
        if has != wanted
    ]
    if problems:
        raise InputError(*problems, Problem("", "An adapter goes on with the settings it was made with"))
    return Start(adapter_weights(loaded.model), sha256_file(folder / WEIGHTS_FILE))


def reference_of(
    recipe: Recipe, start: Start | None, scorer: Scorer, loaded: LoadedModel
) -> tuple[ScoresReference, str]:
    """Who computes the reference's log-probs, and the fingerprint under which they are kept."""
    if start is None or recipe.dpo.reference == "base":
        return scorer, loaded.fingerprint
    combined = hashlib.sha256(f"{loaded.fingerprint} {start.sha256}".encode()).hexdigest()
    return _StartScorer(scorer, start), combined


class _StartScorer:
    """Log-probs under the model with the adapter that the run started from, whatever it has learned since."""

    def __init__(self, scorer: Scorer, start: Start) -> None:
        self._scorer = scorer
        self._start = start

    def reference_logps(self, sequences: Sequence[TokenSequence]) -> np.ndarray:
        """Summed log-probs, float32 [S]; the model is left as it was."""
        model = self._scorer.model
        learned = adapter_weights(model)
        model.update(tree_unflatten(list(self._start.weights.items())))
        try:
            return self._scorer.logps(sequences)
        finally:
            model.update(tree_unflatten(list(learned.items())))
