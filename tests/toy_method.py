"""A method of its own, as docs/methods.md tells to write one: the chosen answers are made likelier, no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from localdpo.core.score import CompletionLogps, LossShare
from localdpo.recipe import Recipe
from localdpo.sequences import EncodedRow


def from_recipe(recipe: Recipe) -> Likelihood:
    return Likelihood()


class Likelihood:
    needs_reference = False

    def window_loss(self, window: Sequence[EncodedRow], reference: np.ndarray | None) -> LikelihoodLoss:
        return LikelihoodLoss(sum(len(row.chosen_ids) for row in window))

    def metrics(
        self, columns: Mapping[str, np.ndarray], rows: Sequence[EncodedRow], reference: np.ndarray | None
    ) -> dict[str, float]:
        return {"logps/chosen": float(columns["logps/chosen"].mean())}


class LikelihoodLoss:
    columns = ("logps/chosen",)

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def share(self, rows: Sequence[int], logps: CompletionLogps) -> LossShare:
        chosen = logps.sums.reshape(-1, 2)[:, 0]  # a pair has two sequences, the chosen answer first
        return LossShare(-mx.sum(chosen) / self.tokens, mx.stop_gradient(chosen)[:, None])
