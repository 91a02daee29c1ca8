"""Direct Preference Optimization and its relatives: pairs of a chosen and a rejected answer to one prompt.

A row has two sequences, the chosen answer first. The losses themselves are in ``core/losses.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from localdpo.core.losses import LossInputs, LossSettings, preference_loss
from localdpo.core.score import CompletionLogps, LossShare
from localdpo.recipe import Recipe
from localdpo.sequences import EncodedRow

__all__ = ["DPO", "from_recipe"]


def from_recipe(recipe: Recipe) -> DPO:
    """With the settings of the section ``dpo``."""
    return DPO(LossSettings.from_recipe(recipe.dpo))


@dataclass(frozen=True, slots=True)
class DPO:
    """Learns from B pairs by any of ``core/losses.LOSSES``."""

    settings: LossSettings

    @property
    def needs_reference(self) -> bool:
        """False for the reference-free losses."""
        return not self.settings.reference_free

    def window_loss(self, window: Sequence[EncodedRow], reference: np.ndarray | None) -> PairLoss:
        """See :class:`localdpo.methods.base.Method`; the loss is the one ``settings`` name."""
        if reference is None:
            if self.needs_reference:
                raise ValueError(f"the loss {self.settings.loss_type} needs reference log-probs")
            reference = np.zeros(2 * len(window), np.float32)
        weights = np.array([row.weight for row in window], np.float32)
        chosen_tokens = np.array([len(row.chosen_ids) for row in window])
        return PairLoss(
            self.settings,
            weights,
            reference.reshape(-1, 2),
            sum(row.weight for row in window),
            float((weights * chosen_tokens).sum()),
        )

    def metrics(
        self, columns: Mapping[str, np.ndarray], rows: Sequence[EncodedRow], reference: np.ndarray | None
    ) -> dict[str, float]:
        """Preference rows by TRL's names, retain rows under retain/; a kind without rows has no metrics.

        ``nll_loss`` is the chosen answers' negative log-likelihood a token, by the rows' weights. ``retain/drift`` is
        by how many nats a token the base's own answers have become less likely.
        """
        weights = np.array([row.weight for row in rows], np.float32)
        tokens = np.array([len(row.chosen_ids) for row in rows])
        retained = np.array([row.kind == "retain" for row in rows])
        chosen = columns["logps/chosen"]
        metrics = {"nll_loss": -float((weights * chosen).sum() / (weights * tokens).sum())}
        metrics |= _means(columns, ~retained, "")
        if retained.any():
            metrics |= _means(columns, retained, "retain/")
            if reference is not None:
                lost = (reference.reshape(-1, 2)[:, 0] - chosen)[retained].sum()
                metrics["retain/drift"] = float(lost / tokens[retained].sum())
        return metrics


@dataclass(frozen=True, slots=True, eq=False)
class PairLoss:
    """The loss of a window of B pairs: the weighted mean of their losses plus rpo_alpha times the chosen answers' NLL.

    ``weights`` are float32 [B], ``reference`` float32 [B, 2]; ``weight`` and ``chosen_tokens`` are what the window's
    losses and its NLL are divided by: the sum of the weights, and the weighted number of chosen tokens.
    """

    settings: LossSettings
    weights: np.ndarray
    reference: np.ndarray
    weight: float
    chosen_tokens: float
    columns = ("losses", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")

    def share(self, rows: Sequence[int], logps: CompletionLogps) -> LossShare:
        """See :class:`localdpo.core.score.WindowLoss`."""
        index = np.asarray(rows)
        reference = mx.array(self.reference[index])
        sums, lengths = logps.sums.reshape(-1, 2), logps.lengths.reshape(-1, 2)
        inputs = LossInputs(sums[:, 0], sums[:, 1], reference[:, 0], reference[:, 1], lengths[:, 0], lengths[:, 1])
        out = preference_loss(inputs, self.settings)
        weights = mx.array(self.weights[index])
        nll = -mx.sum(weights * inputs.chosen) / self.chosen_tokens
        total = mx.sum(weights * out.losses) / self.weight + self.settings.rpo_alpha * nll
        return LossShare(total, mx.stack([*out, inputs.chosen, inputs.rejected], axis=1))


def _means(columns: Mapping[str, np.ndarray], rows: np.ndarray, prefix: str) -> dict[str, float]:
    """Of the rows where ``rows`` [B] is true."""
    if not rows.any():
        return {}
    chosen, rejected = columns["rewards/chosen"][rows], columns["rewards/rejected"][rows]
    return {
        f"{prefix}rewards/chosen": float(chosen.mean()),
        f"{prefix}rewards/rejected": float(rejected.mean()),
        f"{prefix}rewards/accuracies": float((chosen > rejected).mean()),
        f"{prefix}rewards/margins": float((chosen - rejected).mean()),
        f"{prefix}logps/chosen": float(columns["logps/chosen"][rows].mean()),
        f"{prefix}logps/rejected": float(columns["logps/rejected"][rows].mean()),
    }
